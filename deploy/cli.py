"""The `baton` command: a failure is one line on standard error; Ctrl-C is not an error."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

FAILED, INTERRUPTED, NOBODY_READS = 1, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # as in `baton kv ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the exit
        return NOBODY_READS


def _run(argv: Sequence[str] | None) -> int:
    from deploy import commands  # takes half a second, in which Ctrl-C may come
    from deploy.config import DeployError
    from deploy.config_file import parse_with_file

    try:
        args = parse_with_file(commands.parser(), argv)
        command: commands.Command = args.command
        return command(args)
    except DeployError as error:
        print(f"baton: error: {error}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
