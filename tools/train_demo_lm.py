"""Train the small Llama that ships with prunelens, from Python sources alone.

    .venv/bin/python tools/train_demo_lm.py --export src/prunelens/data/model

Text: the standard library of this interpreter (90 % of its modules; `prunelens.corpus` says
which), joined by the sources of the packages installed beside it. Everything is resumable: run the
same command again and it goes on from the last checkpoint. `--export` writes
the finished model, its tokenizer and its card to `src/prunelens/data/model/`.
"""

from __future__ import annotations

import argparse
import collections
import email.message
import functools
import hashlib
import importlib.metadata
import json
import lzma
import math
import pathlib
import platform
import sysconfig
import time
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prunelens.text import stdlib_documents, stdlib_held_out

VOCABULARY = 4096
BOS = "<|bos|>"
WINDOW = 512  # tokens, BOS included
TOKENS_PER_STEP = 8192
STDLIB_SHARE, STDLIB_SHARE_END = 0.25, 0.5  # of the windows: at first, and in the last fifth
PACKAGE_BYTES = 10_000_000  # at most so much of one package: transformers repeats itself
SHARED_LINES = 15  # a package file with more lines out of held-out modules is left out
MUON_LR, ADAM_LR, WEIGHT_DECAY, WARMUP = 0.02, 4e-3, 0.01, 100
CHECKPOINT_SECONDS = 300

console = Console()


def main() -> None:
    """Prepare the text once, train to the end, then report and (with --export) write the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/demo-lm"))
    parser.add_argument("--tokens", type=float, default=1.9e7, help="training tokens in all")
    parser.add_argument("--export", type=pathlib.Path, help="folder for the finished model")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    arguments.work.mkdir(parents=True, exist_ok=True)
    texts = read_texts()
    tokenizer = train_tokenizer(texts, arguments.work / "tokenizer.json")
    streams = tokenise(texts, tokenizer, arguments.work)
    model = train(streams, arguments.work, total_steps=int(arguments.tokens) // TOKENS_PER_STEP)
    card = evaluate(model, texts, streams, arguments.work)
    console.print(card, markup=False)
    if arguments.export:
        export(model, arguments.work, card, arguments.export)


# --- text ---------------------------------------------------------------------------------------


def read_texts() -> dict[str, list[str]]:
    """`stdlib` and `packages` to train on, `held_out` to judge by; whole files, in name order."""
    documents = stdlib_documents()
    held_out = [text for name, text in documents if stdlib_held_out(name)]
    return {
        "stdlib": [text for name, text in documents if not stdlib_held_out(name)],
        "packages": package_texts(held_out),
        "held_out": held_out,
    }


def package_texts(held_out: list[str]) -> list[str]:
    """Sources of the installed packages, without duplicates and without copies of held-out text."""
    forbidden = {line for text in held_out for line in long_lines(text)}
    site = pathlib.Path(sysconfig.get_paths()["purelib"])
    by_package: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
    seen: set[str] = set()
    for path in sorted(site.rglob("*.py")):
        parts = path.relative_to(site).parts
        if any(p in {"test", "tests", "testing"} for p in parts) or parts[0] == "prunelens":
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        digest = hashlib.sha256(text.encode()).hexdigest()
        if len(text) < 200 or digest in seen:
            continue
        seen.add(digest)
        if len(long_lines(text) & forbidden) <= SHARED_LINES:
            by_package[parts[0]].append((digest, text))
    kept: list[str] = []
    for package in sorted(by_package):
        used = 0
        for _, text in sorted(by_package[package]):
            used += len(text)
            if used <= PACKAGE_BYTES:
                kept.append(text)
    return kept


def long_lines(text: str) -> set[str]:
    """Stripped lines long enough that two files rarely share one by chance."""
    return {s for line in text.splitlines() if len(s := line.strip()) >= 30}


def train_tokenizer(texts: dict[str, list[str]], path: pathlib.Path) -> Tokenizer:
    """A byte-level BPE whose pieces keep a newline together with the indentation that follows."""
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    pieces = r"\s*[\r\n]+[ \t]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts["stdlib"], trainer)
    tokenizer.save(str(path))
    return tokenizer


def tokenise(
    texts: dict[str, list[str]], tokenizer: Tokenizer, work: pathlib.Path
) -> dict[str, Tensor]:
    """Each text source as one stream of token ids, a BOS between documents; cached on disk."""
    path = work / "tokens.safetensors"
    if not path.exists():
        streams = {}
        for name, documents in texts.items():
            order = np.random.default_rng(0).permutation(len(documents))
            encoded = tokenizer.encode_batch([documents[i] for i in order])
            ids = [np.array([0, *e.ids], dtype=np.int16) for e in encoded]
            streams[name] = torch.from_numpy(np.concatenate(ids))
        save_file(streams, path)
    streams = load_file(path)
    console.print({name: f"{len(s) / 1e6:.2f} M tokens" for name, s in streams.items()})
    return streams


# --- training -----------------------------------------------------------------------------------


def build_model() -> LlamaForCausalLM:
    """6 blocks, d_model 128, 2 heads, tied embeddings: about 1.9 M parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        attn_implementation="blockwise",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # the two matrices that write to the residual stream start smaller
        for block in model.model.layers:
            for matrix in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
                matrix.mul_((2 * config.num_hidden_layers) ** -0.5)
    return model


