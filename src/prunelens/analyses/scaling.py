"""Latent scaling: how much of a dense latent's direction is still there in pruned activations?

Where a dense latent fires on dense activations, its direction carries so much; on the paired pruned
token it carries a multiple of that. The multiple is found by regression, so nothing is encoded
after pruning: a feature that is there at half its size, below the SAE's threshold, counts as half,
where persistence sees it fall silent.

It is a multiple and not a share: a gain common to all activations, which says nothing about any one
feature, raises every latent's scaling alike, above 1 where nothing survived better than before.
What tells latents apart is their scaling next to the median of the same activations, and next to
that of the null, which is the gain for every latent (methods §10).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prunelens.analyses.noise import (
    CommonChange,
    NullRows,
    Rows,
    isotropic_noise_like,
    other_token,
)
from prunelens.analyses.persistence import BATCH_TOKENS, FEWEST_FIRINGS
from prunelens.analyses.statistics import FEWEST_UNITS
from prunelens.sae.autoencoder import SparseAutoencoder
from prunelens.sae.kernels import SparseLatents, decode
from prunelens.sae.steps.pattern import TransposedPattern

SOURCES = ("dense", "pruned", "null", "noise_isotropic", "unpaired")
SMALLEST_DENSE_SLOPE = 0.1  # below it, the ratio divides by noise
SMALLEST_VARIANCE = 1e-10  # of the mean square; below it, float32 activations vary by rounding
JOINT_STEPS = 100  # of conjugate gradients at most
JOINT_RESIDUAL = 1e-3  # relative, at which they stop
JOINT_ROUNDING = 1e-6  # relative to what the latents add; a residual below it is float32's own


@torch.no_grad()
def latent_scaling(
    sae: SparseAutoencoder,
    dense: Rows,
    pruned: Rows,
    tokens: Int[Tensor, " tokens"],
    *,
    change: CommonChange,
    groups: Int[Tensor, " tokens"],
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Per latent: the slope of its direction in a target on its activation, dense and disturbed.

    z are the SAE's latents on dense activations, rec(z) their reconstruction, d_j the decoder row
    of latent j. For a target y the projection of y - rec(z) + z_j d_j (y less what the other
    latents are taken to add) on d_j, in lengths of d_j, is regressed on z_j over the tokens, with
    an intercept: with e = y - rec(z), slope_j = 1 + cov(z_j, <d_j, e> / |d_j|^2) / var(z_j).
    With x and y a token's dense and pruned activations, y = m + A x + r, the targets are
        dense            x (slope near 1)
        pruned           y
        null             m + A x + r of another token, in the place of y: the draw that persistence
                         reads; for A = g I the scaling to expect is g, for every latent
        noise_isotropic  m + A x + a random vector of r's norm (the same to expect)
        unpaired         y of another token (0 to expect)

    In `alone` each latent is regressed alone. If another latent i is there c_i times, that adds
    (c_i - 1) <d_i, d_j> cov(z_i, z_j) / var(z_j) to the slope of a unit row j. In `unpaired` all
    are gone, so how far its scaling is from 0 is how much such interference can do in this SAE.
    `scaling` is free of it: all c are fitted together, min over c of the sum over tokens of
    |y - mean - sum_j c_j (z_j - mean) d_j|^2, by conjugate gradients from all ones, so that where
    latents cannot be told apart the answer is the least change; over the same of `dense`.
    Both are multiples: if y is g times the dense activations, both are g for every latent.

    Args:
        sae: trained on dense activations; rows of its decoder need not have unit norm.
        dense, pruned: paired rows, both normalised with the dense mean and deviation.
        tokens: the rows to look at.
        change: m and A, fitted on other rows in the same space.
        groups: of every token the group of documents, which are 0 to G - 1.
        seed: of the noise and of the other token, beside that of the change.
    Returns: one row per source and latent: source, latent, dense_firings, slope, scaling (1 as
        before, 0 gone, above 1 larger, below 0 turned round), alone (slope over the slope of
        `dense`), standard_error (of alone: jackknife over the groups; NaN with fewer than 5 of
        them, where all firings lie in one or nothing varies), reason. All are NaN with fewer than
        10 dense firings or without a slope; scaling where the joint fit is unsolved or gives
        `dense` less than 0.1,
        alone and its error where the dense slope is below 0.1. `reason` says which.
    """
    assert len(tokens) > 1, "a single token has no other to be paired with"
    generator = torch.Generator().manual_seed(int(change.seed) + 1000 * seed)
    partners = tokens[other_token(len(tokens), generator)]
    rows = sae.decoder_weight
    directions = rows / rows.square().sum(1, keepdim=True)  # <directions, row> is 1
    null = NullRows(dense, pruned, change, tokens)
    by_group, kept, done = [], [], 0
    for group in range(int(groups.max()) + 1):
        batches = []
        for places in (groups == group).nonzero().squeeze(1).split(BATCH_TOKENS):
            here = tokens[places]
            x, y = dense.rows(here), pruned.rows(here)
            common = change.of(x)
            noisy = common + isotropic_noise_like(y - common, generator)
            other = pruned.rows(partners[places])
            targets = torch.stack([x, y, null.rows(here), noisy, other], dim=1)
            latents = sae.encode(x)
            errors = targets - sae.decode(latents)[:, None]
            batches.append(_moments(latents, errors, directions))
            kept.append(SparseLatents(latents.values.cpu(), latents.indices.int().cpu()))
            done += len(places)
            if progress:
                progress(done)
        by_group.append(_total(batches))
    joint = _joint(_total(by_group), kept, rows, directions)
    return _table(by_group, directions, joint)


