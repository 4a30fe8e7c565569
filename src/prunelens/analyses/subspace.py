"""Does a direction of one dictionary lie among a few directions of another?

A feature that the other dictionary writes as a combination of a few others (it was split, or A had
merged what B keeps apart) has no single match, and still lies in their span. Where B merged two
features of A, look from B to A: one direction cannot span both.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from prunelens.analyses.survival import Comparison
from prunelens.match import BLOCK_ROWS, unit_rows

SUBSPACE_SIZE = 4  # nearest directions that span the subspace
SMALLEST_EIGENVALUE = 1e-8  # of the Gram matrix, relative to its largest: below, float32 rounding


@torch.no_grad()
def subspace_overlaps(comparisons: Iterable[Comparison]) -> pd.DataFrame:
    """Per latent of A, the squared norm of its unit direction inside the span of its nearest in B.

    The span is that of the SUBSPACE_SIZE rows of B with the largest |cosine|; normalised
    coordinates. From 0 (orthogonal to all of B) to 1 (inside the span); at least the squared cosine
    of the best match. Four directions picked from many catch a good part of anything where
    d_model is small: a value says something only beside the same arms as survival has, above all
    `chance` and `floor_shared`.
    Returns: columns arm, init_a, order_a, init_b, order_b, latent, overlap; overlap is NaN for a
        row of zeros, which has no direction.
    """
    parts = []
    for comparison in comparisons:
        a, b = comparison.a, comparison.b
        overlap = _overlaps(a.decoder, b.decoder)
        seeds = {"init_a": a.init_seed, "order_a": a.data_seed}
        seeds |= {"init_b": b.init_seed, "order_b": b.data_seed}
        columns = {"latent": np.arange(len(overlap)), "overlap": overlap.cpu().numpy()}
        parts.append(pd.DataFrame({"arm": comparison.arm, **seeds, **columns}))
    return pd.concat(parts, ignore_index=True)


def _overlaps(
    a: Float[Tensor, "latents_a d_model"], b: Float[Tensor, "latents_b d_model"]
) -> Float[Tensor, " latents_a"]:
    """In float64, in blocks of BLOCK_ROWS rows of A."""
    b_unit = unit_rows(b)
    size = min(SUBSPACE_SIZE, len(b))
    found = []
    for rows in unit_rows(a).split(BLOCK_ROWS):
        nearest = (rows @ b_unit.T).abs().topk(size, dim=1).indices
        found.append(_inside_span(rows.double(), b_unit[nearest].double()))
    return torch.cat(found)


def _inside_span(
    rows: Float[Tensor, "rows d_model"], spanning: Float[Tensor, "rows size d_model"]
) -> Float[Tensor, " rows"]:
    """Squared norm of each unit row's projection onto the span of its own `spanning` rows.

    With c the inner products and G the Gram matrix it is c^T G^+ c. Nearly parallel rows make G
    nearly singular; the pseudo-inverse leaves out what is only rounding.
    """
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)  # zeros become NaN
    gram = spanning @ spanning.mT
    inverse = torch.linalg.pinv(gram, rtol=SMALLEST_EIGENVALUE, hermitian=True)
    inner = spanning @ rows[:, :, None]
    return (inner.mT @ inverse @ inner).flatten().clamp(0, 1)  # rounding may leave [0, 1]
