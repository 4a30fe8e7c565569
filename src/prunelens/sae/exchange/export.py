"""Our SAEs in the files of SAELens and of sparsify, normalisation folded in (methods §5).

Neither library is needed. Both formats hold the same four tensors, since both libraries can take
b_dec off the input: z = TopK(ReLU(W_enc (x - b_dec) + b_enc), k), x_rec = W_dec z + b_dec, on raw
activations. Decoder rows carry sigma and are not of unit norm; the files say that nothing is to be
rescaled by that norm. An SAE that is read with a threshold is a JumpReLU SAE for SAELens, as its
own BatchTopK SAEs are once trained; sparsify has none.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any, Literal, NamedTuple, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from prunelens.activations import Statistics
from prunelens.errors import UserError
from prunelens.prune.checkpoint import check_target
from prunelens.sae.autoencoder import SparseAutoencoder
from prunelens.sae.exchange import sparsify
from prunelens.sae.exchange.formats import GivenSae, NormalisedSae
from prunelens.sae.exchange.own_folder import PLACE_FILE, own_sae
from prunelens.sae.kernels import Weights
from prunelens.temporary import new_folder

ExportFormat = Literal["saelens", "sparsify"]

SAELENS_CONFIG, SAELENS_WEIGHTS = "cfg.json", "sae_weights.safetensors"
_SAELENS_LAYOUT = "6.54.0"  # without a version SAELens takes a file for one from before 6.0


class ExportedSae(NamedTuple):
    """What `export_sae` wrote."""

    folder: pathlib.Path
    """Where it is."""
    format: ExportFormat
    """Whose files they are."""
    hook: str | None
    """The place as the library finds it: `hook_name` for SAELens, the folder's name for sparsify;
    None where the SAE's own files, or that name, do not say it."""


class _Layout(NamedTuple):
    """The files of an SAE in a library's own format."""

    weights_file: str
    tensors: dict[str, Tensor]
    descriptions: dict[str, dict[str, Any]]  # by file name
    hook: str | None


def export_sae(
    folder: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    format: ExportFormat,
    model: str | None = None,
) -> ExportedSae:
    """Write an SAE of ours so that SAELens (`SAE.load_from_disk`) or sparsify
    (`Sae.load_from_disk`) loads it and computes the same from raw activations.

    The files are safetensors and JSON. They are written beside `out`, flushed to disk and renamed,
    so `out` is whole or not there.

    Args:
        folder: an SAE with its normalisation: one that a study made (`folder` in
            `tables/sae_training.csv`).
        out: a new folder. sparsify reads an SAE's place off its name: call it as the module whose
            output is the site, `layers.3` or `layers.3.mlp` for block 3 of a Llama.
        format: whose files to write.
        model: the model's name, for the description.
    Raises: UserError where `folder` holds no SAE with its normalisation, `format` is unknown or
        knows no SAE of that architecture, `out` is named after another place or as
        `check_target`, or the folded weights overflow.
    """
    folder, out = (pathlib.Path(path).expanduser().absolute() for path in (folder, out))
    check_target(out)
    layout_of = {"saelens": _saelens, "sparsify": _sparsify}[export_format(format)]
    given = own_sae(folder, name=folder.name)
    coder = given.coder
    assert isinstance(coder, NormalisedSae)
    if format not in formats_of(given.architecture):
        raise UserError(
            f"--format: {format} has no {coder.sae.title} SAEs; export it as"
            f" {' or '.join(formats_of(given.architecture))}"
        )
    weights = fold_normalisation(coder.sae, Statistics(coder.mean, coder.sigma))
    if not all(bool(tensor.isfinite().all()) for tensor in weights):
        raise UserError(
            f"sae: {str(folder)!r} is no number in float32 once its normalisation is folded in"
            f" (sigma from {float(coder.sigma.min()):.3g} to {float(coder.sigma.max()):.3g});"
            " make the SAE again"
        )
    layout = layout_of(weights, given, coder.sae.k, model, out)
    _write(layout, out)
    return ExportedSae(out, format, layout.hook)


def export_format(name: str) -> ExportFormat:
    """A format by its name. Raises UserError where there is no such format."""
    for known in get_args(ExportFormat):
        if name == known:
            return known
    raise UserError(f"--format: {name!r} is neither saelens nor sparsify; give one of them")


def formats_of(architecture: str) -> tuple[ExportFormat, ...]:
    """Whose files can hold an SAE of ours."""
    return get_args(ExportFormat) if architecture == "topk" else ("saelens",)


