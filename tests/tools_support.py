"""A model folder whose chat template knows tools, in the way of Hermes and Qwen; the pocket model's does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from conftest import POCKET

TEMPLATE = """\
{%- if tools %}
Tools, one JSON object a line:
{% for tool in tools %}
{{ tool | tojson }}
{% endfor %}
Call one by <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call>.
{% endif %}
{% for message in messages %}
[{{ message.role }}]
{{ message.content }}
{%- if message.tool_calls %}
{% for call in message.tool_calls %}
{% if message.content or not loop.first %}{{ "\\n" }}{% endif %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}
{%- endif %}
{%- if message.tool_call_id %} ({{ message.name }}, {{ message.tool_call_id }}){% endif %}

{% endfor %}
{% if add_generation_prompt %}[assistant]
{% endif %}
"""


def model_folder(folder: Path, with_weights: bool = False) -> Path:
    """A copy of the pocket model's files, in a folder that is made, with `TEMPLATE` in the place of its own."""
    folder.mkdir()
    names = ["config.json", "tokenizer.json", *(["model.safetensors"] if with_weights else [])]
    for name in names:
        shutil.copy(POCKET / name, folder)
    config = json.loads((POCKET / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
