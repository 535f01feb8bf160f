"""Text and chats to token ids, with the model's own tokenizer files. Knows no request and no cluster; imports no torch.

Chats are rendered with the model's own template, as `transformers` does it (its `utils/chat_template_utils.py`): in
Jinja's immutable sandbox, with the same filters, globals and special tokens.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from router.errors import InvalidRequest, UnusableTokenizer

# The decoder of byte-level BPE writes each byte as a printable character (GPT-2's table): 188 bytes stand for
# themselves in Latin-1, the other 68 for the characters from U+0100 on, in order.
_PLAIN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF = {chr(byte): byte for byte in _PLAIN}
_BYTE_OF |= {chr(0x100 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(_PLAIN)))}

MAX_REMEMBERED_TOKENS = 1 << 16
MAX_ERROR_CHARS = 500  # of a template: it may repeat the prompt, and a call's metadata is bounded
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")  # a byte as a token, in character vocabularies
_KNOWS_TOOLS = re.compile(r"\btools\b")  # what a template calls them
# Appended to the message to be continued, to find its end in the text. Its trailing space is lost if a template
# strips messages.
_END_MARK = "<|where the last message ends|> "


class Decoder(Protocol):
    """Tokens back to text; `bytes_of` is None if a token's bytes depend on its neighbours."""

    bytes_of: Callable[[int], bytes] | None

    def decode(self, token_ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Setting:
    """How a chat is rendered with its template."""

    variables: Mapping[str, Any] = field(default_factory=dict)  # for the template
    opens_answer: bool = True  # the text ends with the opening of an assistant message
    continues: bool = False  # the text ends inside the last message


PLAIN = Setting()


class Tokenizer:
    """A model folder's `tokenizer.json`, its chat template and its end tokens. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UnusableTokenizer(f"{folder} has no tokenizer.json (a tokenizer of the `tokenizers` library)")
        self.folder = folder
        self._backend = tokenizers.Tokenizer.from_file(str(path))
        self._backend.no_truncation()
        self._backend.no_padding()
        config = _read_json(folder / "tokenizer_config.json")
        self._special_tokens = _special_tokens({**_read_json(folder / "special_tokens_map.json"), **config})
        sources = _find_templates(folder, config)
        self._template = compile_template(sources["default"]) if "default" in sources else None
        # As in `transformers`, a template of that name is the one for chats with tools.
        with_tools = sources.get("tool_use") or sources.get("default", "")
        self._tools_template = compile_template(with_tools) if _KNOWS_TOOLS.search(with_tools) else None
        self.eos_token_ids = _eos_token_ids(folder)
        self.bytes_of: Callable[[int], bytes] | None = None
        if _is_byte_level(path):
            self.bytes_of = functools.lru_cache(MAX_REMEMBERED_TOKENS)(self._bytes_of)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, is_template: bool = False) -> list[int]:
        """Token ids. A chat template writes special tokens itself; to a plain text the tokenizer adds its own.

        Releases Python's lock while it works, so that a long text can be encoded on a thread.
        """
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=not is_template)
        return list(encoding.ids)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        setting: Setting = PLAIN,
    ) -> str:
        """The text of a chat up to where the model continues; messages and tools are in `transformers`' format.

        Raises `InvalidRequest`.
        """
        template = self._choose(messages, tools)
        turns = [*messages[:-1], _marked(messages[-1])] if setting.continues else list(messages)
        given: dict[str, Any] = {"messages": turns, "tools": list(tools) or None, "documents": None}
        given |= {**self._special_tokens, "add_generation_prompt": setting.opens_answer}
        try:
            text = template.render({**setting.variables, **given})
            text.encode()
        except Exception as error:  # the template is foreign code: it may refuse a chat, or fail on it
            said = str(error)[:MAX_ERROR_CHARS]
            raise InvalidRequest("prompt.chat.messages", f"the model's chat template says: {said}") from error
        return _up_to_mark(text, messages[-1]) if setting.continues else text

    def _choose(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[object]) -> jinja2.Template:
        """The template for such a chat. Raises `InvalidRequest` if it would ignore the tools, or calls of them."""
        if self._template is None:
            raise InvalidRequest("prompt.chat", "this model has no chat template")
        has_calls = any("tool_calls" in message for message in messages)
        if not tools and not has_calls:
            return self._template
        if self._tools_template is None:
            field = "prompt.chat.tools" if tools else "prompt.chat.messages.tool_calls"
            raise InvalidRequest(field, "this model's chat template knows no tools")
        return self._tools_template if tools else self._template

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, without special tokens."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=True))

    def fewest_tokens(self, num_bytes: int) -> int:
        """A lower bound of the number of tokens in `num_bytes` of text, without encoding it."""
        return num_bytes // self._longest_token_bytes

    @functools.cached_property
    def added_tokens(self) -> frozenset[str]:
        """Texts that are a single token in any context, without special tokens, which never appear as text."""
        added = self._backend.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if not token.special)

    @functools.cached_property
    def largest_id(self) -> int:
        """The largest id that it may encode to."""
        return max(self._backend.get_vocab(with_added_tokens=True).values())

    @functools.cached_property
    def _longest_token_bytes(self) -> int:
        if self._backend.normalizer is not None:  # it may drop any amount of text
            return 1 << 62
        return max(len(token.encode()) for token in self._backend.get_vocab(with_added_tokens=True))

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def piece(self, token_id: int) -> bytes:
        """A token's bytes for display in a list of tokens; special tokens by their names."""
        data = self.bytes_of(token_id) if self.bytes_of is not None else b""
        if data:
            return data
        token = str(self._backend.id_to_token(token_id) or "")
        if byte := _BYTE_FALLBACK.fullmatch(token):
            return bytes.fromhex(byte[1])
        return token.replace("\u2581", " ").encode()  # SentencePiece's space

    def _bytes_of(self, token_id: int) -> bytes:
        token = None if token_id in self._special_ids else self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if all(char in _BYTE_OF for char in token):
            return bytes(_BYTE_OF[char] for char in token)
        return str(token).encode()  # an added token, written as it is


def _marked(message: Mapping[str, Any]) -> dict[str, Any]:
    return {**message, "content": message["content"] + _END_MARK}


def _up_to_mark(text: str, last: Mapping[str, Any]) -> str:
    """A chat's text up to the end of its last message, as `transformers` cuts it."""
    end = text.rfind(_END_MARK.strip())
    if end < 0 or last["content"].strip() not in text:
        problem = "the model's chat template leaves out the last message, or a part of it"
        raise InvalidRequest("prompt.chat.continue_final_message", problem)
    return text[:end] if text.startswith(_END_MARK, end) else text[:end].rstrip()


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """The variables bos_token, eos_token and so on of templates; an entry is a string, or an object with `content`."""
    entries = {name: value for name, value in config.items() if name.endswith("_token")}
    entries = {name: value.get("content") if isinstance(value, dict) else value for name, value in entries.items()}
    return {name: value for name, value in entries.items() if isinstance(value, str)}


def _find_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name. A separate file wins over the config's entry, which is a template or a list of named ones."""
    path = folder / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(source, list):
        return {entry["name"]: entry["template"] for entry in source}
    return {"default": source} if isinstance(source, str) else {}


def _eos_token_ids(folder: Path) -> frozenset[int]:
    """End tokens of generation_config.json, else of config.json: the engine's own rule, and it must be the same."""
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(folder / name).get("eos_token_id")
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()


def _is_byte_level(path: Path) -> bool:
    """Whether the decoder is only byte-level BPE, so that each token is a fixed byte string."""
    decoder = _read_json(path).get("decoder") or {}
    steps: Iterable[dict[str, Any]] = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    return [step.get("type") for step in steps] == ["ByteLevel"]


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's part for training. Here it only has to be accepted."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's way)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(lineno)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def compile_template(source: str) -> jinja2.Template:
    """A chat template in the sandbox that `transformers` gives it."""
    extensions: list[Any] = [_Generation, jinja2.ext.loopcontrols]
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=extensions
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
