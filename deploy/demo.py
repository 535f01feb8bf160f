"""`make demo`: a whole cluster on this machine, real requests through it, and proof that its text is right.

Starts 2 prefill and 2 decode nodes, one store and one router, streams some answers to the terminal, compares each with
that of a single engine, and stops everything. Any difference, and anything left behind, is a failure.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from batonpb import common_pb2, inference_pb2
from deploy import oracle
from deploy.client import Client
from deploy.config import ClusterConfig, DeployError
from deploy.launch import Cluster
from deploy.processes import is_running
from router.tokenizer import Tokenizer

POCKET = Path(__file__).resolve().parent.parent / "models" / "pocket"
MAX_TOKENS = 96

Turn = tuple[str, str]  # (role, content)

LONG_PREFIX = """\
:mod:`cache` --- A cache that is shared between threads
========================================================

This module provides a simple interface to a cache.  A cache maps keys to values.  It has a maximum size, and when it
is full, the entry that was used least recently is removed.  The functions in this module are safe to call from more
than one thread at a time.  If a key is not found in the cache, a :exc:`KeyError` exception is raised, unless a default
value is given as the second argument.

The module defines the following functions:

"""


@dataclass(frozen=True)
class Shot:
    """One request to send. `prompt` is text, or the turns of a conversation. Without a `seed` it is greedy."""

    name: str
    prompt: str | tuple[Turn, ...]
    seed: int = 0

    @property
    def sampling(self) -> dict[str, float | int]:
        """By the names that the protocol and the engine share."""
        if not self.seed:
            return {"temperature": 0.0, "max_tokens": MAX_TOKENS}
        return {"temperature": 0.7, "top_p": 0.9, "seed": self.seed, "max_tokens": MAX_TOKENS}


@dataclass(frozen=True)
class Outcome:
    """What came back for it."""

    shot: Shot
    text: str
    token_ids: list[int]
    usage: inference_pb2.Usage
    timeline: inference_pb2.Timeline


class Terminal:
    """Shows answers as they are made: one alone as it comes, several at once line by line, each after its name."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()

    def title(self, words: str) -> None:
        self._console.rule(f"[bold]{words}", align="left")

    @contextmanager
    def stream(self, shot: Shot, alone: bool) -> Iterator[list[str]]:
        """Text appended to the list that it gives is shown by `flush`; the rest of it when the block ends."""
        prompt = shot.prompt if isinstance(shot.prompt, str) else shot.prompt[-1][1]
        with self._lock:
            self._line(shot.name, "... " + prompt[-100:].strip().replace("\n", " "), "dim")
        pieces: list[str] = []
        yield pieces
        self.flush(shot, pieces, alone, last=True)

    def flush(self, shot: Shot, pieces: list[str], alone: bool, last: bool = False) -> None:
        """Writes what is whole by now and keeps the rest in `pieces`."""
        text = "".join(pieces)
        pieces.clear()
        with self._lock:
            if alone:
                self._console.print(text, end="\n" if last else "", markup=False, highlight=False, soft_wrap=True)
                return
            *lines, rest = text.split("\n")
            for line in [*lines, rest] if last else lines:
                self._line(shot.name, line)
        if not last:
            pieces.append(rest)

    def _line(self, name: str, line: str, style: str = "") -> None:
        self._console.print(f"[cyan]{name:>9}[/] │ ", end="", highlight=False)
        self._console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def send(client: Client, shot: Shot, terminal: Terminal, alone: bool) -> Outcome:
    """Sends one request and shows its answer as it comes. Raises `RequestFailed`."""
    responses = []
    with terminal.stream(shot, alone) as pieces:
        for response in client.stream(request_of(shot)):
            responses.append(response)
            pieces.append(response.text)
            terminal.flush(shot, pieces, alone)
    return Outcome(
        shot=shot,
        text="".join(response.text for response in responses),
        token_ids=[token.token_id for response in responses for token in response.tokens],
        usage=responses[-1].usage,
        timeline=responses[-1].timeline,
    )


def request_of(shot: Shot) -> inference_pb2.GenerateRequest:
    sampling = common_pb2.SamplingParams(**shot.sampling)  # type: ignore[arg-type]
    request = inference_pb2.GenerateRequest(request_id=shot.name.replace(" ", "-"), sampling=sampling)
    if isinstance(shot.prompt, str):
        request.text = shot.prompt
    else:
        for role, content in shot.prompt:
            request.chat.messages.add(role=role, content=content)
    return request