def scaling_summary(latents: pd.DataFrame) -> pd.DataFrame:
    """One row per source from the per-latent table, over the latents whose scaling is defined.

    Scaling is a multiple, so its mean and median count a gain common to all activations as if every
    feature had grown. The share is free of that: of latents above half of their source's median.

    Returns: columns source, mean_scaling, median_scaling, share_above_half_median (NaN where the
        median is not positive; near 0, as for `unpaired`, it says little), num_undefined.
    """
    rows = []
    for source in SOURCES:
        scaling = latents.loc[latents["source"] == source, "scaling"]
        known = scaling.dropna()
        median = known.median()
        above = (known > median / 2).mean() if median > 0 else np.nan
        rows.append(
            {
                "source": source,
                "mean_scaling": known.mean(),
                "median_scaling": median,
                "share_above_half_median": above,
                "num_undefined": len(scaling) - len(known),
            }
        )
    return pd.DataFrame(rows)


class _Moments(NamedTuple):
    """Sums over tokens from which the slopes follow; float64, on the CPU.

    Only what fires is touched, but for the error's own sum.
    """

    num_tokens: int
    firings: Float[Tensor, " latents"]
    z: Float[Tensor, " latents"]
    zz: Float[Tensor, " latents"]
    z_along: Float[Tensor, "sources latents"]
    """Of z_j times the error along direction j."""
    error: Float[Tensor, "sources d_model"]


def _moments(
    latents: SparseLatents,
    errors: Float[Tensor, "tokens sources d_model"],
    directions: Float[Tensor, "latents d_model"],
) -> _Moments:
    """Of one batch: its latents on dense activations, and target - reconstruction."""

    def by_latent(weights: Tensor) -> Tensor:
        index = latents.indices.flatten()
        return torch.bincount(index, weights.double().flatten(), len(directions)).cpu()

    z = latents.values
    return _Moments(
        len(z),
        by_latent(z > 0),
        by_latent(z),
        by_latent(z.double().square()),
        _along(latents, errors, directions),
        errors.sum(0, dtype=torch.float64).cpu(),
    )


def _along(
    latents: SparseLatents,
    errors: Float[Tensor, "tokens sources d_model"],
    directions: Float[Tensor, "latents d_model"],
) -> Float[Tensor, "sources latents"]:
    """Per source and latent, the sum over tokens of z times the error along its direction.

    The sum of z times the whole error first, then its part along the direction. One batch's sums
    are float32, whose rounding is far below the noise of any regression; batches add in float64.
    """
    transposed = TransposedPattern(latents.indices, len(directions))
    sums = transposed.product(transposed.by_latent(latents.values.flatten()), errors.flatten(1))
    along = sums.view(len(directions), -1, directions.shape[1]) * directions[:, None]
    return along.sum(2, dtype=torch.float64).T.cpu()


def _total(parts: list[_Moments]) -> _Moments:
    return _Moments(*(sum(part) for part in zip(*parts, strict=True)))


def _slopes(
    moments: _Moments, directions: Float[Tensor, "latents d_model"]
) -> Float[Tensor, "sources latents"]:
    """1 + cov / var; NaN where a latent's activation never varies or its row is zero."""
    z, num_tokens = moments.z, moments.num_tokens
    variance = moments.zz - z.square() / num_tokens
    varies = variance > SMALLEST_VARIANCE * moments.zz
    covariance = moments.z_along - z * (moments.error @ directions.T) / num_tokens
    return torch.where(varies, 1 + covariance / variance, torch.nan)


class _Joint(NamedTuple):
    """The regression on all latents together."""

    scales: Float[Tensor, "sources latents"]
    """Latents without a slope of their own stay at 1."""
    solved: Bool[Tensor, " sources"]


def _joint(
    whole: _Moments,
    kept: list[SparseLatents],
    rows: Float[Tensor, "latents d_model"],
    directions: Float[Tensor, "latents d_model"],
) -> _Joint:
    """Conjugate gradients, preconditioned by each latent's own variance.

    With Q the normal matrix and M its diagonal, M^-1 Q c is the slope of every latent in the
    reconstruction from c * z, less 1, and is self-adjoint in the inner product that M weighs.
    """
    precise = directions.double().cpu()
    change = (_slopes(whole, precise) - 1).nan_to_num(0)  # M^-1 times the residual at all ones
    weight = (whole.zz - whole.z.square() / whole.num_tokens) * rows.double().cpu().square().sum(1)
    scales, residual, step = torch.ones_like(change), change, change
    size = (weight * residual.square()).sum(1, keepdim=True)
    enough = (JOINT_RESIDUAL**2 * size).clamp_min(JOINT_ROUNDING**2 * float(weight.sum()))
    solved = size <= enough
    for _ in range(JOINT_STEPS):
        if bool(solved.all()):
            break
        answer = (_slopes(_rebuilt(step, kept, rows, directions), precise) - 1).nan_to_num(0)
        curvature = (weight * step * answer).sum(1, keepdim=True)
        # A source stands still once it is solved; so does one that rounding lets go no further.
        length = torch.where(solved | (curvature <= 0), 0.0, size / curvature)
        scales, residual = scales + length * step, residual - length * answer
        before, size = size, (weight * residual.square()).sum(1, keepdim=True)
        step = residual + torch.where(solved, 0.0, size / before) * step
        solved = size <= enough
    return _Joint(scales, solved.squeeze(1))


