"""SparseGPT: prunelens against llm-compressor, on one model, the same windows and the same machine.

`python benchmarks/sparsegpt.py`, in an environment with llmcompressor==0.14, prunes a random Llama
to 50 % (each matrix by columns of 128) and to 2:4, block by block with batches of one size.
Compared are time, which weights go, how far what stays is apart, and the error that each leaves in
the model's own output. llm-compressor zeroes one weight more per block of columns than half of
them, and bfloat16 would round both sides: the model is float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

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
from prunelens.model import LanguageModel, logits
from prunelens.prune import as_matrix, prunable_matrices, prune_model
from side_by_side import Mark, publish, take_turns

PATTERNS = {"unstructured": "0:0", "2:4": "2:4"}  # ours -> theirs


class Result(NamedTuple):
    """A pruned model."""

    weights: dict[str, Tensor]
    """By matrix."""
    output: Tensor
    """Logits of the first windows."""


def main() -> None:
    """Both contenders in turn, for both patterns."""
    parser = pruning_options(__doc__, blocks=4, width=512, windows=32, context=256)
    chosen = parser.parse_args()
    check_peer("sparsegpt.py")
    torch.set_num_threads(chosen.threads)
    folder = tempfile.TemporaryDirectory()
    lm, tokens = random_llama(chosen, folder.name, torch.float32), random_windows(chosen)
    dense = {name: value.clone() for name, value in lm.model.state_dict().items()}
    before = logits(lm, tokens[:2])

    def from_dense(work: Callable[[], None]) -> Callable[[], Result]:
        def call() -> Result:
            lm.model.load_state_dict(dense)
            work()
            found = {n: as_matrix(m).clone() for n, m in prunable_matrices(lm).items()}
            return Result(found, logits(lm, tokens[:2]))

        return call

    contenders: dict[str, Callable[[], Result]] = {}
    for ours, theirs in PATTERNS.items():
        contenders[f"prunelens {ours}"] = from_dense(partial(_prune, lm, tokens, ours))
        contenders[f"llmcompressor {ours}"] = from_dense(
            partial(_prune_like_peer, lm, tokens, theirs)
        )
    agreement = {
        pattern: _agreement(
            contenders[f"prunelens {pattern}"](), contenders[f"llmcompressor {pattern}"](), before
        )
        for pattern in PATTERNS
    }
    times = take_turns(contenders, rounds=chosen.rounds, device=chosen.device)
    publish(
        "sparsegpt",
        settings={key: value for key, value in vars(chosen).items() if key != "save"},
        results={"milliseconds": times, "agreement": agreement},
        marks=list[Mark](),
        save=chosen.save,
    )


def _agreement(ours: Result, theirs: Result, before: Tensor) -> dict[str, float]:
    """Of all matrices together."""
    equal = total = difference = norm = 0.0
    zeros = [0.0, 0.0]
    for name, weight in ours.weights.items():
        other = theirs.weights[name]
        equal += float(((weight == 0) == (other == 0)).sum())
        total += weight.numel()
        difference += float((weight - other).double().square().sum())
        norm += float(other.double().square().sum())
        for side, matrix in enumerate((weight, other)):
            zeros[side] += float((matrix == 0).sum())
    errors = [float((side.output - before).norm() / before.norm()) for side in (ours, theirs)]
    return {
        "equal_mask_entries": equal / total,
        "relative_difference_of_weights": (difference / norm) ** 0.5,
        "sparsity_prunelens": zeros[0] / total,
        "sparsity_llmcompressor": zeros[1] / total,
        "output_error_prunelens": errors[0],
        "output_error_llmcompressor": errors[1],
    }


def _prune(lm: LanguageModel, tokens: Tensor, pattern: str) -> None:
    scope = "matrix" if pattern == "unstructured" else "row"
    config = {"criterion": "sparsegpt", "scope": scope, "pattern": pattern, "sparsity": 0.5}
    pruning = PruningConfig.model_validate(config)
    prune_model(lm, pruning, calibration=tokens, with_masks=False)


def _prune_like_peer(lm: LanguageModel, tokens: Tensor, structure: str) -> None:
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier

    modifier = SparseGPTModifier(
        sparsity=0.5, mask_structure=structure, block_size=128, ignore=["re:.*lm_head"]
    )
    prune_like_peer(lm, tokens, modifier, "sequential")


if __name__ == "__main__":
    main()
