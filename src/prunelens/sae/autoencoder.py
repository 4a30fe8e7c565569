"""What all sparse autoencoders of ours have in common, whatever their architecture (methods §5)."""

from __future__ import annotations

import abc
import copy
import json
import pathlib
from collections.abc import Mapping
from typing import ClassVar, Self

import safetensors
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prunelens.errors import UserError
from prunelens.sae import kernels
from prunelens.sae.buffers import Buffers
from prunelens.sae.kernels import SparseLatents, Weights

_WEIGHTS_FILE = "sae.safetensors"
DESCRIPTION_FILE = "sae.json"


def refuse_other_sizes(tensors: Mapping[str, Tensor], *, width: int, latents: int) -> None:
    """Raises ValueError where a dictionary of such sizes would not fit among these tensors.

    Asked before memory is reserved: a description may speak of any size.
    """
    held = sum(tensor.numel() for tensor in tensors.values())
    if width * latents > held:
        raise ValueError(f"{latents} latents of width {width} are described, {held} numbers held")


class SparseAutoencoder(nn.Module, abc.ABC):
    """z = read(W_enc x_hat + b_enc); x_rec = W_dec z + b_dec, in normalised space.

    `encoder_weight` and `decoder_weight` are both [latents, d_model]: row i of the decoder is the
    feature vector of latent i. `encoder_bias` is [latents], `decoder_bias` [d_model]; all float32.
    An architecture is a subclass that says which latents are kept, a line in `ARCHITECTURES` and
    its name in `config`.
    """

    architecture: ClassVar[str]
    """Its name in studies and files."""
    title: ClassVar[str]
    """Its name in words."""
    threshold: Tensor | None
    """What a pre-activation must exceed for its latent to fire, the same for all; None where that
    is not what decides."""

    def __init__(self, d_model: int, num_latents: int, k: int) -> None:
        super().__init__()
        if k < 1 or d_model < 1:
            raise UserError(f"sae.k: k {k} and d_model {d_model} must be at least 1")
        if k > num_latents:
            raise UserError(
                f"sae.k: {k} is more than the {num_latents} latents of the dictionary; lower"
                " sae.k or raise sae.expansion"
            )
        self.k = k
        self.encoder_weight = nn.Parameter(torch.zeros(num_latents, d_model))
        self.encoder_bias = nn.Parameter(torch.zeros(num_latents))
        self.decoder_weight = nn.Parameter(torch.zeros(num_latents, d_model))
        self.decoder_bias = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("threshold", None)

    @abc.abstractmethod
    def read(self, pre: Float[Tensor, "tokens latents"]) -> SparseLatents:
        """The latents that these pre-activations keep wherever the SAE is used."""

    def keep(self, pre: Float[Tensor, "tokens latents"]) -> SparseLatents:
        """The latents that a training step keeps of its batch, and what the SAE learns by it."""
        return self.read(pre)

    @classmethod
    def initialise(cls, d_model: int, num_latents: int, k: int, *, init_seed: int) -> Self:
        """An untrained SAE: Gaussian decoder rows of unit norm, encoder = decoder, biases 0.

        Raises: UserError where k exceeds the number of latents.
        """
        sae = cls(d_model, num_latents, k)
        generator = torch.Generator().manual_seed(init_seed)
        rows = torch.randn(num_latents, d_model, generator=generator)
        rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        with torch.no_grad():
            sae.decoder_weight.copy_(rows)
            sae.encoder_weight.copy_(rows)
        return sae

    @property
    def num_latents(self) -> int:
        """Size of the dictionary."""
        return len(self.encoder_weight)

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return len(self.decoder_bias)

    @property
    def weights(self) -> Weights:
        """The four parameters."""
        return Weights(
            self.encoder_weight, self.encoder_bias, self.decoder_weight, self.decoder_bias
        )

    def encode(
        self, x_hat: Float[Tensor, "tokens d_model"], *, buffers: Buffers | None = None
    ) -> SparseLatents:
        """The kept latents of every token, in float32.

        Who encodes many batches without gradients gives `buffers`, which spares fresh memory.
        """
        weights = self.encoder_weight, self.encoder_bias
        return self.read(kernels.pre_activations(x_hat, *weights, buffers=buffers))

    def encode_sparse(
        self, x: Float[Tensor, "tokens d_model"], *, buffers: Buffers | None = None
    ) -> SparseLatents:
        """`encode`, under the name that all SAEs have for it (see SparseEncoder)."""
        return self.encode(x, buffers=buffers)

    def with_threshold(self, threshold: Tensor) -> Self:
        """The same SAE, which shares its weights, with another threshold."""
        other = copy.copy(self)
        other._buffers = {**self._buffers, "threshold": threshold}
        return other

    def decode(self, latents: SparseLatents) -> Float[Tensor, "tokens d_model"]:
        """The reconstruction, in normalised space."""
        return kernels.decode(latents, self.decoder_weight, self.decoder_bias)

    def dense_latents(self, latents: SparseLatents) -> Float[Tensor, "tokens latents"]:
        """The latents with their zeros written out."""
        return kernels.dense_latents(latents, self.num_latents)

    def forward(self, x_hat: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
        """decode(encode(x_hat))."""
        return self.decode(self.encode(x_hat))

    def refuse_non_finite(self) -> None:
        """Raise UserError where a weight is NaN or infinite: top k could pass over it unnoticed."""
        for name, weight in self.state_dict().items():
            if not bool(weight.isfinite().all()):
                raise UserError(f"sae: {name} holds NaN or infinity; train or export it again")

    def save(self, folder: str | pathlib.Path) -> None:
        """Write `sae.safetensors` and `sae.json` into `folder`, which is made if missing."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: held.cpu().contiguous() for name, held in self.state_dict().items()}
        save_file(tensors, folder / _WEIGHTS_FILE)
        description = {
            "architecture": self.architecture,
            "d_model": self.d_model,
            "num_latents": self.num_latents,
            "k": self.k,
        }
        text = json.dumps(description, indent=2) + "\n"
        (folder / DESCRIPTION_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> Self:
        """The SAE that `save` wrote.

        Raises: UserError where the files are missing, damaged, do not fit each other, or hold
            weights that are no numbers.
        """
        folder = pathlib.Path(folder)
        try:
            text = (folder / DESCRIPTION_FILE).read_text(encoding="utf-8")
            described = json.loads(text)
            if described["architecture"] != cls.architecture:
                raise UserError(
                    f"sae: {folder} holds a {described['architecture']!r} SAE, not"
                    f" {cls.architecture!r}"
                )
            sizes = [described[name] for name in ("d_model", "num_latents", "k")]
            if not all(type(size) is int for size in sizes):
                raise TypeError(f"d_model, num_latents and k are {sizes}, not integers")
            tensors = load_file(folder / _WEIGHTS_FILE)
            refuse_other_sizes(tensors, width=sizes[0], latents=sizes[1])
            sae = cls(*sizes)
            sae.load_state_dict(tensors)
            sae.refuse_non_finite()
        except FileNotFoundError as error:
            raise UserError(
                f"sae: {folder} lacks {pathlib.Path(str(error.filename or _WEIGHTS_FILE)).name};"
                f" give a folder that {cls.__name__}.save wrote"
            ) from None
        except (
            OSError,  # a folder in a file's place
            KeyError,
            TypeError,
            ValueError,
            RuntimeError,
            safetensors.SafetensorError,
        ) as error:
            problem = " ".join(str(error).split())[:150]
            raise UserError(
                f"sae: {folder} is damaged or incomplete ({problem}); make it again"
            ) from None
        return sae
