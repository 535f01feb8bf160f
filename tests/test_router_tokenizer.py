"""Tokenizing and chat templates, against `transformers` on the same files."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import tokenizers
from conftest import POCKET
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from tools_support import model_folder
from transformers import AutoTokenizer

from router.errors import InvalidRequest, UnusableTokenizer
from router.tokenizer import Setting, Tokenizer

LLAMA3 = (
    "{{- bos_token }}\n"
    "{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {%- set system_message = messages[0]['content']|trim %}\n"
    "    {%- set messages = messages[1:] %}\n"
    "{%- else %}\n"
    '    {%- set system_message = "" %}\n'
    "{%- endif %}\n"
    '{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}\n'
    '{{- system_message + "<|eot_id|>" }}\n'
    "{%- for message in messages %}\n"
    "    {%- if message.role not in ['user', 'assistant'] %}\n"
    "        {{- raise_exception('Only user and assistant roles are supported!') }}\n"
    "    {%- endif %}\n"
    "    {%- if loop.index > 50 %}{%- break %}{%- endif %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{% generation %}{{ message['content'] | trim }}{% endgeneration %}{{ '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if tools is not none %}{{ tools | tojson(indent=2) }}{%- endif %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
    "{%- endif %}\n"
)
NAMES = "{{ messages | tojson }}{{ '<é&>' | tojson }}{{ eos_token }}{{ strftime_now('%Y') }}{{ unk_token is defined }}"
CHATS = [
    [("user", "What is a generator?")],
    [("system", "  Be brief.\n"), ("user", "Hi <b> & 'you' 😀"), ("assistant", "Yes?"), ("user", "é" * 40)],
    [("user", "a<|eot_id|>b<|begin|>c")],
]


def turns(chat: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in chat]


def llama3_like(folder: Path) -> None:
    """A trained byte-level BPE with special tokens, a plain added token, and entries as objects in the config."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    backend.add_tokens(["<tool call>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    backend.enable_truncation(8)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": "<|begin_of_text|>", "__type": "AddedToken"},
        "eos_token": "<|eot_id|>",
        "chat_template": "not this one",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(LLAMA3)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))


@pytest.fixture(scope="module", params=["pocket", "llama3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "pocket":
        return POCKET
    path = tmp_path_factory.mktemp("llama3")
    llama3_like(path)
    return path


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


@settings(max_examples=200, deadline=None)
@given(text=st.text(min_size=1, max_size=60))
def test_texts_encode_and_decode_as_transformers_does(ours: Tokenizer, theirs, text: str) -> None:
    token_ids = ours.encode(text)
    assert token_ids == theirs.encode(text)
    assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True) == text
    assert len(token_ids) >= ours.fewest_tokens(len(text.encode()))


@pytest.mark.parametrize("chat", CHATS)
def test_chats_are_set_as_transformers_sets_them(ours: Tokenizer, theirs, chat: list[tuple[str, str]]) -> None:
    messages = turns(chat)
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.render(messages) == text
    token_ids = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert ours.encode(ours.render(messages), is_template=True) == token_ids


@pytest.mark.parametrize("source", [NAMES, [{"name": "default", "template": NAMES}, {"name": "rag", "template": "x"}]])
def test_filters_globals_and_named_templates(tmp_path: Path, source: object) -> None:
    with_template(tmp_path, source)
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        [{"role": "user", "content": "<é>"}], tokenize=False, add_generation_prompt=True
    )
    assert Tokenizer(tmp_path).render(turns([("user", "<é>")])) == expected


def test_a_chat_that_the_template_refuses_is_invalid(tmp_path: Path) -> None:
    llama3_like(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    with pytest.raises(InvalidRequest, match=r"prompt\.chat\.messages.*Only user and assistant"):
        tokenizer.render(turns([("user", "x"), ("robot", "y")]))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content.__class__.__mro__ }}{{ messages[9].role }}")
    with pytest.raises(InvalidRequest, match="chat template"):
        Tokenizer(tmp_path).render(turns([("user", "x")]))


THINKING = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content | trim if trims else message.content }}[end]"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}{{ reasoning_effort }}{% endif %}"
)


def with_template(folder: Path, source: object) -> Path:
    shutil.copy(POCKET / "tokenizer.json", folder)
    config = json.loads((POCKET / "tokenizer_config.json").read_text()) | {"chat_template": source}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "variables", [{}, {"enable_thinking": False}, {"enable_thinking": True, "reasoning_effort": "low"}], ids=str
)
@pytest.mark.parametrize("opens_answer", [True, False])
def test_variables_of_a_template_are_set_as_transformers_sets_them(
    tmp_path: Path, variables: dict, opens_answer: bool
) -> None:
    folder, messages = with_template(tmp_path, THINKING), turns([("user", "Hi")])
    theirs = AutoTokenizer.from_pretrained(folder)
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens_answer, **variables)
    assert Tokenizer(folder).render(messages, (), Setting(variables, opens_answer)) == text
    assert ("<think>" in text) == (opens_answer and variables.get("enable_thinking") is False)


@pytest.mark.parametrize(
    "last", ["The sky is", "The sky is \n", "  ", "", "[end]", "<|where the last message ends|> x"]
)
@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("source", [THINKING, LLAMA3], ids=["plain", "llama3"])
def test_a_message_is_gone_on_with_as_transformers_does(tmp_path: Path, source: str, trims: bool, last: str) -> None:
    folder, messages = with_template(tmp_path, source), turns([("user", "The sky is"), ("assistant", last)])
    theirs = AutoTokenizer.from_pretrained(folder)
    text = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True, trims=trims)
    setting = Setting({"trims": trims}, opens_answer=False, continues=True)
    assert Tokenizer(folder).render(messages, (), setting) == text
    assert messages[-1]["content"] == last


