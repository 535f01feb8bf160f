"""What to send: sessions of one turn or several, of token ids or of text. Pure; knows no server and no clock."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loadtest.exchange import Content
from loadtest.lengths import sharegpt_lengths
from loadtest.prompts import PrefixShape, Prompt, random_prompts, shared_prefix_prompts
from loadtest.wording import Wording


@dataclass(frozen=True)
class Turn:
    """The user's next message, after the conversation so far; and how long the answer may be, in tokens."""

    content: Content
    output_tokens: int
    think_s: float = 0.0  # since the answer before


@dataclass(frozen=True)
class Session:
    """A conversation; most have one turn."""

    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Dice:
    """Randomness by purpose, so that, say, another rate does not change the lengths.

    `seed` fixes arrivals, lengths and who misbehaves. The content of prompts depends on `nonce` too, which is new for
    each run; otherwise a cache would still have them.
    """

    seed: int
    nonce: str

    def of(self, purpose: str) -> random.Random:
        return random.Random(f"baton-bench/{self.seed}/{purpose}")

    def of_content(self, purpose: str) -> random.Random:
        return random.Random(f"baton-bench/{self.seed}/{purpose}/{self.nonce}")

    def step(self, number: int) -> Dice:
        """The dice for a further run of the same command, which must not hit the prompts of the run before."""
        return replace(self, nonce=f"{self.nonce}/{number}")


@dataclass(frozen=True)
class Shape:
    """Lengths in tokens. `prefix` is for shared prefixes; `turns` and `think_s` for conversations."""

    input_len: int
    output_len: int
    prefix: PrefixShape | None = None
    turns: int = 1
    think_s: float = 0.0


def random_sessions(count: int, shape: Shape, vocab_size: int, dice: Dice) -> list[Session]:
    """Prompts that share nothing, or a prefix. Raises ValueError for a prefix that is not shorter than the prompt."""
    rng = dice.of_content("prompts")
    if shape.prefix is None:
        prompts = random_prompts(count, shape.input_len, vocab_size, rng)
    else:
        prompts = shared_prefix_prompts(count, shape.input_len, shape.prefix, vocab_size, rng)
    return [Session((Turn(prompt, shape.output_len),)) for prompt in prompts]


def conversations(count: int, shape: Shape, vocab_size: int, dice: Dice) -> list[Session]:
    """Each of `shape.turns` turns, which add `input_len` tokens each; pauses between them are exponential."""
    thinking = dice.of("think")
    prompts = random_prompts(count * shape.turns, shape.input_len, vocab_size, dice.of_content("prompts"))

    def session(first: int) -> Session:
        return Session(
            tuple(
                Turn(
                    prompts[first + i],
                    shape.output_len,
                    thinking.expovariate(1.0 / shape.think_s) if shape.think_s and i else 0.0,
                )
                for i in range(shape.turns)
            )
        )

    return [session(i * shape.turns) for i in range(count)]


def sharegpt_like(count: int, max_model_len: int, vocab_size: int, dice: Dice) -> list[Session]:
    """Random prompts with lengths as in ShareGPT. Raises ValueError where the model takes too little for that."""
    lengths = sharegpt_lengths(count, max_model_len or 2048, dice.of("lengths"))
    rng = dice.of_content("prompts")
    return [Session((Turn(random_prompts(1, num_in, vocab_size, rng)[0], num_out),)) for num_in, num_out in lengths]


def from_prompts(prompts: Sequence[Prompt], output_tokens: Sequence[int]) -> list[Session]:
    """Sessions of one turn each."""
    return [Session((Turn(prompt, num_out),)) for prompt, num_out in zip(prompts, output_tokens, strict=True)]


def as_text(sessions: Sequence[Session], wording: Wording) -> list[Session]:
    """The same with text where there were token ids."""
    return [
        Session(tuple(replace(turn, content=_text(turn.content, wording)) for turn in session.turns))
        for session in sessions
    ]


def _text(content: Content, wording: Wording) -> str:
    return content if isinstance(content, str) else wording.text(content)
