"""Stages that compare pairs of SAEs, arm by arm (RQ2): by direction, by activation, by span.

Parents are named `<condition>-<init_seed>-<data_seed>` and how they differ from a plain SAE:
`-rotated`, `-warm`. Which pairs make an arm is `analyses.survival`'s affair.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pandas as pd
from safetensors.torch import load_file

from prunelens.activations import Activations, Statistics
from prunelens.analyses.activation_matching import (
    ActivationComparison,
    LatentSeries,
    activation_matching,
    latent_series,
)
from prunelens.analyses.subspace import subspace_overlaps
from prunelens.analyses.survival import (
    Comparison,
    Dictionary,
    StartedT,
    control_arms,
    corrected_survival,
    pruned_arms,
    survival,
)
from prunelens.sae.topk import TopKSAE
from prunelens.study.question_stages import second_half
from prunelens.study.work import Work


class _Compared(NamedTuple):
    """One SAE among the parents."""

    condition: str
    """dense or pruned."""
    init_seed: int
    data_seed: int
    folder: pathlib.Path
    untrained: bool = False

    def sae(self) -> TopKSAE:
        """As it was trained, or as it was at step 0."""
        sae = TopKSAE.load(self.folder)
        if not self.untrained:
            return sae
        return TopKSAE.initialise(sae.d_model, sae.num_latents, sae.k, init_seed=self.init_seed)

    def statistics(self) -> Statistics:
        """The normalisation that it was trained under."""
        return Statistics.load(self.folder / "normalisation.safetensors")


class _Reading(NamedTuple):
    """What one SAE makes of its activations."""

    series: LatentSeries
    init_seed: int
    data_seed: int


def _survival(work: Work) -> None:
    result = survival(_arms(work, _dictionary), work.config["taus"])
    result.rates.to_parquet(work.out / "survival.parquet")
    result.latents.to_parquet(work.out / "latents.parquet")


def _corrected(work: Work) -> None:
    tables = [
        pd.read_parquet(work.parents[role] / "survival.parquet")
        for role in ("survival", "controls")
    ]
    corrected_survival(*tables).to_parquet(work.out / "corrected.parquet")


def _subspace(work: Work) -> None:
    latents = subspace_overlaps(_arms(work, _dictionary))
    latents.to_parquet(work.out / "latents.parquet")
    seeds = ["init_a", "order_a", "init_b", "order_b"]
    means = latents.groupby(["arm", *seeds], sort=False)["overlap"].mean().reset_index()
    means.to_parquet(work.out / "subspace.parquet")


def _activation_matching(work: Work) -> None:
    """Over the tokens that persistence is measured on."""
    kept = load_file(work.parents["screening"] / "kept.safetensors")["eval"]
    tokens = second_half(work, kept)
    num_saes = sum("-" in role for role in work.parents)
    done = iter(range(2 * num_saes))

    def read(which: _Compared) -> _Reading:
        rows = Activations(
            work.parents[which.condition] / "eval.safetensors",
            kept=kept,
            statistics=which.statistics(),
            device=work.device,
        )
        series = latent_series(which.sae().to(work.device), rows, tokens)
        work.progress(min(1.0, (next(done) + 1) / (2 * num_saes)))
        return _Reading(series, which.init_seed, which.data_seed)

    comparisons = _with_series(_arms(work, read))
    found = activation_matching(comparisons, work.config["taus"])
    found.rates.to_parquet(work.out / "rates.parquet")
    found.latents.to_parquet(work.out / "latents.parquet")


def _with_series(comparisons: list[Comparison[_Reading]]) -> Iterator[ActivationComparison]:
    for comparison in comparisons:
        a, b = comparison.a, comparison.b
        seeds = (a.init_seed, a.data_seed, b.init_seed, b.data_seed)
        yield ActivationComparison(comparison.arm, *seeds, a.series, b.series)


def _dictionary(which: _Compared) -> Dictionary:
    decoder = which.sae().decoder_weight.detach()
    return Dictionary(decoder, which.statistics().sigma, which.init_seed, which.data_seed)


def _arms(work: Work, load: Callable[[_Compared], StartedT]) -> list[Comparison[StartedT]]:
    """The arms of a run, pruned or dense, from the SAEs among the parents."""
    by_kind: dict[str, list[_Compared]] = {}
    for role, folder in work.parents.items():
        condition, *rest = role.split("-")
        if not rest:  # activations
            continue
        init_seed, data_seed, *differs = rest
        kind = "-".join(differs) or ("same" if init_seed == data_seed else "reordered")
        compared = _Compared(condition, int(init_seed), int(data_seed), folder)
        by_kind.setdefault(f"{condition}-{kind}", []).append(compared)

    def loaded(kind: str) -> list[StartedT]:
        return [load(which) for which in by_kind.get(kind, [])]

    dense = loaded("dense-same")
    if "pruned-same" in by_kind:
        kinds = ("pruned-same", "pruned-reordered", "pruned-warm")
        return pruned_arms(dense, *map(loaded, kinds))
    return control_arms(
        dense,
        loaded("dense-reordered"),
        loaded("dense-rotated"),
        [load(which._replace(untrained=True)) for which in by_kind["dense-same"]],
        loaded("dense-warm"),
        loaded("dense-rotated-warm"),
    )


ARM_STAGES: dict[str, Callable[[Work], None]] = {
    "survival": _survival,
    "corrected": _corrected,
    "subspace": _subspace,
    "activation_matching": _activation_matching,
}
