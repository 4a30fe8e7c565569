"""What RQ3 keeps of the dense model, so that every pruned one is compared with it."""

from __future__ import annotations

import json
import pathlib
from typing import NamedTuple

from jaxtyping import Float, Float64, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunelens.analyses.statistics import Estimate
from prunelens.analyses.verdict import Recovery, drop_estimate, ratio_estimate


class DenseReference(NamedTuple):
    """What the dense model fixes for all conditions: token sets, scales, and what to compare with.

    Squares are raw; cross-entropies are sums of nats per window, in the order that was drawn.
    """

    eval_norms: Float[Tensor, "windows context"]
    """|x| of every token of the evaluation windows."""
    refit_norms: Float[Tensor, "refit_windows context"]
    """The same of the windows for refitting."""
    norm_limit: float
    """Tokens above it are left out of `norm_filtered`; infinity: none is."""
    sigma: Float64[Tensor, " d_model"]
    """Deviation per dimension, by which `fvu` divides errors and variances."""
    saes: tuple[str, ...]
    """Names, in the order of the tensors below."""
    refit_l0: Float64[Tensor, "saes sets"]
    """L0 on the windows for refitting, which refitted thresholds are to give again."""
    error: Float64[Tensor, "saes sets groups"]
    """Sum over tokens of |x - x_rec|^2, of the SAEs as they are, by group of documents."""
    variance: Float64[Tensor, "sets groups"]
    """Sum over tokens of |x - mean|^2."""
    nats_model: Float64[Tensor, "sets ce_windows"]
    """The model as it is."""
    nats_mean_ablated: Float64[Tensor, "sets ce_windows"]
    """With the mean at the positions of the set."""
    nats_sae: Float64[Tensor, "saes sets ce_windows"]
    """With the reconstruction of the SAE as it is there."""

    def save(self, path: pathlib.Path) -> None:
        """Write it as one safetensors file."""
        tensors = {name: part.contiguous() for name, part in self._asdict().items() if _is(part)}
        rest = {name: part for name, part in self._asdict().items() if not _is(part)}
        save_file(tensors, path, metadata={"numbers": json.dumps(rest)})

    @classmethod
    def load(cls, path: pathlib.Path) -> DenseReference:
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            numbers = json.loads(file.metadata()["numbers"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        numbers["saes"] = tuple(numbers["saes"])
        return cls(**tensors, **numbers)

    def estimates(
        self,
        sae: str,
        number: int,
        error: Float64[Tensor, " groups"],
        variance: Float64[Tensor, " groups"],
        recovery: Recovery,
        groups: Int[Tensor, " windows"],
    ) -> dict[str, Estimate]:
        """The numbers of the verdict: an SAE compared with itself, as it is, on the dense model.

        Args:
            number: of the position set.
            error, variance: of the model under test, as the tensors here.
            recovery: of the model under test.
            groups: of the windows that it was measured on, the first that were drawn.
        """
        of_dense = (self.error[self.saes.index(sae), number].numpy(), self.variance[number].numpy())
        return {
            "fvu_dense_var_ratio": ratio_estimate(error.numpy(), of_dense[1], *of_dense),
            "fvu_raw_ratio": ratio_estimate(error.numpy(), variance.numpy(), *of_dense),
            "ce_drop": self.drop(sae, number, recovery, groups),
        }

    def drop(
        self, sae: str, number: int, recovery: Recovery, groups: Int[Tensor, " windows"]
    ) -> Estimate:
        """`ce_drop` alone."""
        model, mean_ablated = self.nats_model[number], self.nats_mean_ablated[number]
        with_sae = self.nats_sae[self.saes.index(sae), number]
        return drop_estimate(recovery, Recovery.by_group(model, mean_ablated, with_sae, groups))


def _is(part: object) -> bool:
    return isinstance(part, Tensor)
