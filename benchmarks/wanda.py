"""Wanda: prunelens against llm-compressor, on one model, the same windows and the same machine.

`python benchmarks/wanda.py`, in an environment with llmcompressor==0.14, prunes a random Llama to
50 % per row. Two things are compared, each with its like, and each begins with the dense weights:

- norms of the dense model, one pass: `calibration: dense` against llm-compressor's `basic`;
- block by block: `calibration: sequential` against its `sequential`, its usual choice.

Both sides get batches of the same size. Five sparsities from one calibration are compared with one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch
from torch import Tensor

from llm_compressor import (
    check_peer,
    prune_like_peer,
    pruning_options,
    random_llama,
    random_windows,
)
from prunelens.config import PruningConfig
from prunelens.model import LanguageModel
from prunelens.prune import as_matrix, input_norms, prunable_matrices, prune_model
from side_by_side import Mark, Times, publish, take_turns

SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7)


def main() -> None:
    """All contenders in turn."""
    parser = pruning_options(__doc__, blocks=8, width=1024, windows=32, context=512)
    chosen = parser.parse_args()
    check_peer("wanda.py")
    torch.set_num_threads(chosen.threads)
    folder = tempfile.TemporaryDirectory()
    lm, tokens = random_llama(chosen, folder.name, torch.bfloat16), random_windows(chosen)
    dense = {name: value.clone() for name, value in lm.model.state_dict().items()}

    def from_dense(work: Callable[[], object]) -> Callable[[], object]:
        def call() -> object:
            lm.model.load_state_dict(dense)
            return work()

        return call

    works: dict[str, Callable[[], object]] = {
        "prunelens dense": lambda: _prune(lm, tokens, "dense"),
        "llmcompressor basic": lambda: _prune_like_peer(lm, tokens, "basic"),
        "prunelens sequential": lambda: _prune(lm, tokens, "sequential"),
        "llmcompressor sequential": lambda: _prune_like_peer(lm, tokens, "sequential"),
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


def _prune_like_peer(lm: LanguageModel, tokens: Tensor, pipeline: str) -> None:
    from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier

    modifier = WandaPruningModifier(sparsity=0.5, ignore=["re:.*lm_head"])
    prune_like_peer(lm, tokens, modifier, pipeline)


if __name__ == "__main__":
    main()
