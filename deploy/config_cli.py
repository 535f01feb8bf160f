"""`baton config check` and `baton config show`: what a file asks for, without starting anything."""

from __future__ import annotations

import argparse
from pathlib import Path

from deploy.config_file import apply_file, shown
from deploy.serve_arguments import add_serve_arguments, config_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(required=True, metavar="WHAT")
    words = "check a file as `baton serve --config` would, its model folder included, and start nothing"
    one = what.add_parser("check", help=words, description=words[0].upper() + words[1:] + ".")
    one.add_argument("file", type=Path, metavar="FILE", help="YAML")
    one.set_defaults(command=check)
    words = "print all keys with the values that a file gives them, or their defaults"
    one = what.add_parser("show", help=words, description=words[0].upper() + words[1:] + "; no secrets.")
    one.add_argument("file", type=Path, nargs="?", metavar="FILE", help="YAML; default: none, so all defaults")
    one.set_defaults(command=show)


def check(args: argparse.Namespace) -> int:
    """Raises `DeployError`: everything that the launcher finds before it starts something."""
    config = config_from(_parsed(args.file)[1])
    from deploy.launch import Cluster  # ray

    Cluster(config).check()
    print(f"{args.file}: well ({config.model_name}: {', '.join(config.roles)})")
    return 0


def show(args: argparse.Namespace) -> int:
    print(shown(*_parsed(args.file)), end="")
    return 0


def _parsed(file: Path | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="baton serve")
    add_serve_arguments(parser)
    if file is not None:
        apply_file(parser, file)
    return parser, parser.parse_args([])
