"""Any SAE, with one face: raw activations in, latents and a raw reconstruction out (RQ3).

Whatever normalisation an SAE wants is its own affair; who asks sees raw space only.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prunelens.activations import Statistics
from prunelens.config import Site
from prunelens.errors import UserError
from prunelens.sae.autoencoder import SparseAutoencoder
from prunelens.sae.buffers import Buffers
from prunelens.sae.kernels import SparseLatents
from prunelens.sae.sparse import sparse_latents

L0_TOLERANCE = 2.0  # a dense L0 outside 1/2 to 2 x the nominal one is no longer the same SAE
_DENSE_NUMBERS = 2**24  # latents written out at a time where only sparse ones are asked for: 64 MB


@runtime_checkable
class Coder(Protocol):
    """An encoder and a decoder between raw activations and dense latents."""

    @property
    def threshold(self) -> Tensor | None:
        """[latents]: what pre-activations must exceed; None where that is not what decides."""

    def encode(self, x: Tensor, threshold_scale: float, /) -> Tensor:
        """[tokens, d_model] raw to [tokens, latents], with all thresholds times a factor."""

    def decode(self, latents: Tensor, /) -> Tensor:
        """[tokens, latents] to [tokens, d_model] raw."""

    def directions(self) -> Tensor:
        """[latents, d_model]: what one unit of each latent adds to a reconstruction."""


class Rebuilt(NamedTuple):
    """What an SAE makes of some tokens."""

    states: Float[Tensor, "tokens d_model"]
    """The raw reconstruction."""
    num_active: Int[Tensor, " tokens"]
    """How many latents are not 0."""


@dataclasses.dataclass(frozen=True, eq=False)
class GivenSae:
    """An SAE that is used as it is: ours or someone else's."""

    name: str
    """As in tables."""
    architecture: str
    """topk, batchtopk, jumprelu, standard, gated, …"""
    d_model: int
    """Width of the activations."""
    num_latents: int
    """Size of the dictionary."""
    nominal_l0: float
    """The L0 that its makers state or that its k implies; NaN where nobody does."""
    coder: Coder
    """What computes."""
    device: torch.device
    """Where it computes and where its answers are."""
    site: Site | None = None
    """Where it was trained; None where its files do not say."""
    layer: int | None = None
    """The decoder block of the site; None where its files do not say."""
    decoder_shift: Float[Tensor, " d_model"] | None = None
    """Added to every reconstruction."""
    threshold_scale: float = 1.0
    """All thresholds are multiplied by this."""

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens latents"]:
        """Latents in float32, zeros written out; a latent is active where it is not 0."""
        return self.coder.encode(x.to(self.device, torch.float32), self.threshold_scale)

    @torch.no_grad()
    def encode_sparse(
        self, x: Float[Tensor, "tokens d_model"], *, buffers: Buffers | None = None
    ) -> SparseLatents:
        """`encode` without the zeros: of SAEs of others, of which a few know negative latents, all
        entries that are not 0. Not meant for `decode`.
        """
        x = x.to(self.device, torch.float32)
        if isinstance(self.coder, NormalisedSae):
            return self.coder.encode_sparse(x, self.threshold_scale, buffers=buffers)
        at_once = max(1, _DENSE_NUMBERS // self.num_latents)
        return sparse_latents(self.encode(part) for part in x.split(at_once))

    @torch.no_grad()
    def directions(self) -> Float[Tensor, "latents d_model"]:
        """Decoder rows in raw space: what one unit of each latent adds to a reconstruction.

        Of an SAE that normalises each token by itself, before that token's own scale.
        """
        return self.coder.directions()

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "tokens latents"]) -> Float[Tensor, "tokens d_model"]:
        """The raw reconstruction. Decode the batch that was encoded last: an SAE that normalises
        each token by itself remembers the scales of that one.
        """
        return self._shifted(self.coder.decode(latents))

    @torch.no_grad()
    def rebuild(self, x: Float[Tensor, "tokens d_model"]) -> Rebuilt:
        """decode(encode(x)), and how many latents each token uses.

        Only this way do the zeros of an SAE of ours stay unwritten: a sum of some decoder rows per
        token costs a small part of a product with all of them.
        """
        if isinstance(self.coder, NormalisedSae):
            x = x.to(self.device, torch.float32)
            states, num_active = self.coder.rebuild(x, self.threshold_scale)
        else:
            latents = self.encode(x)
            # Several times faster than (latents != 0).sum(1); a count in 16 bits would be rounded.
            norms = torch.linalg.vector_norm(latents, ord=0, dim=1, dtype=torch.float32)
            num_active = norms.long()
            states = self.coder.decode(latents)
        return Rebuilt(self._shifted(states), num_active)

    @property
    def threshold(self) -> Float[Tensor, " latents"] | None:
        """What pre-activations must exceed, the factor included; None where nothing is fixed."""
        if self.coder.threshold is None:
            return None
        return self.coder.threshold * self.threshold_scale

    def with_decoder_shift(self, delta: Float[Tensor, " d_model"]) -> GivenSae:
        """The same SAE with `delta` (raw space) added to its decoder bias, not to its encoder's.

        Latents stay as they are, also where the SAE subtracts its decoder bias from the input.
        """
        delta = delta.to(self.device, torch.float32)
        before = self.decoder_shift
        return dataclasses.replace(self, decoder_shift=delta if before is None else before + delta)

    def with_threshold_scale(self, factor: float) -> GivenSae:
        """The same SAE with all thresholds times `factor`. Raises UserError if it has none."""
        if self.coder.threshold is None:
            raise UserError(
                f"models.pretrained: {self.name} is a {self.architecture!r} SAE, which has no"
                " thresholds to refit; only jumprelu and batchtopk have"
            )
        return dataclasses.replace(self, threshold_scale=self.threshold_scale * factor)

    def _shifted(self, decoded: Tensor) -> Tensor:
        return decoded if self.decoder_shift is None else decoded + self.decoder_shift


