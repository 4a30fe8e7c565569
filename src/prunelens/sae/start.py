"""What a training starts from: random weights, or those of an SAE that was trained before."""

from __future__ import annotations

import copy
import hashlib

import torch

from prunelens.config import SaeConfig
from prunelens.errors import UserError
from prunelens.sae.architectures import ARCHITECTURES
from prunelens.sae.autoencoder import SparseAutoencoder

_NORM_TOLERANCE = 1e-3  # float32 leaves a trained row within 1e-6 of unit norm


def starting_sae(
    d_model: int, config: SaeConfig, *, init_seed: int, start: SparseAutoencoder | None
) -> SparseAutoencoder:
    """A new SAE to be trained: initialised from `init_seed` (methods §5), or a copy of `start`.

    Raises: UserError where k exceeds the dictionary, or `start` has another architecture or shape,
    or decoder rows that are not of unit norm, as no training leaves them.
    """
    num_latents = config.expansion * d_model
    if start is None:
        kind = ARCHITECTURES[config.architecture]
        return kind.initialise(d_model, num_latents, config.k, init_seed=init_seed)
    if start.architecture != config.architecture:
        raise UserError(
            f"start: the SAE is a {start.architecture!r} one, but sae.architecture is"
            f" {config.architecture!r}; start from an SAE of that architecture"
        )
    given, wanted = (start.d_model, start.num_latents, start.k), (d_model, num_latents, config.k)
    if given != wanted:
        raise UserError(
            "start: the SAE has d_model {}, {} latents and k {}, but the training has d_model {},"
            " {} latents and k {}; start from an SAE of that shape".format(*given, *wanted)
        )
    norms = torch.linalg.vector_norm(start.decoder_weight.detach(), dim=1)
    if not bool(((norms - 1).abs() <= _NORM_TOLERANCE).all()):  # NaN is not within it either
        worst = int((norms - 1).abs().argmax())
        raise UserError(
            f"start: decoder row {worst} has norm {float(norms[worst]):.4g}, not 1; start from an"
            " SAE that train_sae made"
        )
    return copy.deepcopy(start)


def fingerprint(sae: SparseAutoencoder) -> str:
    """SHA-256 of an SAE's weights."""
    digest = hashlib.sha256()
    for weight in sae.state_dict().values():
        digest.update(weight.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
