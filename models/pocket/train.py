"""Train the pocket model: a byte-level Llama of 4.8 million parameters that writes like the Python manual.

The corpus is the reStructuredText source of the Python 3.11 documentation, as Debian's `python3.11-doc` ships it.
Schedules run on elapsed time, not on steps, so that `--minutes 40` ends in 40 minutes on any machine.

    apt-get install python3.11-doc
    python models/pocket/train.py --minutes 40

Writes config.json, model.safetensors (bf16), the tokenizer, and loss.csv beside this file.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
DOCS = Path("/usr/share/doc/python3.11/html/_sources")
PARTS = ("tutorial", "howto", "faq", "reference", "library", "whatsnew", "using", "extending", "installing")
BOS, EOS = 256, 257
BATCH_TOKENS = 4096
SEQ_LEN, LONG_SEQ_LEN = 512, 2048  # the last quarter of the time trains on the long windows
LONG_FROM = 0.75
HELD_OUT_DOCUMENTS = 12

CONFIG = LlamaConfig(
    vocab_size=258,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    tie_word_embeddings=True,
    bos_token_id=BOS,
    eos_token_id=EOS,
)

# A user's turn is set as a heading of the manual, which is how that text asks its questions.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ message['content'] }}\n{{ '-' * message['content'] | length }}\n\n"
    "{% else %}{{ message['content'] }}\n\n{% endif %}{% endfor %}"
)


def clean(text: str) -> str:
    """Strip the markup of reStructuredText that a byte model would spend its capacity on."""
    text = re.sub(r":[a-z:]+:`~?!?([^`<]*?)(?: <[^`>]*>)?`", r"\1", text)  # roles keep their text
    text = re.sub(r"`([^`<]+) <[^`>]*>`_+", r"\1", text)  # links keep their title
    text = re.sub(
        r"^\.\. (?:index|module|_|sectionauthor|moduleauthor|highlight|versionadded).*\n", "", text, flags=re.M
    )
    text = text.replace("``", "`")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def load_corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (train, held-out) as 1-D int64 token ids; every 40th document is held out, 12 at most."""
    if not DOCS.is_dir():
        raise SystemExit(f"{DOCS} is missing: apt-get install python3.11-doc")
    documents = [path for part in PARTS for path in sorted((DOCS / part).rglob("*.txt"))]
    held_out = set(documents[::40][:HELD_OUT_DOCUMENTS])
    train: list[int] = []
    test: list[int] = []
    for path in documents:
        ids = [BOS, *clean(path.read_text(encoding="utf-8")).encode(), EOS]
        (test if path in held_out else train).extend(ids)
    return torch.tensor(train), torch.tensor(test)


def next_batch(data: torch.Tensor, progress: float, generator: torch.Generator) -> torch.Tensor:
    """Returns int64 [B, T] windows at random offsets, B * T = BATCH_TOKENS."""
    seq_len = LONG_SEQ_LEN if progress >= LONG_FROM else SEQ_LEN
    starts = torch.randint(len(data) - seq_len, (BATCH_TOKENS // seq_len,), generator=generator)
    return torch.stack([data[s : s + seq_len] for s in starts.tolist()])


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-byte cross entropy, nats. ids: int64 [B, T]."""
    with torch.autocast("cpu" if ids.device.type == "cpu" else "cuda", dtype=torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, data: torch.Tensor, device: str) -> float:
    """Bits per byte over the held-out text, in windows of LONG_SEQ_LEN."""
    model.eval()
    windows = data[: len(data) // LONG_SEQ_LEN * LONG_SEQ_LEN].view(-1, LONG_SEQ_LEN)[:16]
    losses = [loss_of(model, rows.to(device)).item() for rows in windows.split(4)]
    model.train()
    return sum(losses) / len(losses) / math.log(2)


def schedule(progress: float) -> float:
    """Learning-rate factor: 2% warm-up, flat, then linear to zero over the last 60%."""
    return min(1.0, progress / 0.02) * min(1.0, (1.0 - progress) / 0.6)


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(minutes: float, device: str, seed: int = 0) -> tuple[LlamaForCausalLM, list[tuple]]:
    """Returns the trained model and the curve: (elapsed s, step, train loss in nats, held-out bits per byte)."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    train_data, test_data = load_corpus()
    print(f"corpus: {len(train_data) / 1e6:.1f} MB to train, {len(test_data) / 1e3:.0f} kB held out", flush=True)
    model = LlamaForCausalLM(CONFIG).to(device)
    print(f"parameters: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M", flush=True)
    step_loss = torch.compile(loss_of, dynamic=False)
    optimizers = make_optimizers(model)
    base_lrs = [group["lr"] for opt in optimizers for group in opt.param_groups]
    curve: list[tuple] = []
    smoothed, step, start, last_eval = 0.0, 0, None, -1e9
    while True:
        elapsed = time.monotonic() - start if start is not None else 0.0
        progress = min(1.0, elapsed / (minutes * 60))
        if elapsed - last_eval > minutes * 60 / 20 or progress >= 1.0:
            last_eval = elapsed
            bits = evaluate(model, test_data, device)
            curve.append((round(elapsed), step, round(smoothed, 4), round(bits, 4)))
            print(
                f"{elapsed:6.0f} s  step {step:5d}  train {smoothed:.3f} nats  held out {bits:.3f} bits/byte",
                flush=True,
            )
            save(model, curve)
        if progress >= 1.0:
            return model, curve
        for lr, group in zip(base_lrs, (g for o in optimizers for g in o.param_groups), strict=True):
            group["lr"] = lr * schedule(max(progress, 1e-3))
        loss = step_loss(model, next_batch(train_data, progress, generator).to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        smoothed = loss.item() if step == 0 else 0.95 * smoothed + 0.05 * loss.item()
        step += 1
        start = start or time.monotonic()  # the first step compiles and is not counted


def make_tokenizer() -> Tokenizer:
    """256 byte symbols and no merges: one token a byte, with a beginning and an end token."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_of = {symbol: byte for byte, symbol in enumerate(_bytes_to_unicode())}
    tokenizer = Tokenizer(models.BPE(vocab={s: byte_of[s] for s in symbols}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|begin|>", special=True), AddedToken("<|end|>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", BOS)])
    return tokenizer


def _bytes_to_unicode() -> list[str]:
    """GPT-2's printable symbol for each of the 256 bytes, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(extra)) for b in range(256)]


def save(model: LlamaForCausalLM, curve: list[tuple]) -> None:
    from safetensors.torch import save_file

    state = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    state.pop("lm_head.weight", None)  # tied to the embedding
    save_file(state, HERE / "model.safetensors", metadata={"format": "pt"})
    config = CONFIG.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (HERE / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    make_tokenizer().save(str(HERE / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG.max_position_embeddings,
    }
    (HERE / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    with (HERE / "loss.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("elapsed_s", "step", "train_nats", "heldout_bits_per_byte"), *curve])


@torch.no_grad()
def sample(model: LlamaForCausalLM, prompt: str, num_tokens: int = 400) -> str:
    ids = torch.tensor([[BOS, *prompt.encode()]], device=model.device)
    out = model.generate(ids, max_new_tokens=num_tokens, do_sample=True, temperature=0.7, top_p=0.9)
    return bytes(t for t in out[0].tolist() if t < 256).decode("utf-8", "replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    model, _ = train(args.minutes, args.device)
    model.eval()
    print(sample(model, "What is a generator?\n--------------------\n\n"))


if __name__ == "__main__":
    main()
