"""Wanda: prunelens against llm-compressor, on one model, the same windows and the same machine.

`python benchmarks/wanda.py`, in an environment with llmcompressor==0.14, prunes a random Llama to
50 % per row. Two things are compared, each with its like, and each begins with the dense weights:

- norms of the dense model, one pass: `calibration: dense` against llm-compressor's `basic`;
- block by block: `calibration: sequential` against its `sequential`, its usual choice.

Both sides get batches of the same size. Five sparsities from one calibration are compared with one.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor

from prunelens.config import PruningConfig
from prunelens.model import LanguageModel, as_language_model
from prunelens.prune import as_matrix, calibrate, input_norms, prunable_matrices, prune_model
from side_by_side import Mark, Times, options, publish, take_turns

SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7)


def main() -> None:
    """All contenders in turn."""
    parser = options(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--context", type=int, default=512)
    chosen = parser.parse_args()
    prune_like_peer = _peer()
    torch.set_num_threads(chosen.threads)
    folder = tempfile.TemporaryDirectory()
    lm, tokens = _model(chosen, folder.name), _tokens(chosen)
    dense = {name: value.clone() for name, value in lm.model.state_dict().items()}

    def from_dense(work: Callable[[], object]) -> Callable[[], object]:
        def call() -> object:
            lm.model.load_state_dict(dense)
            return work()

        return call

    works: dict[str, Callable[[], object]] = {
        "prunelens dense": lambda: _prune(lm, tokens, "dense"),
        "llmcompressor basic": lambda: prune_like_peer(lm, tokens, "basic"),
        "prunelens sequential": lambda: _prune(lm, tokens, "sequential"),
        "llmcompressor sequential": lambda: prune_like_peer(lm, tokens, "sequential"),
        "prunelens dense, five sparsities": lambda: _five(lm, tokens, dense),
    }
    contenders = {name: from_dense(work) for name, work in works.items()}
    agreement = _agreement(lm, contenders)
    assert agreement["dense"] > 0.99 and agreement["sequential"] > 0.99, agreement
    times = take_turns(contenders, rounds=chosen.rounds, device=chosen.device)
    publish(
        "wanda",
        settings={key: value for key, value in vars(chosen).items() if key != "save"},
        results={"milliseconds": times, "equal_mask_entries": agreement},
        marks=_marks(times),
        save=chosen.save,
    )


def _marks(times: dict[str, Times]) -> list[Mark]:
    def ratio(above: str, below: str) -> float:
        return round(times[above].median / times[below].median, 2)

    dense, five = "prunelens dense", "prunelens dense, five sparsities"
    per_block = ("llmcompressor sequential", "prunelens sequential")
    return [
        Mark(5, "llm-compressor's time over prunelens's, norms of the dense model", 1.5,
             "at least", ratio("llmcompressor basic", dense)),
        Mark(5, "llm-compressor's time over prunelens's, block by block", 1.5,
             "at least", ratio(*per_block)),
        Mark(5, "five sparsities over one, prunelens, norms of the dense model", 1.5,
             "at most", ratio(five, dense)),
    ]  # fmt: skip


def _prune(lm: LanguageModel, tokens: Tensor, calibration: str, sparsity: float = 0.5) -> None:
    prune_model(lm, _config(calibration, sparsity), calibration=tokens, with_masks=False)


def _five(lm: LanguageModel, tokens: Tensor, dense: dict[str, Tensor]) -> None:
    """Every sparsity from the dense weights and the same norms."""
    norms = input_norms(lm, tokens)
    for number, sparsity in enumerate(SPARSITIES):
        if number:
            lm.model.load_state_dict(dense)
        prune_model(lm, _config("dense", sparsity), input_norms=norms, with_masks=False)


def _config(calibration: str, sparsity: float) -> PruningConfig:
    settings = {"criterion": "wanda", "scope": "row", "sparsity": sparsity}
    return PruningConfig.model_validate({**settings, "calibration": calibration})


def _agreement(lm: LanguageModel, contenders: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The share of weights that both sides keep or both drop."""
    pairs = {
        "dense": ("prunelens dense", "llmcompressor basic"),
        "sequential": ("prunelens sequential", "llmcompressor sequential"),
    }
    shares = {}
    for pair, names in pairs.items():
        masks = []
        for name in names:
            contenders[name]()
            masks.append({n: as_matrix(m) != 0 for n, m in prunable_matrices(lm).items()})
        ours, theirs = masks
        assert all(torch.equal(ours[n].sum(1), mask.sum(1)) for n, mask in theirs.items())
        equal = sum(int((ours[name] == mask).sum()) for name, mask in theirs.items())
        shares[pair] = equal / sum(mask.numel() for mask in theirs.values())
    return shares


def _peer() -> Callable[[LanguageModel, Tensor, str], None]:
    """llm-compressor's oneshot, with windows that are tokenised already."""
    try:
        from llmcompressor import oneshot
        from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
        from loguru import logger  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise SystemExit("wanda.py: needs an environment with llmcompressor==0.14") from None
    logger.remove()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, unk_token=""))
    unused = transformers.PreTrainedTokenizerFast(tokenizer_object=words)

    def prune(lm: LanguageModel, tokens: Tensor, pipeline: str) -> None:
        rows: Any = [{"input_ids": window} for window in tokens]
        batch = max(1, calibrate.BATCH_TOKENS // tokens.shape[1])
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            oneshot(
                model=lm.model,
                processor=unused,
                dataset=torch.utils.data.DataLoader(rows, batch_size=batch),
                recipe=WandaPruningModifier(sparsity=0.5, ignore=["re:.*lm_head"]),
                pipeline=pipeline,
                num_calibration_samples=len(tokens),
            )

    return prune


def _model(chosen: Any, folder: str) -> LanguageModel:
    """A random Llama of usual proportions, in bfloat16; the peer asks the folder for its config."""
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=chosen.width,
        intermediate_size=chosen.width * 11 // 4,
        num_hidden_layers=chosen.blocks,
        num_attention_heads=chosen.width // 64,
        num_key_value_heads=chosen.width // 128,
        max_position_embeddings=chosen.context,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).bfloat16().to(chosen.device)
    config.save_pretrained(folder)
    model.config.name_or_path = folder
    return as_language_model(model, label="random Llama")


def _tokens(chosen: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(8192, (chosen.windows, chosen.context), generator=generator)


if __name__ == "__main__":
    main()
