"""A model on several ranks gives the tokens of the same model on one, however it is cut, and no rank holds it whole."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import free_port
from engine_driver import BLOCK, MODELS, SIZES, make_engine, make_prompt
from rank_process import logprobs_of
from safetensors.torch import load_file, save_file

from engine.attention import ForwardBatch, SequenceSpan
from engine.config import EngineConfig, ModelConfig
from engine.errors import UnsupportedModel
from engine.parallel import Alone
from engine.pieces import pieces_of
from engine.ranks import split
from engine.request import SamplingParams
from engine.shard import Shard
from engine.weights import load_model

PROMPTS = [make_prompt(length, seed=3) for length in (1, BLOCK, 3 * BLOCK + 5, 90)]
GREEDY = {"temperature": 0.0, "max_tokens": 10}
SAMPLED = {"temperature": 1.1, "top_p": 0.9, "seed": 5, "max_tokens": 10, "logprobs": 2}
WIDTHS = {"tp2": (2, 1), "tp4": (4, 1), "pp2": (1, 2), "tp2-pp2": (2, 2)}
OPTIONS = {
    "dtype": "float32",
    "block_size": BLOCK,
    "num_blocks": 64,
    "max_num_batched_tokens": 48,
    "max_model_len": 256,
}


Found = tuple[list[list[list[int]]], list[float]]  # tokens by parameters and prompt, logprobs


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in sorted(MODELS)}
    for name, folder in made.items():
        model_class, config_class, options = MODELS[name]
        torch.manual_seed(7)
        sizes = SIZES | {"num_hidden_layers": 4}
        model_class(config_class(**sizes, **options)).to(torch.float32).eval().save_pretrained(folder)
    return made


@pytest.fixture(params=sorted(MODELS))
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


class Ranks:
    """Processes for models on several ranks, the leader first; they do one job after another."""

    def __init__(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        self.processes = processes

    def send(self, folder: Path, tp: int, pp: int, waits: bool = False, **fields: Any) -> None:
        """A job, which begins once the leader says that it is ready; where it `waits`, at a line to the leader."""
        pieces = {"kv_layer_pieces": pp, "kv_head_pieces": min(tp, SIZES["num_key_value_heads"])}
        job = {"folder": str(folder), "tp": tp, "pp": pp, "address": f"127.0.0.1:{free_port()}", "waits": waits}
        work = {"engine": OPTIONS | pieces, "prompts": PROMPTS, "params": [GREEDY, SAMPLED]}
        for process in self.processes[: tp * pp]:
            self.say(process, json.dumps(job | work | fields))
        if "folders" not in fields:
            assert self.hear() == "READY\n"

    def say(self, process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None
        print(line, file=process.stdin, flush=True)

    def hear(self) -> str:
        """The leader's next line; "" when it has ended."""
        leader = self.processes[0]
        assert leader.stdout is not None
        return leader.stdout.readline()