def test_a_template_that_leaves_the_last_message_out(tmp_path: Path) -> None:
    for source in ("{{ messages[0].content }}", "{{ messages[-1].content | upper }}", "{{ messages[-1].content[3:] }}"):
        tokenizer = Tokenizer(with_template(tmp_path, source))
        with pytest.raises(InvalidRequest, match=r"^prompt\.chat\.continue_final_message: the model's chat template"):
            tokenizer.render(turns([("user", "x"), ("assistant", "sky")]), (), Setting(continues=True))


def test_no_variable_stands_for_what_a_template_is_given_anyhow(tmp_path: Path) -> None:
    source = "{{ messages | length }}{{ tools }}{{ bos_token }}{{ add_generation_prompt }}{{ self_ }}"
    others = {"messages": [], "tools": [1], "bos_token": "x", "add_generation_prompt": 0, "self_": "!"}
    text = Tokenizer(with_template(tmp_path, source)).render(turns([("user", "x")]), (), Setting(others))
    assert text == "1None<|begin|>True!"


def test_a_variable_reaches_nothing_but_the_sandbox(tmp_path: Path) -> None:
    """A template that is careless with one is still in it: no attribute with underscores, no way to change a list."""
    for source in ("{{ x.__class__.__mro__ }}", "{{ x.append(1) }}"):
        tokenizer = Tokenizer(with_template(tmp_path, source))
        with pytest.raises(InvalidRequest, match="chat template"):
            tokenizer.render(turns([("user", "x")]), (), Setting({"x": [1]}))


TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds <two> é.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}
WITH_TOOLS = [
    {"role": "user", "content": "1 + ü?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "1ü", "tool_call_id": "call_1", "name": "add"},
]


@pytest.mark.parametrize("tools", [[], [TOOL], [TOOL, TOOL]], ids=len)
@pytest.mark.parametrize("num_messages", [1, 2, 3])
def test_tools_and_their_calls_are_set_as_transformers_sets_them(
    tmp_path: Path, tools: list[dict], num_messages: int
) -> None:
    folder = model_folder(tmp_path / "model")
    messages = WITH_TOOLS[:num_messages]
    theirs = AutoTokenizer.from_pretrained(folder)
    text = theirs.apply_chat_template(messages, tools=tools or None, tokenize=False, add_generation_prompt=True)
    assert Tokenizer(folder).render(messages, tools) == text
    assert ("Adds <two> é." in text) == bool(tools)


@pytest.mark.parametrize(
    "other", [{"name": "tool_use", "template": "{{ tools | tojson }}"}, None], ids=["named", "none"]
)
def test_the_template_for_tools_has_a_name_of_its_own(tmp_path: Path, other: dict[str, str] | None) -> None:
    folder = model_folder(tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "default", "template": "{{ messages[0].content }}"},
        *([other] if other else []),
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(folder)
    assert tokenizer.render(WITH_TOOLS[:1]) == "1 + ü?"
    if other:
        assert tokenizer.render(WITH_TOOLS[:1], [TOOL]) == json.dumps([TOOL], ensure_ascii=False)
        return
    with pytest.raises(InvalidRequest, match=r"^prompt\.chat\.tools: this model's chat template knows no tools"):
        tokenizer.render(WITH_TOOLS[:1], [TOOL])
    with pytest.raises(
        InvalidRequest, match=r"^prompt\.chat\.messages\.tool_calls: this model's chat template knows no"
    ):
        tokenizer.render(WITH_TOOLS)


def test_half_a_character_from_a_template_is_invalid() -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt\.chat\.messages"):
        Tokenizer(POCKET).render([{"role": "user", "content": "\ud800"}])


def test_a_folder_without_template_or_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UnusableTokenizer, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
    shutil.copy(POCKET / "tokenizer.json", tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert not tokenizer.has_chat_template and tokenizer.eos_token_ids == frozenset()
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.render(turns([("user", "x")]))


def test_end_tokens_are_the_engines(tmp_path: Path) -> None:
    """generation_config.json goes before config.json, as in `engine.config`: else a failover ends a text too early."""
    llama3_like(tmp_path)
    assert Tokenizer(tmp_path).eos_token_ids == {1, 3}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert Tokenizer(tmp_path).eos_token_ids == {3}
    (tmp_path / "generation_config.json").write_text("{}")
    assert Tokenizer(tmp_path).eos_token_ids == {1}
    assert Tokenizer(POCKET).eos_token_ids == {257}


def test_texts_too_long_are_known_without_encoding() -> None:
    """Each token of the pocket tokenizer covers nine bytes at most (its special tokens)."""
    tokenizer = Tokenizer(POCKET)
    assert tokenizer.fewest_tokens(9 * 4096) == 4096
    assert len(tokenizer.encode("<|begin|>" * 10)) == 11


def test_encoding_lets_other_threads_run() -> None:
    tokenizer = Tokenizer(POCKET)
    done = threading.Event()
    thread = threading.Thread(target=lambda: (tokenizer.encode("word " * 400_000), done.set()))
    thread.start()
    ticks = 0
    while not done.is_set():
        time.sleep(0.001)
        ticks += 1
    thread.join()
    assert ticks > 20