def _rebuilt(
    scales: Float[Tensor, "sources latents"],
    kept: list[SparseLatents],
    rows: Float[Tensor, "latents d_model"],
    directions: Float[Tensor, "latents d_model"],
) -> _Moments:
    """The moments of reconstructions whose latents are multiplied by `scales`."""
    scales, no_bias = scales.to(rows), rows.new_zeros(rows.shape[1])
    batches = []
    for part in kept:
        values, indices = part.values.to(rows.device), part.indices.long().to(rows.device)
        rebuilt = [
            decode(SparseLatents(values * s[indices], indices), rows, no_bias) for s in scales
        ]
        latents = SparseLatents(values, indices)
        batches.append(_moments(latents, torch.stack(rebuilt, 1), directions))
    return _total(batches)


def _table(
    groups: list[_Moments],
    directions: Float[Tensor, "latents d_model"],
    joint: _Joint,
) -> pd.DataFrame:
    directions = directions.double().cpu()
    whole = _total(groups)
    slopes = _slopes(whole, directions)
    errors = _standard_errors(groups, directions)
    fires_enough = whole.firings >= FEWEST_FIRINGS
    alone_defined = fires_enough & (slopes[0] >= SMALLEST_DENSE_SLOPE)
    scaling_defined = (
        fires_enough & slopes[0].isfinite() & (joint.scales[0] >= SMALLEST_DENSE_SLOPE)
    )
    parts = []
    for number, source in enumerate(SOURCES):
        slope, solved = slopes[number], joint.solved[0] & joint.solved[number]
        scaling = joint.scales[number] / joint.scales[0]
        columns = {
            "latent": np.arange(len(slope)),
            "dense_firings": whole.firings.long().numpy(),
            "slope": slope.where(fires_enough, torch.nan).numpy(),
            "scaling": scaling.where(scaling_defined & solved, torch.nan).numpy(),
            "alone": (slope / slopes[0]).where(alone_defined, torch.nan).numpy(),
            "standard_error": errors[number].where(alone_defined, torch.nan).numpy(),
            "reason": _reasons(whole.firings, slopes[0], joint.scales[0], bool(solved)),
        }
        parts.append(pd.DataFrame({"source": source, **columns}))
    return pd.concat(parts, ignore_index=True)


def _reasons(
    firings: Float[Tensor, " latents"],
    dense_slope: Float[Tensor, " latents"],
    dense_scale: Float[Tensor, " latents"],
    solved: bool,
) -> list[str]:
    """Why a latent has no scaling, or none alone; empty where it has both."""

    def reason(fires: float, slope: float, scale: float) -> str:
        if fires < FEWEST_FIRINGS:
            return f"fewer than {FEWEST_FIRINGS} dense firings"
        if math.isnan(slope):
            return "its dense activation never varies, or its decoder row is zero"
        found = []
        if not solved:
            found.append(f"scaling: the joint fit is unsolved after {JOINT_STEPS} steps")
        elif scale < SMALLEST_DENSE_SLOPE:
            found.append(f"scaling: its joint fit to dense is below {SMALLEST_DENSE_SLOPE}")
        if slope < SMALLEST_DENSE_SLOPE:
            found.append(f"alone: its slope on dense is below {SMALLEST_DENSE_SLOPE}")
        return "; ".join(found)

    numbers = (column.tolist() for column in (firings, dense_slope, dense_scale))
    return [reason(*each) for each in zip(*numbers, strict=True)]


def _standard_errors(
    groups: list[_Moments], directions: Float[Tensor, "latents d_model"]
) -> Float[Tensor, "sources latents"]:
    """Of `alone`, by leaving out one group of documents at a time.

    Tokens of one document are not independent and firing ones vary more than others; neither is
    assumed. NaN where a latent fires in one group alone.
    """
    if len(groups) < FEWEST_UNITS:
        return torch.full((len(SOURCES), len(directions)), torch.nan, dtype=torch.float64)
    left_out = []
    for number in range(len(groups)):
        slopes = _slopes(_total(groups[:number] + groups[number + 1 :]), directions)
        left_out.append(slopes / slopes[0])
    replicates = torch.stack(left_out)
    squares = (replicates - replicates.mean(0)).square().sum(0)
    errors = (squares * (len(groups) - 1) / len(groups)).sqrt()
    return torch.where(errors > 0, errors, torch.nan)  # no certainty that nobody has
