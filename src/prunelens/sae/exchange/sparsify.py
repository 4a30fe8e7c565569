"""SAEs in the files of EleutherAI's sparsify (1.3), read without that library.

Its TopK SAE takes b_dec off its input and adds it to its output:
z = TopK(ReLU(W_enc (x - b_dec) + b_enc), k), x_rec = W_dec z + b_dec.
That is ours under a normalisation with mean b_dec and sigma 1, so ours computes it. What counts is
its `encode` and `decode`: trained with `multi_topk`, its `forward` returns 4 k latents instead.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from prunelens.activations import Statistics
from prunelens.config import Site
from prunelens.errors import UserError
from prunelens.sae.autoencoder import refuse_other_sizes
from prunelens.sae.exchange.formats import GivenSae, given
from prunelens.sae.exchange.own_folder import PLACE_FILE
from prunelens.sae.topk import TopKSAE

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae.safetensors"
# Our names of the tensors and sparsify's. The shapes are the same: latents first.
TENSORS = {
    "encoder_weight": "encoder.weight",
    "encoder_bias": "encoder.bias",
    "decoder_weight": "W_dec",
    "decoder_bias": "b_dec",
}
# By a module's first name, the only site that its output, or a part's, can be in any model. Whether
# it is depends on the model: where blocks normalise what a sublayer adds, that norm has the site.
_SITES: dict[str, Site] = {
    "": "resid_post",
    "mlp": "mlp_out",
    "feed_forward": "mlp_out",
    "post_feedforward_layernorm": "mlp_out",
    "post_mlp_layernorm": "mlp_out",
    "self_attn": "attn_out",
    "attn": "attn_out",
    "attention": "attn_out",
    "post_attention_layernorm": "attn_out",
    "post_self_attn_layernorm": "attn_out",
}


class Hookpoint(NamedTuple):
    """A place as sparsify names it: after a module of the model."""

    name: str
    """All of it, e.g. `layers.3.mlp`."""
    layer: int
    """The decoder block."""
    module: str
    """A module within the block, e.g. `mlp`; empty for the block itself."""

    def can_be(self, site: Site) -> bool:
        """Whether the place may be that site; of a module that is not known: any but the block."""
        known = _SITES.get(self.module.partition(".")[0])
        return site == known if known else site != "resid_post"


def sparsify_sae(folder: pathlib.Path, *, name: str, device: str = "cpu") -> GivenSae:
    """A TopK SAE that sparsify saved, or that `export_sae` wrote for it. Weights become float32.

    Where it belongs and its nominal L0 are read off `place.json`, which `export_sae` adds; what
    that does not say is k and what the folder's name says (`hookpoint`). The name of a module
    within a block gives the layer alone: whether it is our site depends on the model.
    Raises: UserError where the folder is incomplete or damaged, or holds anything but a TopK SAE.
    """
    config = _checked(folder, name)
    tensors = _tensors(folder, config)
    sae = TopKSAE(config.d_in, config.width, config.k)
    with torch.no_grad():
        for ours, theirs in TENSORS.items():
            getattr(sae, ours).copy_(tensors[theirs])
        normalisation = Statistics(sae.decoder_bias.clone(), torch.ones(config.d_in))
        sae.decoder_bias.zero_()
    place = _place(folder)
    found = given(sae.to(device), normalisation, name=name, nominal_l0=place.l0 or float(config.k))
    return dataclasses.replace(found, site=place.site, layer=place.layer)


def hookpoint(folder: pathlib.Path) -> Hookpoint | None:
    """What a folder's name says of its SAE: `layers.3`, `h.3.mlp`, `layers.3/seed1`; else None."""
    folder = folder.absolute()
    name = folder.parent.name if re.fullmatch(r"seed\d+", folder.name) else folder.name
    found = re.fullmatch(r"(?:.+\.)?(?:layers|h|blocks)\.(\d+)(?:\.(.+))?", name)
    return Hookpoint(name, int(found[1]), found[2] or "") if found else None


class _Config(BaseModel):
    """What of `cfg.json` decides what the SAE computes, with sparsify's defaults."""

    d_in: int = Field(ge=1)
    num_latents: int = Field(0, ge=0)
    expansion_factor: int = Field(32, ge=1)
    k: int = Field(32, ge=1)
    activation: str = "topk"
    transcode: bool = False
    skip_connection: bool = False
    signed: bool = False  # of older releases

    @property
    def width(self) -> int:
        return self.num_latents or self.d_in * self.expansion_factor


class _Place(BaseModel):
    """`place.json`, as far as it is known."""

    site: Site | None = None
    layer: int | None = Field(None, ge=0)
    l0: float | None = Field(None, gt=0)


_Model = TypeVar("_Model", _Config, _Place)


def _checked(folder: pathlib.Path, name: str) -> _Config:
    """The description of a TopK SAE. Raises UserError where it is of anything else."""
    config = _described(_Config, folder / CONFIG_FILE)
    kinds = (
        (config.transcode, "a transcoder, which does not rebuild each activation from itself"),
        (config.skip_connection, "an SAE with a skip connection, which goes past its latents"),
        (config.signed, "an SAE that keeps negative latents ('signed')"),
        (config.activation != "topk", f"an SAE with activation {config.activation!r}"),
    )
    for is_it, kind in kinds:
        if is_it:
            raise UserError(f"models.pretrained: {name} is {kind}; name a TopK SAE")
    if config.k > config.width:
        raise UserError(
            f"models.pretrained: {folder / CONFIG_FILE} has k {config.k} and only {config.width}"
            " latents; correct it or save the SAE again"
        )
    return config


def _tensors(folder: pathlib.Path, config: _Config) -> dict[str, Tensor]:
    """The four tensors under sparsify's names, with the shapes that `config` speaks of."""
    path = folder / WEIGHTS_FILE
    try:
        found = load_file(path)
        refuse_other_sizes(found, width=config.d_in, latents=config.width)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from None
    matrix = (config.width, config.d_in)
    shape_of = {"encoder_weight": matrix, "encoder_bias": matrix[:1]}
    shape_of |= {"decoder_weight": matrix, "decoder_bias": matrix[1:]}
    expected = {TENSORS[name]: shape for name, shape in shape_of.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if shapes != expected:
        raise UserError(
            f"models.pretrained: {path} holds {_shown(shapes)}, but {CONFIG_FILE} speaks of"
            f" {_shown(expected)}; save the SAE again"
        )
    return found


def _shown(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shapes[name])}" for name in sorted(shapes)) or "nothing"


def _place(folder: pathlib.Path) -> _Place:
    path = folder / PLACE_FILE
    told = _described(_Place, path) if path.exists() else _Place()
    named = hookpoint(folder)
    if told.layer is not None or named is None:
        return told
    return _Place(site=None if named.module else "resid_post", layer=named.layer, l0=told.l0)


def _described(model: type[_Model], path: pathlib.Path) -> _Model:
    try:
        return model.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first: Any = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise _damaged(path, f"{field}: {first['msg']}" if field else first["msg"]) from None
    except (UnicodeDecodeError, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: pathlib.Path, problem: object) -> UserError:
    told = " ".join(str(problem).split())[:150]
    return UserError(
        f"models.pretrained: {path} is no file of a sparsify SAE ({told}); save the SAE again"
    )
