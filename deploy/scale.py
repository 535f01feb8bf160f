"""`baton scale`: asks the serving process for other numbers of nodes, over two files in its state folder.

The folder is its owner's alone, and the lock beside the files tells whether anybody still serves, so nothing more is
needed: one file asks, the other one answers, each put there in one go. Who asks holds a lock on the folder meanwhile: a
second one waits for its turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.config import ClusterConfig, ConfigError, DeployError
from deploy.state import StateDir, default_state_dir

logger = logging.getLogger(__name__)

POLL_S = 0.1
ROLES = ("prefill", "decode", "both")


@dataclass(frozen=True)
class Request:
    """What is asked for; None leaves a role as it is."""

    request_id: str
    prefill: int | None = None
    decode: int | None = None
    both: int | None = None

    def apply(self, config: ClusterConfig) -> ClusterConfig:
        """Raises `ConfigError`."""
        asked = {role: count for role in ROLES if (count := getattr(self, role)) is not None}
        return dataclasses.replace(config, **asked)


class Mailbox:
    """The two files of one state folder."""

    def __init__(self, folder: Path) -> None:
        self._asked, self._answered = folder / "scale.json", folder / "scaled.json"
        self._unsaid: dict[str, object] = {}  # an answer that found the disk full

    def ask(self, request: Request, is_served: Callable[[], bool]) -> list[str]:
        """What was done, in words. Raises `DeployError` for what could not be, or where nobody serves any more."""
        with _turn(self._asked.parent):
            return self._ask(request, is_served)

    def _ask(self, request: Request, is_served: Callable[[], bool]) -> list[str]:
        try:
            _put(self._asked, dataclasses.asdict(request))
            while True:
                answer = _get(self._answered)
                if answer.get("request_id") == request.request_id:
                    break
                if not is_served():
                    raise DeployError("the cluster went down before it was done")
                time.sleep(POLL_S)
        except OSError as problem:
            raise DeployError(f"--state-dir {self._asked.parent}: cannot be written to: {problem.strerror}") from None
        finally:
            self.clear()
        if error := answer.get("error"):
            raise DeployError(str(error))
        lines = answer.get("lines")
        return [str(line) for line in lines] if isinstance(lines, list) else []

    def clear(self) -> None:
        """Also for a cluster that starts: an asker that was killed may have left what this one is not to do."""
        for file in (self._asked, self._answered):
            file.unlink(missing_ok=True)

    def serve(self, do: Callable[[Request], list[str]]) -> None:
        """Does what was asked for since the last call, if anything was, and answers. Where the disk is full, a later
        call answers."""
        is_new = not self._unsaid
        if is_new:
            fields = self._take()
            if fields is None:
                return
            self._unsaid = _done(fields, do)
        try:
            _put(self._answered, self._unsaid)
            self._unsaid = {}
        except OSError as error:
            if is_new:
                logger.warning("event=scale_unanswered file=%s error=%s", self._answered, error)

    def _take(self) -> dict[str, object] | None:
        taken = self._asked.with_suffix(".taken")
        try:
            self._asked.replace(taken)  # in one go: what is asked for in between would be lost
            fields = _get(taken)
            taken.unlink()
        except OSError:  # nobody asked
            return None
        return fields


def _done(fields: dict[str, object], do: Callable[[Request], list[str]]) -> dict[str, object]:
    """The answer to what was asked for, once that is done."""
    lines: list[str] = []
    error = ""
    try:
        lines = do(Request(**fields))  # type: ignore[arg-type]
    except TypeError:
        error = "the cluster that is up is of another version"
    except DeployError as problem:
        error = str(problem)
    except Exception as problem:  # the cluster goes on
        logger.exception("event=scale_failed")
        error = f"{type(problem).__name__}: {problem}"
    return {"request_id": fields.get("request_id"), "lines": lines, "error": error}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for role in ROLES:
        words = "for both legs" if role == "both" else f"of role {role}"
        parser.add_argument(f"--{role}", type=int, metavar="N", help=f"nodes {words} that there are to be")
    parser.add_argument(
        "--state-dir", type=Path, default=default_state_dir(), metavar="DIR", help="that of `baton serve`"
    )


def run(args: argparse.Namespace) -> int:
    state_dir = StateDir(args.state_dir)
    if not state_dir.running().routers:
        raise DeployError("the cluster is still starting")
    request = Request(secrets.token_hex(8), args.prefill, args.decode, args.both)
    if request.prefill is request.decode is request.both is None:
        raise ConfigError("baton scale: say how many nodes, as in --prefill 2 --decode 4")
    for line in Mailbox(args.state_dir).ask(request, state_dir.alive):
        print(line)
    return 0


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """The kernel's lock, which ends with the process that holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _put(file: Path, fields: dict[str, object]) -> None:
    part = file.with_suffix(".part")
    part.write_text(json.dumps(fields))
    part.replace(file)


def _get(file: Path) -> dict[str, object]:
    try:
        fields = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}