def blockwise_attention(
    _module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    scaling: float = 1.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention from plain matrix products, 256 queries at a time.

    Compiled, with 2 heads of 64, its forward and backward take half the time of PyTorch's
    fused CPU kernel here. Shapes: [batch, heads, tokens, head width].
    """
    tokens, outs = query.shape[2], []
    for start in range(0, tokens, 256):
        end = min(start + 256, tokens)
        scores = query[:, :, start:end] @ key[:, :, :end].transpose(-1, -2) * scaling
        future = torch.arange(end)[None, :] > torch.arange(start, end)[:, None]
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        outs.append(weights.to(value.dtype) @ value[:, :, :end])
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS["blockwise"] = blockwise_attention


def train(streams: dict[str, Tensor], work: pathlib.Path, *, total_steps: int) -> LlamaForCausalLM:
    """Muon on the blocks' matrices, Adam on the rest, linear decay; resumes from `work`."""
    model = build_model()
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(hidden, lr=MUON_LR, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(others, lr=ADAM_LR, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
    ]
    base_rates = [MUON_LR, ADAM_LR]
    step, seconds = resume(model, optimizers, work)
    body = torch.compile(model.model, dynamic=False)
    saved = started = time.monotonic()
    losses: list[float] = []
    while step < total_steps:
        share = STDLIB_SHARE if step < 0.8 * total_steps else STDLIB_SHARE_END
        batch = draw_batch(streams, share, step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = body(input_ids=batch, use_cache=False).last_hidden_state
        states = states[:, :-1].reshape(-1, states.shape[-1]).bfloat16()
        table = model.model.embed_tokens.weight.bfloat16()
        loss = FusedCrossEntropy.apply(states, table, batch[:, 1:].reshape(-1))
        loss.backward()
        factor = min(1.0, (step + 1) / WARMUP) * (1 - step / total_steps)
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        step += 1
        now = time.monotonic()
        if step % 50 == 0:
            speed = len(losses) * TOKENS_PER_STEP / (now - started)
            recent = float(np.mean(losses[-50:]))
            console.print(f"step {step}/{total_steps} loss {recent:.3f} {speed:.0f} tokens/s")
        if now - saved > CHECKPOINT_SECONDS or step == total_steps:
            save(model, optimizers, work, step, seconds + now - started)
            saved = time.monotonic()
    return model


def draw_batch(streams: dict[str, Tensor], share: float, step: int) -> Tensor:
    """Random windows, each opened by a BOS in place of its first token; a function of the step."""
    rng = np.random.default_rng((1, step))
    rows = []
    for _ in range(TOKENS_PER_STEP // WINDOW):
        stream = streams["stdlib" if rng.random() < share else "packages"]
        start = int(rng.integers(len(stream) - WINDOW))
        rows.append(stream[start : start + WINDOW])
    batch = torch.stack(rows).long()
    batch[:, 0] = 0
    return batch


class FusedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `states @ table.T`, its gradient made chunk by chunk in cache.

    Twice as fast here as materialising 8,192 x 4,096 logits in float32.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        """Loss in nats per token; the gradients are computed here and kept for `backward`."""
        gradient = torch.empty_like(states)
        table_gradient = torch.zeros(table.shape, dtype=torch.float32)
        total = torch.zeros(())
        for rows in range(0, len(states), 1024):
            part = states[rows : rows + 1024]
            logits, loss = softmax_gradient(part @ table.T, targets[rows : rows + 1024])
            total += loss
            gradient[rows : rows + 1024] = logits @ table
            table_gradient += logits.T @ part
        ctx.save_for_backward(gradient, table_gradient)
        ctx.count = len(states)
        return total / len(states)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        """Scale the gradients that `forward` made."""
        gradient, table_gradient = ctx.saved_tensors
        scale = upstream / ctx.count
        return gradient * scale, (table_gradient * scale).bfloat16(), None


@functools.partial(torch.compile, dynamic=True)
def softmax_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """d(sum of losses)/d(logits) in bfloat16, and the sum of the losses."""
    exact = logits.float()
    top = exact.amax(-1, keepdim=True)
    powers = (exact - top).exp()
    total = powers.sum(-1, keepdim=True)
    loss = (total.log() + top - exact.gather(1, targets[:, None])).sum()
    hit = torch.arange(logits.shape[1])[None, :] == targets[:, None]
    return (powers / total - hit.float()).to(logits.dtype), loss


def resume(
    model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], work: pathlib.Path
) -> tuple[int, float]:
    """Load the last checkpoint if there is one; the step to go on from and the seconds spent."""
    path = work / "checkpoint.safetensors"
    if not path.exists():
        return 0, 0.0
    tensors = load_file(path)
    state = json.loads((work / "checkpoint.json").read_text())
    model.load_state_dict(
        {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}, strict=False
    )
    for number, optimizer in enumerate(optimizers):
        plain = optimizer.state_dict()
        for key, value in tensors.items():
            if key.startswith(f"opt{number}."):
                _, index, name = key.split(".")
                plain["state"].setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(plain)
    console.print(f"resumed at step {state['step']}")
    return state["step"], state["seconds"]


def save(
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    work: pathlib.Path,
    step: int,
    seconds: float,
) -> None:
    """Write a checkpoint beside the old one, then replace it."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for number, optimizer in enumerate(optimizers):
        for index, entry in optimizer.state_dict()["state"].items():
            for name, value in entry.items():
                tensors[f"opt{number}.{index}.{name}"] = value.contiguous()
    save_file(tensors, work / "checkpoint.tmp")
    (work / "checkpoint.tmp").replace(work / "checkpoint.safetensors")
    (work / "checkpoint.json").write_text(json.dumps({"step": step, "seconds": seconds}))


# --- judging and shipping -----------------------------------------------------------------------


@torch.no_grad()
def held_out_nats(model: LlamaForCausalLM, stream: Tensor) -> float:
    """Mean nats per token over non-overlapping windows, each with a BOS of its own as context."""
    body = stream[: len(stream) // (WINDOW - 1) * (WINDOW - 1)].view(-1, WINDOW - 1).long()
    windows = torch.cat([torch.zeros(len(body), 1, dtype=torch.long), body], dim=1)
    total = 0.0
    for rows in windows.split(TOKENS_PER_STEP // WINDOW):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        targets = rows[:, 1:].reshape(-1)
        total += F.cross_entropy(logits.reshape(-1, VOCABULARY), targets, reduction="sum").item()
    return total / body.numel()


def evaluate(
    model: LlamaForCausalLM,
    texts: dict[str, list[str]],
    streams: dict[str, Tensor],
    work: pathlib.Path,
) -> str:
    """The model card: what it was trained on, how, and how well it predicts held-out modules."""
    state = json.loads((work / "checkpoint.json").read_text())
    held_out = "".join(texts["held_out"]).encode()
    nats = held_out_nats(model, streams["held_out"])
    bits = nats * len(streams["held_out"]) / math.log(2) / len(held_out)
    xz_bits = 8 * len(lzma.compress(held_out, preset=9)) / len(held_out)
    sizes = {name: sum(len(t.encode()) for t in part) / 1e6 for name, part in texts.items()}
    weights = sum(p.numel() for p in model.parameters())
    return f"""---
license: apache-2.0
language: code
library_name: transformers
---
# The bundled demo model

A Llama of {weights / 1e6:.2f} M parameters (6 blocks, d_model 128, 2 heads, tied embeddings, windows of up to
{WINDOW} tokens) with its own byte-level BPE of {VOCABULARY} tokens. It predicts Python source. It exists so
that prunelens runs anywhere; it is no use for anything else.

| | |
|---|---|
| held-out loss | {nats:.4f} nats per token |
| held-out bits per byte | **{bits:.4f}** |
| `xz -9` on the same text | {xz_bits:.4f} bits per byte |
| steps | {state["step"]} of {TOKENS_PER_STEP} tokens ({state["step"] * TOKENS_PER_STEP / 1e6:.1f} M tokens) |
| wall clock | {state["seconds"] / 60:.0f} minutes on {torch.get_num_threads()} CPU threads, shared with other work |
| made by | `tools/train_demo_lm.py`, CPython {platform.python_version()}, torch {torch.__version__} |

**Training text.** {sizes["stdlib"]:.1f} MB of the CPython standard library (90 % of its modules, chosen by a
hash of the module's name; no tests, `encodings` or `pydoc_data`) and {sizes["packages"]:.1f} MB of Python sources of the
packages that prunelens depends on, at most {PACKAGE_BYTES / 1e6:.0f} MB of each. Package files with more than {SHARED_LINES} long
lines in common with held-out modules were left out.
**Held-out text.** The other 10 % of the modules: {sizes["held_out"]:.2f} MB, {len(streams["held_out"]) / 1e3:.0f} K tokens, scored in
non-overlapping windows of {WINDOW} tokens, each with a BOS as context; the marks between modules count as tokens.
**Optimiser.** Muon (lr {MUON_LR}) on the blocks' matrices, Adam (lr {ADAM_LR}) on the rest, linear decay to 0,
bfloat16 products; {STDLIB_SHARE:.0%} of the windows from the standard library, {STDLIB_SHARE_END:.0%} in the last fifth.
**Licences of the training text.** CPython: PSF-2.0. Packages: {licences()}.
"""


def licences() -> str:
    """Each installed package with the licence that its metadata names."""
    found = []
    for distribution in importlib.metadata.distributions():
        about = cast(email.message.Message, distribution.metadata)
        name = about.get("Name", "?")
        classifiers = [
            c.split(" :: ")[-1] for c in about.get_all("Classifier") or [] if "License" in c
        ]
        named = (
            about.get("License-Expression") or "/".join(classifiers) or about.get("License") or "?"
        )
        if name != "prunelens":
            found.append(f"{name} ({named.splitlines()[0][:60]})")
    return ", ".join(sorted(set(found), key=str.lower))


def export(model: LlamaForCausalLM, work: pathlib.Path, card: str, folder: pathlib.Path) -> None:
    """Write the model in 16 bits with its tokenizer and card, as `AutoModelForCausalLM` loads it."""
    plain = LlamaConfig(**{**model.config.to_dict(), "attn_implementation": None})
    shipped = LlamaForCausalLM(plain)
    shipped.load_state_dict(model.state_dict())
    shipped.to(torch.float16).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(work / "tokenizer.json"), bos_token=BOS, model_max_length=WINDOW
    )
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    console.print(f"written to {folder}")


if __name__ == "__main__":
    main()