def given(
    sae: SparseAutoencoder, statistics: Statistics, *, name: str, nominal_l0: float = math.nan
) -> GivenSae:
    """An SAE in normalised space together with the normalisation that it was trained under."""
    device = sae.decoder_bias.device
    return GivenSae(
        name=name,
        architecture=sae.architecture,
        d_model=sae.d_model,
        num_latents=sae.num_latents,
        nominal_l0=nominal_l0,
        coder=NormalisedSae(sae, *(part.to(device) for part in statistics)),
        device=device,
    )


def check_l0(sae: GivenSae, measured: float) -> str:
    """Compare the dense L0 with the nominal one; returns a note where there is nothing to compare.

    Raises: UserError outside 0.5 to 2 x: the wrong activation function (a TopK SAE run as ReLU),
        layer or BOS handling (methods §7).
    """
    nominal = sae.nominal_l0
    if math.isnan(nominal):
        return f"{sae.name}: its files name no L0, so the measured {measured:.1f} was not checked"
    if nominal / L0_TOLERANCE <= measured <= nominal * L0_TOLERANCE:
        return ""
    raise UserError(
        f"models.pretrained: {sae.name} has an L0 of {measured:.1f} on the dense model, but its"
        f" nominal L0 is {nominal:g}: wrong activation function, layer, model or BOS handling;"
        " check models.name, layer, site and corpus.bos, or set nominal_l0 if it is misstated"
    )


def check_fits(sae: GivenSae, model: str, *, d_model: int, site: Site, layer: int) -> None:
    """Raises UserError where the SAE is of another width, site or layer of the model."""
    if sae.d_model != d_model:
        raise UserError(
            f"models.pretrained: {sae.name} is made for d_model {sae.d_model}, {model} has"
            f" {d_model}; use an SAE of this model"
        )
    if sae.layer is not None and sae.layer != layer:
        raise UserError(
            f"models.pretrained.layer: {layer}, but {sae.name} was trained at layer {sae.layer};"
            f" set it to {sae.layer}"
        )
    if sae.site is not None and sae.site != site:
        raise UserError(
            f"models.site: {site!r}, but {sae.name} was trained at {sae.site!r}; set it to that"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class NormalisedSae:
    """An SAE of ours: x_hat = (x - mean) / sigma in, sigma * x_rec + mean out."""

    sae: SparseAutoencoder
    mean: Float[Tensor, " d_model"]
    sigma: Float[Tensor, " d_model"]

    @property
    def threshold(self) -> Tensor | None:
        """See Coder."""
        shared = self.sae.threshold
        return None if shared is None else shared.expand(self.sae.num_latents)

    def encode(self, x: Tensor, threshold_scale: float, /) -> Tensor:
        """See Coder."""
        return self.sae.dense_latents(self.encode_sparse(x, threshold_scale))

    def encode_sparse(
        self, x: Tensor, threshold_scale: float, *, buffers: Buffers | None = None
    ) -> SparseLatents:
        """See GivenSae."""
        sae = self.sae
        if sae.threshold is not None and threshold_scale != 1.0:
            sae = sae.with_threshold(sae.threshold * threshold_scale)
        return sae.encode((x - self.mean) / self.sigma, buffers=buffers)

    def decode(self, latents: Tensor, /) -> Tensor:
        """See Coder."""
        rec = latents @ self.sae.decoder_weight + self.sae.decoder_bias
        return self.sigma * rec + self.mean

    def directions(self) -> Tensor:
        """See Coder."""
        return self.sae.decoder_weight * self.sigma

    def rebuild(self, x: Tensor, threshold_scale: float) -> Rebuilt:
        """See GivenSae; before any shift."""
        latents = self.encode_sparse(x, threshold_scale)
        rec = self.sae.decode(latents)
        return Rebuilt(self.sigma * rec + self.mean, (latents.values != 0).sum(1))
