"""RQ5: which latents are compared, and how much they matter as groups (methods §7)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from prunelens.analyses.causal import Ablations
from prunelens.analyses.statistics import PromptInterval, PromptTerm, interval_over_prompts
from prunelens.errors import UserError

GROUPS = ("robust", "fragile", "matched", "random", "random_direction")
MEASURED = (
    ("paper", "final"),
    ("isolated", "final"),
    ("error_preserving", "final"),
    ("isolated", "firing"),
    ("error_preserving", "firing"),
)
_CONTRASTS = {
    "robust_minus_fragile": ("robust", "fragile"),
    "matched_minus_fragile": ("matched", "fragile"),
}
_NEEDED = ("latent", "match", "match_alive", "firing_rate", "mean_activation")


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
    columns = ["latent", "match", "match_alive"]
    parts = [known.loc[index, columns].assign(group=group) for group, index in rows.items()]
    return pd.concat(parts, ignore_index=True)[["group", *columns]]


def causal_summary(
    groups_by_grouping: Mapping[str, pd.DataFrame],
    dense: Ablations,
    pruned: Ablations,
    *,
    seed: int,
) -> pd.DataFrame:
    """Mean KL of every group with its interval over prompts (methods §7, RQ5; Table 4).

    Args:
        groups_by_grouping: grouping -> what `latent_groups` gives.
        dense: ablations of the groups' latents in the dense model.
        pruned: of their matches (those that are alive) in the pruned model, on the same prompts.
        seed: of the bootstrap; all rows use the same draws.
    Returns: a row per ablated_in, grouping, group, protocol and contexts.
        ablated_in: `dense`, `pruned`, or `pruned_minus_dense` (paired by prompt; only the latents
        whose match is alive, on either side).
        group: those of `latent_groups`, `robust_and_fragile` (both together), and the contrasts
        robust_minus_fragile and matched_minus_fragile.
        kl_mean (nats): mean over latents of the latent's mean over its contexts; ci_low and
        ci_high: 95 % bootstrap over prompts. num_latents: latents with at least one context (of the
        smaller side of a difference); num_prompts: prompts with one. firing_share: share of
        (latent, prompt) pairs where the latent fires at the last position. reconstruction_share:
        mean KL(original || SAE) over kl_mean, protocol `paper` only. The last two are NaN for
        differences; everything is NaN where nothing was measured.
    """
    rows = []
    for grouping, groups in groups_by_grouping.items():
        alive = groups["match_alive"]
        sides = (
            _Side(dense, groups, "latent", pd.Series(True, index=groups.index)),
            _Side(pruned, groups, "match", alive),
            _Side(dense, groups, "latent", alive),
        )
        for ablated_in, group, parts in _comparisons(*sides):
            for protocol, contexts in MEASURED:
                row = {"ablated_in": ablated_in, "grouping": grouping, "group": group}
                row |= {"protocol": protocol, "contexts": contexts}
                rows.append(row | _measures(parts, protocol, contexts, seed))
    return pd.DataFrame(rows)


def _measures(parts: list[_Part], protocol: str, contexts: str, seed: int) -> dict[str, Any]:
    """The columns with numbers of one row of `causal_summary`."""
    terms = [part.side.term(part.sign, part.group, protocol, contexts) for part in parts]
    found = interval_over_prompts(terms, seed=seed)
    first, *others = parts
    firing_share = math.nan if others else first.side.firing_share(first.group)
    share = math.nan
    if protocol == "paper" and not others and found.mean > 0:
        share = first.side.reconstruction / found.mean
    return {
        "kl_mean": found.mean,
        "ci_low": found.low,
        "ci_high": found.high,
        "num_latents": min(int(term.counts.any(0).sum()) for term in terms),
        "num_prompts": min(int(term.counts.any(1).sum()) for term in terms),
        "firing_share": firing_share,
        "reconstruction_share": share,
        "reason": _why_undefined(found),
    }


def _why_undefined(found: PromptInterval) -> str:
    if math.isnan(found.mean):
        return "no latent of the group was measured"
    return "too few prompts for an interval" if math.isnan(found.low) else ""


class _Part(NamedTuple):
    """One side of a difference: a group in one model."""

    sign: int
    side: _Side
    group: str


class _Side:
    """The groups in one model, and what was measured there."""

    def __init__(
        self, ablations: Ablations, groups: pd.DataFrame, index: str, usable: pd.Series
    ) -> None:
        """`index` names the column with this model's latents, `usable` the rows that count."""
        kept = groups[usable.to_numpy(dtype=bool)]
        self._latents = {
            group: kept.loc[kept["group"] == group, index].to_numpy(dtype=np.int64)
            for group in GROUPS
        }
        both = [self._latents[group] for group in ("robust", "fragile")]
        self._latents["robust_and_fragile"] = np.concatenate(both)
        self._num_prompts = len(ablations.reconstruction)
        self.reconstruction = float(ablations.reconstruction.mean())
        self._measured = dict(iter(ablations.kl.groupby(["kind", "protocol", "contexts"])))

    def term(self, sign: int, group: str, protocol: str, contexts: str) -> PromptTerm:
        """Sums and counts per prompt; latents in the group twice (as matches) count twice."""
        kind = "random_direction" if group == "random_direction" else "latent"
        latents = self._latents[group]
        shape = (self._num_prompts, len(latents))
        rows = self._measured.get((kind, protocol, contexts))
        if rows is None:
            return PromptTerm(sign, np.zeros(shape), np.zeros(shape))
        own, where = np.unique(latents, return_inverse=True)
        rows = rows[rows["latent"].isin(own)]
        assert contexts == "firing" or len(rows) == len(own) * self._num_prompts, "not all ablated"
        cell = (rows["prompt"].to_numpy(), np.searchsorted(own, rows["latent"].to_numpy()))
        sums, counts = np.zeros((2, self._num_prompts, len(own)))
        np.add.at(sums, cell, rows["kl"].to_numpy())
        np.add.at(counts, cell, 1)
        return PromptTerm(sign, sums[:, where], counts[:, where])

    def firing_share(self, group: str) -> float:
        """Share of (latent, prompt) pairs in which the latent fires at the last position."""
        kind = "random_direction" if group == "random_direction" else "latent"
        rows = self._measured.get((kind, "isolated", "final"))
        if rows is None or not len(self._latents[group]):
            return math.nan
        fires = rows.groupby("latent")["fires_final"].mean()
        return float(fires.loc[self._latents[group]].mean())


def _comparisons(
    dense: _Side, pruned: _Side, paired: _Side
) -> Iterator[tuple[str, str, list[_Part]]]:
    """Every row's ablated_in, group and parts; `paired` is dense with living matches only."""
    models = {
        "dense": {1: dense},
        "pruned": {1: pruned},
        "pruned_minus_dense": {1: pruned, -1: paired},
    }
    for ablated_in, sides in models.items():
        for group in (*GROUPS, "robust_and_fragile"):
            yield ablated_in, group, [_Part(sign, side, group) for sign, side in sides.items()]
        for contrast, groups in _CONTRASTS.items():
            parts = [
                _Part(sign * of_group, side, group)
                for sign, side in sides.items()
                for of_group, group in zip((1, -1), groups, strict=True)
            ]
            yield ablated_in, contrast, parts


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
