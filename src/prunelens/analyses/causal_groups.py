"""RQ5: which latents are compared, and how much they matter as groups (methods §7)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int

from prunelens.analyses.causal import Ablations
from prunelens.analyses.statistics import (
    FEWEST_UNITS,
    Estimate,
    LatentSample,
    crossed,
    difference,
    no_estimate,
    ratio_of_means,
)
from prunelens.errors import UserError
from prunelens.spread import document_groups

GROUPS = ("robust", "fragile", "matched", "random", "random_direction")
MEASURED = (
    ("paper", "final"),
    ("isolated", "final"),
    ("error_preserving", "final"),
    ("isolated", "firing"),
    ("error_preserving", "firing"),
)
MODELS = {"dense": ("dense",), "pruned": ("pruned",), "pruned_minus_dense": ("pruned", "dense")}
PARTS = {  # of what is made from several groups
    "robust_and_fragile": ("robust", "fragile"),
    "robust_minus_fragile": ("robust", "fragile"),
    "matched_minus_fragile": ("matched", "fragile"),
}
FEWEST_LATENTS = 30  # of all seeds: these intervals are made for tails
LARGEST_SPREAD = 1.2  # deviation of the log; what latents spread more gets too narrow an interval
NOTHING = 1e-6  # of the largest; a latent that does not fire does no more
LARGEST_SHARE = 1 / 3  # of a group's mean in one latent, beyond which the table says so
_MEMBERS = ("latent", "match", "match_alive")
_NEEDED = (*_MEMBERS, "firing_rate", "mean_activation")


class SeedAblations(NamedTuple):
    """What was measured with the dense and the pruned SAE of one seed."""

    groups: Mapping[str, pd.DataFrame]
    """grouping -> what `latent_groups` gives."""
    dense: Ablations
    """Of the groups' latents in the dense model."""
    pruned: Ablations
    """Of their matches (those that are alive) in the pruned model, on the same prompts."""


