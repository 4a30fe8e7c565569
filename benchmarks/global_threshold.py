"""One magnitude threshold over all matrices: prunelens against torch.nn.utils.prune.

`python benchmarks/global_threshold.py` prunes linear layers of 2,048 to 8,192 inputs to 30 %. At
the small size (134 M weights) `prune_model` and `global_unstructured(L1Unstructured)` take turns
on equal weights; at the large one (1 billion) prunelens is alone, since the peer holds 15 times
the weights. torch drops any of several equal weights, so what is compared is what must be equal:
how many weights go, and all but those at the threshold.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as peer
from transformers import LlamaConfig, LlamaForCausalLM

from prunelens.config import PruningConfig
from prunelens.model import LanguageModel
from prunelens.prune import prune_model
from side_by_side import Mark, now, options, peak_memory, publish

SHAPES = ((2048, 2048), (8192, 2048), (2048, 8192), (512, 2048))
HALF_A_GIBIBYTE = 1 << 28
PRUNING = PruningConfig(criterion="magnitude", scope="global", sparsity=0.3)


class Run(NamedTuple):
    """One pruning."""

    seconds: float
    extra: float
    """Peak memory beyond what was held before, over the bytes of the weights."""


def main() -> None:
    """Both at the small size, prunelens at the large one, in bfloat16 and float32."""
    parser = options(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("--small", type=float, default=134, help="millions of weights")
    parser.add_argument("--large", type=float, default=1000, help="millions of weights")
    parser.add_argument("--peer-rounds", type=int, default=1, help="the peer is slow")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    results = {"bfloat16": _compare(torch.bfloat16, chosen)}
    results["bfloat16"] |= _alone(torch.bfloat16, chosen)
    results["float32"] = _alone(torch.float32, chosen)
    narrow, wide = results["bfloat16"], results["float32"]
    peer_takes = f"torch's seconds over prunelens's, {chosen.small:.0f} M bfloat16 weights"
    publish(
        "global_threshold",
        settings={
            **{key: value for key, value in vars(chosen).items() if key != "save"},
            "sparsity": PRUNING.sparsity,
        },
        results=results,
        marks=[
            Mark(4, peer_takes, 10, "at least", narrow["ratio"]),
            Mark(4, "extra memory over bfloat16 weights", 0.05, "at most", narrow["large_extra"]),
            Mark(4, "extra memory over float32 weights", 0.05, "at most", wide["large_extra"]),
            *(
                Mark(4, f"the same, masks kept as in a study, {name}", 0.05, "at most", extra)
                for name, extra in (
                    ("bfloat16", narrow["large_extra_with_masks"]),
                    ("float32", wide["large_extra_with_masks"]),
                )
            ),
        ],
        save=chosen.save,
    )


def _compare(dtype: torch.dtype, chosen: argparse.Namespace) -> dict[str, float]:
    """prunelens and torch in turn on equal weights."""
    ours, theirs = [], []
    for round_ in range(max(chosen.peer_rounds, chosen.rounds)):
        lm = _model(chosen.small, dtype, chosen.device)
        before = [weight.clone() for weight in _weights(lm)] if round_ == 0 else []
        ours.append(_measured(lm, functools.partial(prune_model, lm, PRUNING), chosen.device))
        if round_ >= chosen.peer_rounds:
            continue
        other = _model(chosen.small, dtype, chosen.device)
        theirs.append(_measured(other, functools.partial(_by_torch, other), chosen.device))
        if round_ == 0:
            _check_equal(before, _weights(lm), _weights(other))
        del other
    taken = {name: statistics.median(run.seconds for run in runs)
             for name, runs in (("prunelens", ours), ("torch", theirs))}  # fmt: skip
    return {
        "small_prunelens_seconds": round(taken["prunelens"], 3),
        "small_torch_seconds": round(taken["torch"], 3),
        "ratio": round(taken["torch"] / taken["prunelens"], 1),
        "small_prunelens_extra_with_masks": round(max(run.extra for run in ours), 4),
        "small_torch_extra": round(max(run.extra for run in theirs), 2),
    }


def _alone(dtype: torch.dtype, chosen: argparse.Namespace) -> dict[str, float]:
    """prunelens at both sizes, without the masks, then with them; seconds per billion weights."""
    results = {}
    for size, millions in (("small", chosen.small), ("large", chosen.large)):
        for label, with_masks in (("", False), ("_with_masks", True)):
            lm = _model(millions, dtype, chosen.device)
            num_weights = sum(weight.numel() for weight in _weights(lm))
            call = functools.partial(prune_model, lm, PRUNING, with_masks=with_masks)
            run = _measured(lm, call, chosen.device)
            results[f"{size}_seconds_per_billion{label}"] = round(
                1e9 * run.seconds / num_weights, 2
            )
            results[f"{size}_extra{label}"] = round(run.extra, 4)
            del lm, call
    return results


def _model(millions: float, dtype: torch.dtype, device: str) -> LanguageModel:
    """Linear layers with normal weights, made one at a time, in the blocks of a tiny model."""
    tiny = LlamaForCausalLM(LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1,
    ))  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)
    layers, missing = nn.ModuleList(), millions * 1e6
    for num_outputs, num_inputs in itertools.cycle(SHAPES):
        layer = nn.Linear(num_inputs, num_outputs, bias=False, device="meta", dtype=dtype)
        layer.to_empty(device=device)
        layer.weight.requires_grad_(False).normal_(std=0.02, generator=generator)
        layers.append(layer)
        missing -= layer.weight.numel()
        if missing <= 0:
            break
    tiny.model.layers = nn.ModuleList([nn.ModuleList(layers)])
    return LanguageModel(tiny, None, "linear layers", tiny.model.layers)


def _weights(lm: LanguageModel) -> list[Tensor]:
    """The weights as they are now; torch puts the pruned ones beside the original ones."""
    return [module.weight for module in lm.blocks.modules() if isinstance(module, nn.Linear)]


def _by_torch(lm: LanguageModel) -> None:
    layers = [(m, "weight") for m in lm.blocks.modules() if isinstance(m, nn.Linear)]
    num_dropped = math.floor(PRUNING.fraction * sum(m.weight.numel() for m, _ in layers))
    peer.global_unstructured(layers, peer.L1Unstructured, amount=num_dropped)


def _measured(lm: LanguageModel, work: Callable[[], object], device: str) -> Run:
    num_bytes = sum(weight.nbytes for weight in _weights(lm))
    started = now(device)
    with peak_memory() as peak:
        work()
        return Run(now(device) - started, peak() / num_bytes)


def _check_equal(before: list[Tensor], ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Equal counts; the weights that one side alone drops are all of one magnitude."""
    gone = [sum(int((weight == 0).sum()) for weight in side) for side in (ours, theirs)]
    assert gone[0] == gone[1], gone
    differing = [w[(a == 0) != (b == 0)].abs().unique()
                 for w, a, b in zip(before, ours, theirs, strict=True)]  # fmt: skip
    assert len(torch.cat(differing).unique()) <= 1, "they differ in more than ties"


if __name__ == "__main__":
    main()
