"""One YAML file for all options of `baton serve`: each flag is a key, and unknown keys are refused by name.

The keys come from the parser of the flags itself, so a new flag automatically is a key. Values are checked as for the
flag; an error names the file, the line and the key.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from deploy.config import ConfigError

MAX_FILE_BYTES = 1 << 20
NO_KEYS = ("help", "config")  # what makes sense on the command line only
SECRET_WORDS = ("password", "secret", "token", "api_key", "wire_key")
NOT_SECRET = ("max_batched_tokens",)


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    words = "YAML with any of these options as keys; the command line goes before it (see `baton config show`)"
    parser.add_argument("--config", type=Path, metavar="FILE", help=words)


def keys_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """What a file may set: the flags' names with `_`, and `model`."""
    return {_key(action): action for action in parser._actions if action.dest not in NO_KEYS}


def apply_file(parser: argparse.ArgumentParser, file: Path) -> None:
    """Makes the file's values the parser's defaults, so that the command line overrides them. Raises `ConfigError`."""
    parser.set_defaults(**read_config(parser, file))


def read_config(parser: argparse.ArgumentParser, file: Path) -> dict[str, Any]:
    """The file's values by the parser's names for them. Raises `ConfigError`."""
    try:
        text = file.read_bytes()[: MAX_FILE_BYTES + 1].decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {file}: {getattr(error, 'strerror', None) or error}") from None
    if len(text) > MAX_FILE_BYTES:
        raise ConfigError(f"--config: {file} has more than {MAX_FILE_BYTES} bytes")
    try:
        return parse_config(parser, text)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def parse_config(parser: argparse.ArgumentParser, text: str) -> dict[str, Any]:
    """Like `read_config`, for a text. Raises `ConfigError`, without the file's name."""
    actions = keys_of(parser)
    values: dict[str, Any] = {}
    for name, value, line in _entries(text):
        key = name.replace("-", "_")
        if key not in actions:
            near = difflib.get_close_matches(key, actions, n=1, cutoff=0.6)
            raise ConfigError(f"line {line}: unknown key {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        action = actions[key]
        if action.dest in values:
            raise ConfigError(f"line {line}: {name} is given twice")
        try:
            values[action.dest] = action.default if value is None else _value(action, value)
        except (argparse.ArgumentTypeError, ValueError, TypeError) as error:
            raise ConfigError(f"line {line}: {name}: {error}") from None
    return values


def shown(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """All keys with their values, as a file that reads back to the same; without secrets."""
    lines = []
    for key, action in keys_of(parser).items():
        value = getattr(args, action.dest)
        if is_secret(key, value):
            lines.append(f"# {key}: set, and not shown")
            continue
        dumped = yaml.safe_dump([_plain(value)], default_flow_style=True, width=4096).strip()[1:-1]
        lines.append(f"{key}: {dumped}" + (f"  # {_choices(action)}" if action.choices else ""))
    return "\n".join(lines) + "\n"


def is_secret(key: str, value: object) -> bool:
    """Whether a value may be a secret; the path of a file is not one."""
    if isinstance(value, Path) or not value:
        return False
    if isinstance(value, str) and "://" in value:
        return "@" in value or "password" in urlsplit(value).query
    return isinstance(value, str) and key not in NOT_SECRET and any(word in key for word in SECRET_WORDS)


def _entries(text: str) -> Iterator[tuple[str, Any, int]]:
    """Key, value and line of each entry."""
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return
            if not isinstance(root, yaml.MappingNode):
                raise ConfigError("must be `key: value` lines")
            for key, value in root.value:
                name = key.value if isinstance(key, yaml.ScalarNode) else "(not a word)"
                yield str(name), loader.construct_object(value, deep=True), key.start_mark.line + 1
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        raise ConfigError(f"{where}no YAML: {getattr(error, 'problem', None) or error}") from None
    except RecursionError:
        raise ConfigError("no YAML that can be read: it is too deep") from None


def _value(action: argparse.Action, value: Any) -> Any:
    """The value as the flag would parse it. Raises `ValueError`, `TypeError` or `ArgumentTypeError`."""
    if _is_switch(action):
        if not isinstance(value, bool):
            raise ValueError(f"must be true or false, got {value!r}")
        return value
    kind: Any = action.type
    if isinstance(value, list):
        if isinstance(action.default, tuple) and all(isinstance(one, str) and "," not in one for one in value):
            value = ",".join(value)
        else:
            raise ValueError(f"must be {_wanted(action)}, got a list")
    wants_number = kind in (int, float)
    allowed: tuple[type, ...] = {int: (int,), float: (int, float)}.get(
        kind, (str,) if kind in (None, Path) else (str, int)
    )
    if isinstance(value, bool) or not isinstance(value, allowed):
        quote = "" if wants_number else " (quote it?)"
        raise ValueError(f"must be {_wanted(action)}, got {value!r}{quote}")
    made = value if kind is None else kind(str(value))
    if action.choices is not None and made not in action.choices:
        raise ValueError(f"must be one of {_choices(action)}, got {value!r}")
    return made


def _wanted(action: argparse.Action) -> str:
    names: Mapping[Any, str] = {int: "a whole number", float: "a number", Path: "a path", None: "text"}
    return names.get(action.type, "a list of names" if isinstance(action.default, tuple) else "text like 512M")


def _plain(value: Any) -> Any:
    """A value as YAML has it."""
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _choices(action: argparse.Action) -> str:
    return ", ".join(map(str, action.choices or ()))


def _is_switch(action: argparse.Action) -> bool:
    return action.nargs == 0


def _key(action: argparse.Action) -> str:
    longest = next((name for name in action.option_strings if name.startswith("--")), action.dest)
    return longest.removeprefix("--").replace("-", "_")


def parse_with_file(root: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses; where a command took `--config`, again with the file's values as that command's defaults.

    Such a command has its own parser as the default `parser`. Raises `ConfigError`.
    """
    args = root.parse_args(argv)
    file: Path | None = getattr(args, "config", None)
    if file is not None:
        apply_file(args.parser, file)
        args = root.parse_args(argv)
    return args