def play(client: Client, terminal: Terminal) -> list[Outcome]:
    """All the requests of the demo, in turn and at once."""

    def alone(shot: Shot) -> Outcome:
        return send(client, shot, terminal, alone=True)

    def together(shots: Sequence[Shot]) -> list[Outcome]:
        with ThreadPoolExecutor(len(shots)) as pool:
            return list(pool.map(lambda shot: send(client, shot, terminal, alone=False), shots))

    terminal.title("one prompt")
    outcomes = [alone(Shot("plain", "A list is a mutable sequence.  It can be changed with the methods", seed=7))]
    terminal.title("two turns of a conversation: the second finds the first in the cache")
    question = ("user", "What is a generator?")
    outcomes.append(alone(Shot("turn 1", (question,), seed=1)))
    answer = ("assistant", outcomes[-1].text)
    outcomes.append(alone(Shot("turn 2", (question, answer, ("user", "When is it called?")), seed=2)))
    terminal.title("several prompts that share a long prefix: one alone, then four at once")
    outcomes.append(alone(Shot("prefix 1", LONG_PREFIX + ".. function:: get(key, default=None)\n\n   Return ", seed=3)))
    names = ("put(key, value)", "remove(key)", "clear()", "size()")
    shots = [
        Shot(f"prefix {n}", f"{LONG_PREFIX}.. function:: {name}\n\n   ", seed=n) for n, name in enumerate(names, 2)
    ]
    outcomes += together(shots)
    terminal.title("unlike prompts at once, greedy and sampled")
    unlike = {
        "class": ".. class:: Queue(maxsize=0)\n\n   Constructor for a",
        "changed": ".. versionchanged:: 3.8\n   The *timeout* argument",
        "example": "For example, to read a file line by line::\n\n   >>> with open(",
        "note": ".. note::\n\n   This function is not",
    }
    outcomes += together([Shot(name, prompt, seed=n % 2 * n) for n, (name, prompt) in enumerate(unlike.items())])
    return outcomes


def differences(outcomes: Sequence[Outcome], tokenizer: Tokenizer, model_dir: Path) -> list[str]:
    """Runs every request on a single engine; says where the cluster's tokens or text differ."""
    shots = [outcome.shot for outcome in outcomes]
    questions = [oracle.Question(prompt_ids(shot, tokenizer), shot.sampling) for shot in shots]
    found = []
    for outcome, token_ids in zip(outcomes, oracle.ask(model_dir, questions), strict=True):
        text = tokenizer.decode(token_ids)
        if outcome.token_ids != token_ids or outcome.text != text:
            found.append(f"{outcome.shot.name}:\n  cluster: {outcome.text!r}\n  alone:   {text!r}")
    return found


def prompt_ids(shot: Shot, tokenizer: Tokenizer) -> list[int]:
    if isinstance(shot.prompt, str):
        return tokenizer.encode(shot.prompt)
    chat = [{"role": role, "content": content} for role, content in shot.prompt]
    return tokenizer.encode(tokenizer.render(chat), is_template=True)


def table_of(outcomes: Sequence[Outcome]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("request", "prefill\non", "decode\non"):
        table.add_column(name, no_wrap=True)
    for name in ("prompt", "local\nhit", "store\nhit", "decode\nhit", "out", "TTFT\nms", "TPOT\nms"):
        table.add_column(name, justify="right")
    for outcome in outcomes:
        usage, timeline = outcome.usage, outcome.timeline
        table.add_row(
            outcome.shot.name,
            timeline.prefill_node or "-",
            timeline.decode_node,
            *(str(tokens) for tokens in (usage.prompt_tokens, usage.local_hit_tokens, usage.store_hit_tokens)),
            *(str(tokens) for tokens in (timeline.decode_store_hit_tokens, usage.output_tokens)),
            f"{timeline.first_token_s * 1e3:.1f}",
            f"{timeline.tpot_s * 1e3:.1f}",
        )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.demo", description="A whole cluster, shown and checked.")
    parser.add_argument("--model", type=Path, default=POCKET, help="a Hugging Face folder (default: the pocket model)")
    console = Console()
    try:
        problems = run(parser.parse_args().model, console)
    except DeployError as error:
        problems = [str(error)]
    except KeyboardInterrupt:
        problems = ["interrupted"]
    for problem in problems:
        console.print(f"DEMO FAILED: {problem}", style="bold red", markup=False, highlight=False)
    return 1 if problems else 0


def run(model_dir: Path, console: Console) -> list[str]:
    """The demo from start to end; returns the problems, as text."""
    begin, interrupt = time.monotonic(), threading.Event()
    config = ClusterConfig(model_dir=model_dir, prefill=2, decode=2, dtype="float32")
    cluster = Cluster(config, lambda line: console.print(line, style="dim", highlight=False), interrupt)
    _on_signals(lambda *_: interrupt.set())  # a start ends in order
    cluster.start()
    pids: dict[str, int] = {}
    try:
        _on_signals(signal.default_int_handler)  # requests just stop
        pids = cluster.pids
        console.print(f"ready at {cluster.routers[0]} after {time.monotonic() - begin:.1f} s", highlight=False)
        with Client(cluster.routers[0]) as client:
            outcomes = play(client, Terminal(console))
        console.print(table_of(outcomes))
        problems = check(outcomes, model_dir)
        if not problems:
            console.print(f"all {len(outcomes)} texts are what one engine alone gives", style="green", highlight=False)
    finally:
        _on_signals(signal.SIG_IGN)  # a stop is not stopped
        left = cluster.stop()
    left += [f"{name} (pid {pid})" for name, pid in pids.items() if is_running(pid)]
    if not left:
        console.print("all is stopped, nothing is left behind", style="green")
    return problems + [f"left behind: {thing}" for thing in left]


def check(outcomes: Sequence[Outcome], model_dir: Path) -> list[str]:
    """What is wrong with what came back."""
    problems = differences(outcomes, Tokenizer(model_dir), model_dir)
    if not any(outcome.timeline.prefill_node and outcome.timeline.decode_store_hit_tokens for outcome in outcomes):
        problems.append("no request went from a prefill node through the store to a decode node")
    return problems


def _on_signals(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