@contextmanager
def running_ranks(number: int) -> Iterator[Ranks]:
    program = str(Path(__file__).with_name("rank_process.py"))
    processes = [
        subprocess.Popen([sys.executable, program, str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for rank in range(number)
    ]
    try:
        yield Ranks(processes)
    finally:
        for process in processes:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()  # the end of its jobs
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with running_ranks(4) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> dict[Path, Found]:
    """What one rank puts out for each model."""
    found = {}
    for folder in folders.values():
        engine = make_engine(folder, max_num_batched_tokens=48)
        tokens = [engine.generate(PROMPTS, SamplingParams(**params)) for params in (GREEDY, SAMPLED)]
        found[folder] = tokens, logprobs_of(engine, PROMPTS[-1])
    return found


@pytest.mark.parametrize("width", sorted(WIDTHS))
def test_tokens_are_those_of_one_rank(ranks: Ranks, alone: dict[Path, Found], folder: Path, width: str) -> None:
    """And so are the logprobs of a prompt, in chunks and stages."""
    ranks.send(folder, *WIDTHS[width], scores=True)
    tokens, logprobs = json.loads(ranks.hear())
    expected_tokens, expected_logprobs = alone[folder]
    assert tokens == expected_tokens
    assert len(logprobs) == len(PROMPTS[-1]) - 1 and logprobs == pytest.approx(expected_logprobs, abs=1e-4)


@pytest.mark.parametrize("width", ["tp2", "pp2"])
def test_tokens_are_the_same_where_requests_are_preempted(ranks: Ranks, folders: dict[str, Path], width: str) -> None:
    """Blocks change hands while stages are behind: what one still reads is another's next."""
    folder, params = folders["llama"], {"temperature": 0.0, "max_tokens": 40}
    few = {"num_blocks": 150 // BLOCK + 1, "max_num_batched_tokens": 48}
    roomy, tight = make_engine(folder, max_num_batched_tokens=48), make_engine(folder, **few)
    expected = roomy.generate(PROMPTS, SamplingParams(**params))
    assert tight.generate(PROMPTS, SamplingParams(**params)) == expected
    assert tight._scheduler._num_preempted > 0
    pieces = {"kv_layer_pieces": 2, "kv_head_pieces": 2}
    ranks.send(folder, *WIDTHS[width], engine=OPTIONS | few | pieces, params=[params])
    assert json.loads(ranks.hear())[0] == [expected]


def test_who_loses_a_rank_ends(folders: dict[str, Path]) -> None:
    with running_ranks(2) as ranks:
        leader, follower = ranks.processes
        ranks.send(folders["llama"], 2, 1, waits=True)
        follower.send_signal(signal.SIGKILL)
        ranks.say(leader, "go on")
        assert ranks.hear() == ""
        assert leader.wait(60) != 0


def test_ranks_of_different_weights_do_not_begin(folders: dict[str, Path], tmp_path: Path) -> None:
    """The same sizes and names: nothing but the numbers differs, as on a machine where nobody copied the new files."""
    other = Path(shutil.copytree(folders["llama"], tmp_path / "other"))
    tensors = {name: tensor + 0.01 for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with running_ranks(2) as ranks:
        ranks.send(folders["llama"], 2, 1, folders=[str(folders["llama"]), str(other)])
        for process in ranks.processes:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("ranks [1] have other weights than rank 0")
            assert process.wait(60) == 1


def test_no_rank_holds_more_than_its_part(folder: Path) -> None:
    config = ModelConfig.from_pretrained(folder)

    def size(shard: Shard) -> int:
        parallel = Alone()
        parallel.shard = shard
        model = load_model(folder, config, torch.float32, torch.device("cpu"), parallel)
        return sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)

    whole = size(Shard())
    for tp, pp in ((2, 1), (1, 2), (2, 2)):
        parts = [size(Shard.of_rank(rank, tp, pp)) for rank in range(tp * pp)]
        tied = config.vocab_size * config.hidden_size if config.tie_word_embeddings and pp > 1 else 0
        padding = (-config.vocab_size % tp) * config.hidden_size * 2
        assert whole + tied <= sum(parts) <= whole + tied + padding
        assert max(parts) < whole * 0.75


@pytest.mark.parametrize(
    ("tp", "pp", "problem"),
    [
        (3, 1, "num_attention_heads"),
        (1, 3, "pipeline_parallel_size 3 does not divide num_hidden_layers"),
        (8, 1, "num_attention_heads"),
    ],
)
def test_what_does_not_divide_is_refused(folder: Path, tp: int, pp: int, problem: str) -> None:
    with pytest.raises(UnsupportedModel, match=problem):
        Shard(tp_size=tp, pp_size=pp).part(ModelConfig.from_pretrained(folder))


def test_pieces_of_all_ranks_cover_a_block_once(folder: Path) -> None:
    config = ModelConfig.from_pretrained(folder)  # 4 layers, 2 key heads
    engine = EngineConfig(kv_layer_pieces=2, kv_head_pieces=2)
    for tp, pp in ((1, 1), (2, 1), (1, 2), (2, 2), (4, 2)):
        numbers = [pieces_of(config, engine, Shard.of_rank(rank, tp, pp)).numbers for rank in range(tp * pp)]
        copies = max(1, tp // config.num_kv_heads)
        assert sorted(number for part in numbers for number in part) == sorted([*range(4)] * copies)
    with pytest.raises(UnsupportedModel, match="kv_head_pieces of 1 is too coarse"):
        pieces_of(config, EngineConfig(), Shard(tp_size=2))


@pytest.mark.parametrize("num_parts", [1, 2, 3, 4, 50])
def test_a_batch_in_pieces_has_each_row_once(num_parts: int) -> None:
    lengths, contexts = (1, 7, 3, 1), (9, 7, 30, 1)
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    table = torch.arange(4)
    spans = tuple(SequenceSpan(*item, table) for item in zip(starts, lengths, contexts, strict=True))
    rows = torch.arange(sum(lengths))
    batch = ForwardBatch(rows, rows + 100, rows + 200, spans, torch.tensor([0, 7, 11]))
    parts = split(batch, num_parts)
    assert len(parts) == min(num_parts, len(rows))
    assert torch.equal(torch.cat([part.token_ids for part in parts]), rows)
    assert torch.equal(torch.cat([part.slot_mapping for part in parts]), rows + 200)
    wanted = [part.token_ids[part.logits_indices] for part in parts]
    assert torch.equal(torch.cat(wanted), batch.logits_indices)
    seen = []
    for part in parts:
        assert sum(span.query_len for span in part.spans) == len(part.token_ids)
        for span in part.spans:
            for offset in range(span.query_len):
                row = int(part.token_ids[span.query_start + offset])
                seen.append((row, span.context_len - span.query_len + offset))
    truth = [
        (start + offset, context - length + offset)
        for start, length, context in zip(starts, lengths, contexts, strict=True)
        for offset in range(length)
    ]
    assert seen == truth
