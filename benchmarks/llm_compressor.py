"""What the benchmarks against llm-compressor share: a random Llama, its text, the peer's call."""

from __future__ import annotations

import argparse
import contextlib
import io
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor

from prunelens.model import LanguageModel, as_language_model
from prunelens.prune import calibrate
from side_by_side import options

VOCABULARY = 8192


def pruning_options(
    doc: str | None, *, blocks: int, width: int, windows: int, context: int
) -> argparse.ArgumentParser:
    """`options`, and the sizes of model and calibration."""
    parser = options(doc)
    parser.set_defaults(rounds=3)
    parser.add_argument("--blocks", type=int, default=blocks)
    parser.add_argument("--width", type=int, default=width)
    parser.add_argument("--windows", type=int, default=windows)
    parser.add_argument("--context", type=int, default=context)
    return parser


def random_llama(chosen: argparse.Namespace, folder: str, dtype: torch.dtype) -> LanguageModel:
    """A random Llama of usual proportions; the peer asks `folder` for its config."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=chosen.width,
        intermediate_size=chosen.width * 11 // 4,
        num_hidden_layers=chosen.blocks,
        num_attention_heads=chosen.width // 64,
        num_key_value_heads=chosen.width // 128,
        max_position_embeddings=chosen.context,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(dtype).to(chosen.device)
    config.save_pretrained(folder)
    model.config.name_or_path = folder
    return as_language_model(model, label="random Llama")


def random_windows(chosen: argparse.Namespace) -> Tensor:
    """Token ids [windows, context]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, (chosen.windows, chosen.context), generator=generator)


def check_peer(script: str) -> None:
    """Silence the peer's log. Ends the program where llm-compressor is not installed."""
    try:
        import llmcompressor
        from loguru import logger  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise SystemExit(f"{script}: needs an environment with llmcompressor==0.14") from None
    assert llmcompressor is not None
    logger.remove()


def prune_like_peer(lm: LanguageModel, tokens: Tensor, modifier: Any, pipeline: str) -> None:
    """llm-compressor's oneshot, with windows that are tokenised already.

    Args:
        lm: pruned in place.
        tokens: calibration windows; batches are as large as prunelens's.
        modifier: what it is to do; see `ignore`.
        pipeline: `basic` or `sequential`.
    """
    from llmcompressor import oneshot

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, unk_token=""))
    unused = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    rows: Any = [{"input_ids": window} for window in tokens]
    batch = max(1, calibrate.BATCH_TOKENS // tokens.shape[1])
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        oneshot(
            model=lm.model,
            processor=unused,
            dataset=torch.utils.data.DataLoader(rows, batch_size=batch),
            recipe=modifier,
            pipeline=pipeline,
            num_calibration_samples=len(tokens),
        )
