"""Sinks that only the compressed model has: tokens of huge norm that its dense model has not.

Which tokens count is decided once, by dense norms (`usable_rows`), so that every condition is
measured on the same ones. Compression may raise the norm of others a hundredfold. A few such tokens
hold most of the variance then, and whatever is relative to it gets better the worse they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from prunelens.activations import Activations, covariance, participation_ratio
from prunelens.sae.autoencoder import SparseAutoencoder
from prunelens.sae.quality import evaluate_sae

NORM_MULTIPLE = 10.0  # of the dense median, where a study keeps every token
MOVED = ("participation_ratio", "fvu", "fvu_dense_var")  # what is given with and without them


def only_compressed(
    dense: Float[Tensor, " tokens"], norms: Float[Tensor, " tokens"], limit: float
) -> Bool[Tensor, " tokens"]:
    """Which tokens' norm passes the limit in the compressed model and not in the dense one."""
    return (norms > limit) & (dense <= limit)


def quality_on(
    saes: Sequence[SparseAutoencoder], dense: Activations, condition: Activations
) -> dict[str, float]:
    """MOVED, on the tokens that the two views count; of SAEs the mean.

    Args:
        saes: trained on the condition.
        dense, condition: the same tokens, of which the condition's are normalised as in training.
    Returns: NaN where there is no token or nothing varies.
    """
    if not condition.num_tokens:
        return dict.fromkeys(MOVED, math.nan)
    variance = float(covariance(dense).trace()) * dense.num_tokens
    found = [evaluate_sae(sae, condition, dense_variance=variance) for sae in saes]
    return {
        "participation_ratio": participation_ratio(covariance(condition)),
        "fvu": float(np.mean([each.fvu for each in found])),
        "fvu_dense_var": float(np.mean([each.fvu_dense_var for each in found])),
    }
