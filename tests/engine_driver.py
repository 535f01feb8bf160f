"""What the engine's tests share: random tiny models, a driver that checks the books, and a store in a dict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import FinishReason, OutputToken, Request, SamplingParams
from kvstore.blocks import BlockHash

BLOCK = 8  # tokens
VOCAB = 199
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
QWEN_WINDOWS = {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 11}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True, **QWEN_WINDOWS}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
}


def make_model(architecture: str, folder: Path) -> PreTrainedModel:
    """A random model in fp32, saved to `folder`; one key head for two query heads, windows that cut blocks."""
    model_class, config_class, options = MODELS[architecture]
    torch.manual_seed(7)
    model = model_class(config_class(**SIZES, **options)).to(torch.float32).eval()
    model.save_pretrained(folder)
    return model


def make_engine(folder: Path, **options: object) -> Engine:
    defaults = {
        "dtype": "float32",
        "block_size": BLOCK,
        "num_blocks": 64,
        "max_num_batched_tokens": 64,
        "max_model_len": 256,
    }
    return Engine.from_pretrained(folder, EngineConfig(**{**defaults, **options}))  # type: ignore[arg-type]


def make_prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, VOCAB, (length,), generator=generator).tolist()


def make_request(
    engine: Engine,
    request_id: str,
    tokens: Sequence[int],
    params: SamplingParams = GREEDY,
    num_prompt_tokens: int | None = None,
    handoff_after: int | None = None,
) -> Request:
    num_prompt_tokens = len(tokens) if num_prompt_tokens is None else num_prompt_tokens
    root = engine.layout.root()
    return Request(request_id, list(tokens), num_prompt_tokens, params, root, BLOCK, handoff_after)


@dataclass
class Store:
    """Published blocks by hash, as the shared store would hold them."""

    blocks: dict[BlockHash, bytes] = field(default_factory=dict)

    def payloads(self, hashes: Iterable[BlockHash]) -> list[StoredBlock]:
        """The leading run of blocks that are here."""
        run: list[StoredBlock] = []
        for block_hash in hashes:
            if block_hash not in self.blocks:
                break
            run.append(StoredBlock(memoryview(self.blocks[block_hash])))
        return run


@dataclass
class StoredBlock:
    view: memoryview
    valid: bool = True

    def is_valid(self) -> bool:
        return self.valid


@dataclass
class Run:
    """What came out of the requests that were driven to their ends."""

    tokens: dict[str, list[OutputToken]] = field(default_factory=dict)
    reasons: dict[str, FinishReason] = field(default_factory=dict)
    published: list[tuple[str, BlockHash]] = field(default_factory=list)
    num_steps: int = 0

    def ids(self, request_id: str) -> list[int]:
        return [token.token_id for token in self.tokens[request_id]]


def drive(engine: Engine, requests: Sequence[Request] = (), store: Store | None = None) -> Run:
    """Adds the requests, steps until nothing is left to do, publishes full blocks, checks the books after each step."""
    run = Run()
    for request in requests:
        engine.add(request)
    while engine.has_work():
        outputs = engine.step()
        assert outputs, "work, but an empty step"
        run.num_steps += 1
        for output in outputs:
            run.tokens.setdefault(output.request_id, []).extend(output.tokens)
            if output.finish_reason is not None:
                run.reasons[output.request_id] = output.finish_reason
            block_ids = [block.block_id for block in output.full_blocks]
            buffers = [bytearray(engine.layout.block_bytes) for _ in block_ids]
            engine.export_blocks(block_ids, [memoryview(buffer) for buffer in buffers])
            for block, buffer in zip(output.full_blocks, buffers, strict=True):
                run.published.append((output.request_id, block.block_hash))
                if store is not None:
                    store.blocks.setdefault(block.block_hash, bytes(buffer))
        engine.check_integrity()
        for output in outputs:
            engine.unpin([block.block_id for block in output.full_blocks])
        engine.check_integrity()
    return run


def assert_all_free(engine: Engine) -> None:
    engine.check_integrity()
    load = engine.load()
    assert load.free_blocks == load.total_blocks
    assert load.num_running == load.num_waiting == load.queued_prefill_tokens == 0