@torch.no_grad()
def fold_normalisation(sae: SparseAutoencoder, normalisation: Statistics) -> Weights:
    """The weights that do on raw activations what `sae` does on normalised ones (methods §5).

    For pre-activations W_enc (x - b_dec) + b_enc, which stay what they are, and x_rec = W_dec z +
    b_dec. Computed in float64, returned in float32, [latents, d_model] as in SparseAutoencoder.
    """
    mean, sigma = normalisation.mean.double(), normalisation.sigma.double()
    w_enc, b_enc, w_dec, b_dec = (weight.double() for weight in sae.weights)
    folded_b_dec = (sigma * b_dec + mean).float()
    # methods' b_enc' + W_enc' b_dec', with the mean cancelled: a float32 sum of terms as large as
    # mean / sigma would lose the digits that count. Taking b_dec' as it was rounded lets b_enc
    # make up for that rounding, so that the latents stay exact however large the mean is.
    folded_b_enc = b_enc + w_enc @ ((folded_b_dec.double() - mean) / sigma)
    return Weights(
        encoder_weight=(w_enc / sigma).float(),
        encoder_bias=folded_b_enc.float(),
        decoder_weight=(w_dec * sigma).float(),
        decoder_bias=folded_b_dec,
    )


def _saelens(
    weights: Weights, given: GivenSae, k: int, model: str | None, _out: pathlib.Path
) -> _Layout:
    """SAELens 6: matrices are [d_in, d_sae] and [d_sae, d_in]."""
    threshold = given.threshold
    hook = None if given.site is None else f"blocks.{given.layer}.hook_{given.site}"
    metadata = {
        "sae_lens_version": _SAELENS_LAYOUT,
        "sae_lens_training_version": None,
        "model_name": model,
        "model_class_name": "HookedTransformer",
        "hook_name": hook,
        # Activations were those of the model as it is; TransformerLens would centre them where the
        # model has LayerNorms. SAELens writes the same of its own SAEs.
        "model_from_pretrained_kwargs": {"center_writing_weights": False},
        "l0": _stated_l0(given),
    }
    topk = {"architecture": "topk", "k": k, "rescale_acts_by_decoder_norm": False}
    config = {
        **(topk if threshold is None else {"architecture": "jumprelu"}),
        "d_in": given.d_model,
        "d_sae": given.num_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    tensors = {
        "W_enc": weights.encoder_weight.T.contiguous(),
        "b_enc": weights.encoder_bias,
        "W_dec": weights.decoder_weight,
        "b_dec": weights.decoder_bias,
    }
    if threshold is not None:
        tensors["threshold"] = threshold.contiguous()
    return _Layout(SAELENS_WEIGHTS, tensors, {SAELENS_CONFIG: config}, hook)


def _sparsify(
    weights: Weights, given: GivenSae, k: int, model: str | None, out: pathlib.Path
) -> _Layout:
    """sparsify 1.3. It tells of every field that it does not know, so the place gets a file."""
    named = sparsify.hookpoint(out)
    if named:
        _refuse_another_place(named, given)
    config = {
        "activation": "topk",
        "expansion_factor": max(1, given.num_latents // given.d_model),
        "normalize_decoder": False,
        "num_latents": given.num_latents,
        "k": k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": given.d_model,
    }
    tensors = {sparsify.TENSORS[name]: weight for name, weight in weights._asdict().items()}
    descriptions: dict[str, dict[str, Any]] = {
        sparsify.CONFIG_FILE: config,
        PLACE_FILE: {
            "site": given.site,
            "layer": given.layer,
            "model": model,
            "l0": _stated_l0(given),
        },
    }
    return _Layout(sparsify.WEIGHTS_FILE, tensors, descriptions, named.name if named else None)


def _refuse_another_place(named: sparsify.Hookpoint, given: GivenSae) -> None:
    """Of what the SAE's own files do not say, nothing is refused."""
    same_layer = given.layer is None or named.layer == given.layer
    if not same_layer or (given.site is not None and not named.can_be(given.site)):
        raise UserError(
            f"out: {named.name!r} is another place than {given.site} of layer {given.layer}, where"
            " the SAE is from; sparsify reads the place off that name, so give it the module's"
        )


def _stated_l0(given: GivenSae) -> float | None:
    return given.nominal_l0 if given.nominal_l0 > 0 else None


def _write(layout: _Layout, out: pathlib.Path) -> None:
    with new_folder(out) as partial:
        tensors = {name: tensor.cpu() for name, tensor in layout.tensors.items()}
        save_file(tensors, partial / layout.weights_file)
        for name, description in layout.descriptions.items():
            text = json.dumps(description, indent=2) + "\n"
            (partial / name).write_text(text, encoding="utf-8")
