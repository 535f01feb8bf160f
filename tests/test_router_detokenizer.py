"""Incremental text: its pieces are the full decoding, in whole characters, at once; stop strings in any chunking."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from conftest import POCKET
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from router.detokenizer import ByteDetokenizer, StopFinder, TextStream, WindowDetokenizer, detokenizer
from router.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def pocket() -> Tokenizer:
    return Tokenizer(POCKET)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level BPE whose tokens are pieces of characters and several characters; one added token is not special."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["naïve 😀😀😎 ∑∑∫ größer größte"] * 9, trainer)
    backend.add_tokens(["<tool call>", "Ünder"])
    folder = tmp_path_factory.mktemp("merged")
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A SentencePiece-like tokenizer (Llama 2, Mistral): `▁` for spaces, unknown characters as one token a byte."""
    words = ["▁", "▁the", "▁cat", "s", "é", "a", "▁a", "."]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {word: len(vocab) + n for n, word in enumerate(words)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": n, "content": content, **flags} for n, content in enumerate(["<unk>", "<s>", "</s>"])]
    model = {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True, "unk_token": "<unk>"}
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    data = {"version": "1.0", "added_tokens": added, "decoder": {"type": "Sequence", "decoders": steps}, "model": model}
    folder = tmp_path_factory.mktemp("fallback")
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return Tokenizer(folder)


def pieces(tokenizer: Tokenizer, token_ids: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    words = detokenizer(tokenizer, prompt)
    return [*(words.feed(token_id) for token_id in token_ids), words.flush()]


TRICKY = st.sampled_from(
    [0x41, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xFF, 0xC0, 0xED, 0xA0, 0xF4, 0x90]
)


@settings(max_examples=500)
@given(st.lists(st.integers(0, 257) | TRICKY, max_size=40))
@example([0xF0, 0x9F])
def test_any_bytes_give_the_full_decoding(pocket: Tokenizer, token_ids: list[int]) -> None:
    assert isinstance(detokenizer(pocket, ()), ByteDetokenizer)
    assert "".join(pieces(pocket, token_ids)) == pocket.decode(token_ids)


@settings(max_examples=500)
@given(st.lists(st.integers(0, 330), max_size=30))
def test_any_tokens_of_a_merged_vocabulary(merged: Tokenizer, token_ids: list[int]) -> None:
    assert isinstance(detokenizer(merged, ()), ByteDetokenizer)
    assert "".join(pieces(merged, token_ids)) == merged.decode(token_ids)


@given(st.text(max_size=20))
def test_characters_are_whole_and_come_at_once(pocket: Tokenizer, text: str) -> None:
    """Each character appears with its last byte, and nothing before."""
    words = detokenizer(pocket, ())
    for char in text:
        *head, last = char.encode()
        assert [words.feed(byte) for byte in head] == [""] * len(head)
        assert words.feed(last) == char
    assert words.flush() == ""


@settings(max_examples=300)
@given(st.text(alphabet="the cats. é😀∑", max_size=20), st.text(alphabet="the a", max_size=5))
@example(" 😀", "")
def test_byte_fallback_goes_on_from_the_prompt(fallback: Tokenizer, text: str, prompt_text: str) -> None:
    prompt, token_ids = ids_of(prompt_text), ids_of(text)
    assert isinstance(detokenizer(fallback, prompt), WindowDetokenizer)
    parts = pieces(fallback, token_ids, prompt)
    # The space at the very beginning of a text is dropped, by this family of tokenizers; one behind a prompt is not.
    assert "".join(parts) == fallback.decode([*prompt, *token_ids])[len(fallback.decode(prompt)) :]
    assert not any("\ufffd" in part for part in parts)
    assert parts[-1] == "", "whole characters are not held back"


def ids_of(text: str) -> list[int]:
    """Without merges, encoding would be one token a character; this uses the word tokens too."""
    words = {"the": 260, "cat": 261, "s": 262, "é": 263, "a": 264, ".": 266}
    token_ids: list[int] = []
    for part in text.replace(" ", "\0 \0").replace("the", "\0the\0").split("\0"):
        if part == " ":
            token_ids.append(259)
        elif part in words and part != "the":
            token_ids.append(words[part])
        else:
            token_ids += [3 + byte for byte in part.encode()]
    return token_ids


@given(st.lists(st.integers(3, 258), max_size=30))
@example([35, 131, 3, 3])
def test_byte_fallback_never_holds_much(fallback: Tokenizer, token_ids: list[int]) -> None:
    """Bytes that are no UTF-8 come out as replacement characters after four tokens at the latest."""
    words = detokenizer(fallback, ())
    words.feed(3 + ord("a"))  # a space at the very beginning is no text
    silent = 0
    for token_id in token_ids:
        silent = 0 if words.feed(token_id) else silent + 1
        assert silent < 4
    words.flush()


def test_special_tokens_are_no_text(pocket: Tokenizer, fallback: Tokenizer) -> None:
    assert pieces(pocket, [0xF0, 0x9F, 257, 0x98, 256, 0x80]) == ["", "", "", "", "", "😀", ""]
    assert "".join(pieces(fallback, [2, 260, 1, 2, 261, 2])) == "the cat"


def by_character(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: the first character at which some stop string is complete ends the text before that string."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(max_examples=500)
@given(
    st.lists(st.text(alphabet="abc", max_size=4), max_size=8),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
)
@example(["abcd", ""], ["abcd", "bc"])
def test_stop_strings_do_not_depend_on_the_chunks(chunks: list[str], stops: list[str]) -> None:
    finder, text, stopped = StopFinder(stops), "", False
    for chunk in chunks:
        certain, stopped = finder.feed(chunk, True)
        text += certain
        if stopped:
            break
    assert (text if stopped else text + finder.flush(), stopped) == by_character("".join(chunks), stops)


@given(
    st.text(alphabet="abcx", max_size=12),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    finder, out, stopped = StopFinder(stops), "", False
    for char in text:
        certain, stopped = finder.feed(char, True)
        out += certain
        if stopped:
            return
    held = text[len(out) :]
    assert not held or any(stop.startswith(held) for stop in stops)


def stream(
    tokenizer: Tokenizer,
    stops: Sequence[str] = (),
    end_ids: Sequence[int] = (),
    min_tokens: int = 0,
    keeps_stop: bool = False,
) -> TextStream:
    return TextStream(detokenizer(tokenizer, ()), stops, frozenset(end_ids), min_tokens, keeps_stop)


def test_text_ends_before_the_stop_string(pocket: Tokenizer) -> None:
    text = stream(pocket, stops=["###", "\n\n"])
    parts = [text.feed(byte) for byte in b"one#two##"]
    assert "".join(parts) == "one#two" and not text.is_stopped
    assert text.feed(ord("#")) == "" and text.is_stopped
    assert text.finish(ended_by_token=False) == ""


def test_what_ends_a_text_may_be_shown(pocket: Tokenizer) -> None:
    """The stop string that is complete first and nothing behind it, or the text of a stop token; the end has none."""
    text = stream(pocket, stops=["##!!", "##!"], keeps_stop=True)
    assert "".join(text.feed(byte) for byte in b"one##") == "one" and not text.is_stopped
    assert text.feed(ord("!")) == "##!" and text.is_stopped and text.finish(ended_by_token=False) == ""
    by_token = stream(pocket, end_ids=[ord("."), 257], keeps_stop=True)
    assert "".join(by_token.feed(byte) for byte in b"a.") + by_token.finish(ended_by_token=True) == "a."
    at_the_end = stream(pocket, end_ids=[257], keeps_stop=True)
    assert at_the_end.feed(ord("a")) + at_the_end.feed(257) + at_the_end.finish(ended_by_token=True) == "a"


def test_what_was_held_back_comes_at_the_end(pocket: Tokenizer) -> None:
    text = stream(pocket, stops=["###"])
    assert "".join(text.feed(byte) for byte in b"a##") == "a"
    assert text.finish(ended_by_token=False) == "##"
    half = stream(pocket)
    assert half.feed(0xF0) + half.feed(0x9F) == ""
    assert half.finish(ended_by_token=False) == "\ufffd"


def test_stop_strings_count_from_min_tokens_on(pocket: Tokenizer) -> None:
    text = stream(pocket, stops=["ab"], min_tokens=5)
    out = [text.feed(byte) for byte in b"abxa"]
    assert not text.is_stopped
    out.append(text.feed(ord("b")))
    assert text.is_stopped and "".join(out) == "abx"


def test_the_end_token_is_no_text(pocket: Tokenizer) -> None:
    """`.` is a stop token here: it is text if and only if the request went on behind it."""
    text = stream(pocket, end_ids=[ord(".")])
    assert [text.feed(byte) for byte in b"a.b."] == ["a", "", ".b", ""]
    assert text.finish(ended_by_token=True) == ""
    at_length = stream(pocket, end_ids=[ord(".")])
    assert [at_length.feed(byte) for byte in b"a."] == ["a", ""]
    assert at_length.finish(ended_by_token=False) == "."


def test_the_pocket_files_are_byte_level(tmp_path: Path) -> None:
    data = json.loads((POCKET / "tokenizer.json").read_text())
    data["decoder"] = {"type": "Sequence", "decoders": [data["decoder"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert Tokenizer(tmp_path).bytes_of is not None