def latent_groups(
    latents: pd.DataFrame,
    *,
    grouping: Literal["cosine", "persistence"],
    group_size: int,
    seed: int,
) -> pd.DataFrame:
    """The groups of latents that are ablated.

    Args:
        latents: a row per alive latent of the dense SAE: latent, match (index in the pruned SAE),
            match_alive, firing_rate, mean_activation, and the columns cosine and persistence.
        grouping: the measure of survival; latents where it is NaN are left out.
        group_size: latents per group, at most half of those that there are.
        seed: of the group `random`.
    Returns: group, latent, match, match_alive. `robust` has the highest values of the measure and
        `fragile` the lowest (among equal ones the lower index counts as the more fragile);
        `matched` has for each fragile latent, the rarest first, the nearest in log firing rate and
        log mean activation (both divided by their deviation over all latents) that is left in the
        upper half of the measure; `random` is drawn from all; `random_direction` has the same.
    Raises: UserError for a missing column or a group size below 1.
    """
    missing = [name for name in (*_NEEDED, grouping) if name not in latents]
    if missing:
        raise UserError(f"latents: the table has no column {missing[0]!r}; add it")
    if group_size < 1:
        raise UserError(f"causal.group_size: {group_size} is too few; make it at least 1")
    known = latents[latents[grouping].notna()].sort_values([grouping, "latent"], ignore_index=True)
    size = min(group_size, len(known) // 2)
    fragile = np.arange(size)
    generator = np.random.default_rng([seed, 2])
    drawn = np.sort(generator.choice(len(known), size, replace=False)) if size else fragile
    rows = {
        "robust": np.arange(len(known) - size, len(known)),
        "fragile": fragile,
        "matched": _matched(known, fragile),
        "random": drawn,
        "random_direction": drawn,
    }
    columns = list(_MEMBERS)
    parts = [known.loc[index, columns].assign(group=group) for group, index in rows.items()]
    return pd.concat(parts, ignore_index=True)[["group", *columns]]


def causal_summary(
    seeds: Sequence[SeedAblations], documents: Int[np.ndarray, " prompts"]
) -> pd.DataFrame:
    """Mean KL of every group over latents and seeds, with its interval (methods §7 RQ5, §10).

    Args:
        seeds: all on the same prompts.
        documents: which document each prompt is from.
    Returns: a row per ablated_in, grouping, group, protocol and contexts.
        The columns are those of `causal.csv`, and error, df, least, most and skew those of
        `Estimate`.
    """
    prompts = _Prompts(documents, document_groups(torch.from_numpy(documents)).numpy())
    worlds = [_World(seed, prompts.groups) for seed in seeds]
    every = itertools.product(seeds[0].groups, MODELS, (*GROUPS, *PARTS), MEASURED)
    rows = []
    for grouping, ablated_in, group, (protocol, contexts) in every:
        row = {"ablated_in": ablated_in, "grouping": grouping, "group": group}
        row |= {"protocol": protocol, "contexts": contexts}
        rows.append(row | _measures(worlds, prompts, **row))
    return pd.DataFrame(rows)


def _measures(
    worlds: list[_World],
    prompts: _Prompts,
    *,
    ablated_in: str,
    grouping: str,
    group: str,
    protocol: str,
    contexts: str,
) -> dict[str, Any]:
    """The columns with numbers of one row of `causal_summary`."""
    where, parts, models = (protocol, contexts), PARTS.get(group, (group,)), MODELS[ablated_in]
    by_seed = [world.sides(grouping, ablated_in, group, where) for world in worlds]
    measured = [sides for sides in by_seed if all(side.known.any() for side in sides)]
    groups = [
        [world.values(grouping, model, part, where) for world in worlds]
        for model, part in itertools.product(models, parts)
    ]
    largest, spread = (max(map(of, groups)) for of in (_largest_share, _log_deviation))
    found, num_prompts, num_documents = _estimate(measured, prompts, spread)
    firing_share = reconstruction = math.nan
    if len(models) == len(parts) == 1:
        firing_share = _mean([world.firing_share(grouping, *models, group) for world in worlds])
    if len(models) == 1 and "_minus_" not in group and protocol == "paper" and found.value > 0:
        reconstruction = _mean([world.reconstruction(*models) for world in worlds])
    return {
        "kl_mean": found.value,
        "ci_low": found.low,
        "ci_high": found.high,
        **{name: getattr(found, name) for name in ("error", "df", "least", "most", "skew")},
        "resampled": found.resampled,
        "num_seeds": len(measured),
        "num_latents": sum(min(int(side.known.sum()) for side in sides) for sides in measured),
        "num_prompts": num_prompts,
        "num_documents": num_documents,
        "largest_share": largest,
        "firing_share": firing_share,
        "reconstruction_share": reconstruction / found.value if found.value else math.nan,
        "reason": "; ".join(_remarks(found, largest)),
    }


class _Prompts(NamedTuple):
    """Where the prompts are from."""

    documents: Int[np.ndarray, " prompts"]
    groups: Int[np.ndarray, " prompts"]
    """Of documents, which are left out together."""


class _Values(NamedTuple):
    """One number for each latent of a group (or each pair of them), where it was measured."""

    means: Float[np.ndarray, "latents 1+groups"]
    """Mean KL over the latent's contexts; after it the same without each group of documents. NaN
    where there is no context."""
    latents: Int[np.ndarray, " latents"]
    prompts: Bool[np.ndarray, " prompts"]
    """That hold a context of any latent."""

    @property
    def known(self) -> Bool[np.ndarray, " latents"]:
        """Which latents have a context."""
        return np.isfinite(self.means[:, 0])

    def minus(self, other: _Values) -> _Values:
        """Latent by latent; only those with a context on both sides are left."""
        return _Values(self.means - other.means, self.latents, self.prompts & other.prompts)

    def sample(self) -> LatentSample:
        """The mean over latents. One that stands in the group twice (as a match) is one draw."""
        ones = np.ones_like(self.means)
        found = ratio_of_means(self.means[:, 0], self.means[:, 1:], ones[:, 0], ones[:, 1:])
        own, where = np.unique(self.latents[self.known], return_inverse=True)
        same = (where[:, None] == np.arange(len(own))).astype(float)
        there = np.isfinite(found.parts_without)
        without = np.where(there, found.parts_without, 0) @ same
        without[there @ same == 0] = np.nan
        return found._replace(parts=found.parts @ same, parts_without=without)


class _Measured(NamedTuple):
    """What was measured in one model, of one kind, protocol and kind of contexts."""

    latents: Int[np.ndarray, " latents"]
    """In rising order."""
    means: Float[np.ndarray, "latents 1+groups"]
    """As in `_Values`."""
    prompts: Bool[np.ndarray, "latents prompts"]
    """That hold a context."""
    fires: Float[np.ndarray, " latents"]
    """Share of the contexts in which it fires at the position that is read."""


class _World:
    """What was measured with the SAEs of one seed."""

    def __init__(self, seed: SeedAblations, document_groups: Int[np.ndarray, " prompts"]) -> None:
        self._groups = {
            grouping: {name: rows[name].to_numpy() for name in ("group", *_MEMBERS)}
            for grouping, rows in seed.groups.items()
        }
        self._ablations = {"dense": seed.dense, "pruned": seed.pruned}
        self._measured = {
            (model, *which): _measured(rows, document_groups)
            for model, ablations in self._ablations.items()
            for which, rows in ablations.kl.groupby(["kind", "protocol", "contexts"])
        }
        self._shape = (1 + int(document_groups.max()) + 1, len(document_groups))

    def sides(
        self, grouping: str, ablated_in: str, group: str, where: tuple[str, str]
    ) -> list[_Values]:
        """What a row's number is the mean of; with two sides that of the first minus the second."""
        parts = []
        for part in PARTS.get(group, (group,)):
            first, *others = (
                self.values(grouping, model, part, where) for model in MODELS[ablated_in]
            )
            parts.append(first.minus(*others) if others else first)
        if group == "matched_minus_fragile":
            return [parts[0].minus(parts[1])]
        if group == "robust_and_fragile":
            means, latents, prompts = zip(*parts, strict=True)
            return [_Values(np.vstack(means), np.hstack(latents), np.any(prompts, axis=0))]
        return parts

    def values(self, grouping: str, model: str, group: str, where: tuple[str, str]) -> _Values:
        """One group in one model; of the pruned one the matches that are alive."""
        latents, usable = self._members(grouping, model, group)
        num_columns, num_prompts = self._shape
        means = np.full((len(latents), num_columns), np.nan)
        found = self._measured.get((model, _kind(group), *where))
        if found is None:
            return _Values(means, latents, np.zeros(num_prompts, dtype=bool))
        place = np.searchsorted(found.latents, latents).clip(max=len(found.latents) - 1)
        there = usable & (found.latents[place] == latents)
        assert where[1] == "firing" or (there == usable).all(), "not all ablated"
        means[there] = found.means[place[there]]
        return _Values(means, latents, found.prompts[place[there]].any(0))

    def firing_share(self, grouping: str, model: str, group: str) -> float:
        """Share of (latent, prompt) pairs in which the latent fires at the last position."""
        latents, usable = self._members(grouping, model, group)
        found = self._measured.get((model, _kind(group), "isolated", "final"))
        if found is None or not usable.any():
            return math.nan
        return float(found.fires[np.searchsorted(found.latents, latents[usable])].mean())

    def reconstruction(self, model: str) -> float:
        """Mean KL(original || SAE) over prompts."""
        return float(self._ablations[model].reconstruction.mean())

    def _members(self, grouping: str, model: str, group: str) -> tuple[np.ndarray, np.ndarray]:
        """The group's latents in the model, and whether they can be ablated there."""
        table = self._groups[grouping]
        rows = table["group"] == group
        latent, match, alive = (table[name][rows] for name in _MEMBERS)
        if model == "dense":
            return latent.astype(np.int64), np.ones(len(latent), dtype=bool)
        return match.astype(np.int64), alive.astype(bool)


def _kind(group: str) -> str:
    return "random_direction" if group == "random_direction" else "latent"


def _measured(rows: pd.DataFrame, document_groups: Int[np.ndarray, " prompts"]) -> _Measured:
    """From the table of single measurements."""
    latents, where = np.unique(rows["latent"].to_numpy(np.int64), return_inverse=True)
    prompt, kl = rows["prompt"].to_numpy(np.int64), rows["kl"].to_numpy(float)
    sums, counts = np.zeros((2, len(latents), document_groups.max() + 1))
    np.add.at(sums, (where, document_groups[prompt]), kl)
    np.add.at(counts, (where, document_groups[prompt]), 1)
    sums, counts = (
        np.hstack([part.sum(1, keepdims=True), part.sum(1, keepdims=True) - part])
        for part in (sums, counts)
    )
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    prompts = np.zeros((len(latents), len(document_groups)), dtype=bool)
    prompts[where, prompt] = True
    fires = np.bincount(where, rows["fires_final"]) / np.bincount(where)
    return _Measured(latents, means, prompts, fires)


def _estimate(
    measured: list[list[_Values]], prompts: _Prompts, spread: float
) -> tuple[Estimate, int, int]:
    """The mean over seeds, and in how many prompts and documents every side has a context."""
    if not measured:
        return no_estimate(math.nan, "no latent of the group was measured"), 0, 0
    there = np.any([np.all([side.prompts for side in sides], axis=0) for sides in measured], axis=0)
    num_prompts, num_documents = int(there.sum()), len(np.unique(prompts.documents[there]))
    # Documents without a context say nothing, and are none of those that are left out.
    kept = np.unique(prompts.groups[there])
    samples = []
    for sides in measured:
        first, *others = (side.sample() for side in sides)
        both = difference(first, *others) if others else first
        samples.append(
            both._replace(without=both.without[kept], parts_without=both.parts_without[kept])
        )
    value = _mean([sample.value for sample in samples])
    if num_documents < FEWEST_UNITS:
        found = no_estimate(value, f"no interval: {num_documents} documents, fewer than 5")
    elif spread > LARGEST_SPREAD:
        why = f"the log of a latent's KL deviates by {spread:.2g}, more than {LARGEST_SPREAD}"
        found = no_estimate(value, f"no interval: {why}")
    else:
        found = crossed(samples, heavy_tails=True, fewest=FEWEST_LATENTS)
    return found, num_prompts, num_documents


def _largest_share(by_seed: list[_Values]) -> float:
    """Of the mean over seeds, how much each seed's largest latent holds."""
    largest = total = 0.0
    for values in by_seed:
        if values.known.any():
            kl = values.means[values.known, 0]
            own = np.bincount(values.latents[values.known], kl)
            largest, total = largest + own.max() / len(kl), total + kl.mean()
    return largest / total if total > 0 else math.nan


def _log_deviation(by_seed: list[_Values]) -> float:
    """Deviation of the log of what latents do (those that do anything), mean over seeds."""
    effects = [values.means[values.known, 0] for values in by_seed]
    logs = [np.log(kl[kl > NOTHING * kl.max()]) for kl in effects if len(kl)]
    return float(np.mean([each.std(ddof=1) for each in logs if len(each) > 1] or 0.0))


def _remarks(found: Estimate, largest: float) -> list[str]:
    """What a reader has to know of a row."""
    remarks = [found.resampled] if math.isnan(found.error) else []
    if largest > LARGEST_SHARE:
        remarks.append(f"one latent of each seed holds {largest:.0%} of a mean")
    return remarks


def _mean(values: list[float]) -> float:
    """Of what is known."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _matched(known: pd.DataFrame, fragile: np.ndarray) -> np.ndarray:
    """Rows of the upper half, one for each fragile row, in the order of `fragile`."""
    features = np.log(known[["firing_rate", "mean_activation"]].to_numpy(dtype=float))
    spread = features.std(0)
    features = features / np.where(spread > 0, spread, 1)
    free = np.ones(len(known), dtype=bool)
    free[: len(known) - len(known) // 2] = False
    index = known["latent"].to_numpy()
    found = np.empty_like(fragile)
    for row in sorted(fragile, key=lambda row: (features[row, 0], index[row])):
        distance = np.square(features - features[row]).sum(1)
        candidates = np.flatnonzero(free)
        best = candidates[np.lexsort((index[candidates], distance[candidates]))[0]]
        found[row] = best
        free[best] = False
    return found
