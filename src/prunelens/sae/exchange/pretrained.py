"""SAEs by name or folder; other people's through SAELens' own loading code (extra `saelens`)."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import importlib
import json
import math
import pathlib
import re
import warnings
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prunelens.config import PretrainedSaeConfig, Site
from prunelens.errors import UserError
from prunelens.sae.exchange import sparsify
from prunelens.sae.exchange.formats import GivenSae
from prunelens.sae.exchange.own_folder import own_sae

_OWN_FILE, _SAELENS_FILES = "sae.json", ("cfg.json", "sae_weights.safetensors")
_SPARSIFY_FILES = (sparsify.CONFIG_FILE, sparsify.WEIGHTS_FILE)
_FAILURES = (  # of SAELens on files that are not what they should be
    *(ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError, MemoryError),
    *(OSError, SafetensorError),
)
_SITES: dict[str, Site] = {
    "hook_resid_post": "resid_post",
    "hook_mlp_out": "mlp_out",
    "hook_attn_out": "attn_out",
}
# Normalisations that SAELens applies by itself, token by token. The others need a number that is
# not in the SAE's file unless it was folded into the weights, and then they read `none`.
_NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")


def load_given_sae(config: PretrainedSaeConfig, *, device: str = "cpu") -> GivenSae:
    """An SAE from a local folder (ours, SAELens' or sparsify's) or a release that SAELens knows.

    A release may also be a hub repository that SAELens saved to; sae_id is then a folder in it.
    Weights are used in float32.
    Raises: UserError where it is unknown, missing, out of reach, of a kind that cannot stand in
        for a site's activations, or where SAELens is needed and not installed.
    """
    if config.folder is None:
        assert config.release and config.sae_id
        return _from_release(config, config.release, config.sae_id, device)
    folder = pathlib.Path(config.folder).expanduser()
    if (folder / _OWN_FILE).is_file():
        sae = own_sae(folder, name=config.label, device=device)
    elif _holds(folder, _SAELENS_FILES):
        return _from_folder(config, folder, device)
    elif _holds(folder, _SPARSIFY_FILES):
        sae = sparsify.sparsify_sae(folder, name=config.label, device=device)
    else:
        raise UserError(
            f"models.pretrained.folder: {config.folder!r} holds neither sae.json (prunelens) nor"
            f" {' and '.join(_SAELENS_FILES)} (SAELens) nor {' and '.join(_SPARSIFY_FILES)}"
            " (sparsify); name the folder of one SAE"
        )
    stated = config.nominal_l0
    return sae if stated is None else dataclasses.replace(sae, nominal_l0=stated)


def _holds(folder: pathlib.Path, names: Iterable[str]) -> bool:
    return all((folder / name).is_file() for name in names)


def _from_release(config: PretrainedSaeConfig, release: str, sae_id: str, device: str) -> GivenSae:
    _saelens()  # the extra's absence is told before anything is looked up
    directory = _module("loading.pretrained_saes_directory").get_pretrained_saes_directory()
    known = directory.get(release)
    if known is None and "/" not in release:
        raise UserError(
            f"models.pretrained.release: {release!r} is neither a release of SAELens nor a hub"
            f" repository{_nearest(release, directory)}"
        )
    if known is not None and sae_id not in known.saes_map:
        raise UserError(
            f"models.pretrained.sae_id: {sae_id!r} is not in release {release!r}"
            f"{_nearest(sae_id, known.saes_map)}"
        )
    with _told(config), _shapes_from_the_file():
        sae = _saelens().SAE.from_pretrained(release, sae_id, device=device, dtype="float32")
    nominal = math.nan
    if known is not None:
        nominal = known.expected_l0.get(sae_id) or _l0_in_path(known.saes_map[sae_id])
    return _wrapped(sae, config, nominal, device)


def _from_folder(config: PretrainedSaeConfig, folder: pathlib.Path, device: str) -> GivenSae:
    with _told(config):
        described = json.loads((folder / _SAELENS_FILES[0]).read_text(encoding="utf-8"))
        if not isinstance(described, dict):
            raise TypeError("cfg.json is no object")
        _refuse_other_sizes(described, folder / _SAELENS_FILES[1])
        sae = _saelens().SAE.load_from_disk(folder, device=device, dtype="float32")
        nominal = _described_l0(described)
    return _wrapped(sae, config, nominal, device)


def _refuse_other_sizes(described: dict[str, Any], path: pathlib.Path) -> None:
    """Raises ValueError where cfg.json speaks of more than the file holds: SAELens would reserve
    that much memory before it looks.
    """
    with safe_open(path, framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    held = sum(map(math.prod, shapes))
    if described.get("d_in", 0) * described.get("d_sae", 0) > held:
        raise ValueError(f"cfg.json speaks of more than the {held} numbers that there are")


def _described_l0(described: dict[str, Any]) -> float:
    """The L0 that `export_sae` states, else k; NaN where a file has neither."""
    metadata, arguments = (
        found if isinstance(found := described.get(name), dict) else {}
        for name in ("metadata", "activation_fn_kwargs")
    )
    # Older files keep k among the arguments of the activation function; reading it there too
    # catches a TopK SAE that is loaded as ReLU.
    return float(metadata.get("l0") or described.get("k") or arguments.get("k") or math.nan)


def _wrapped(sae: Any, config: PretrainedSaeConfig, nominal: float, device: str) -> GivenSae:
    """One face for an SAELens SAE. Raises UserError where it is not an SAE of one site."""
    architecture = sae.cfg.architecture()
    if "transcoder" in architecture or architecture == "temporal":
        raise UserError(
            f"models.pretrained: {config.label} is a {architecture!r}, which does not rebuild each"
            " token's activation from itself; name an SAE"
        )
    if sae.cfg.normalize_activations not in _NORMALISATIONS:
        raise UserError(
            f"models.pretrained: {config.label} wants its inputs normalised by"
            f" {sae.cfg.normalize_activations!r}, and its files do not hold by how much; fold the"
            " factor into its weights (SAELens: fold_activation_norm_scaling_factor) and save it"
        )
    site, layer = _place(sae.cfg.metadata.hook_name, config)
    sae.requires_grad_(False).eval()
    nominal = config.nominal_l0 or (nominal if nominal > 0 else _trained_l0(sae))
    return GivenSae(
        name=config.label,
        architecture=architecture,
        d_model=sae.cfg.d_in,
        num_latents=sae.cfg.d_sae,
        nominal_l0=nominal,
        coder=_SaeLensCoder(sae),
        device=torch.device(device),
        site=site,
        layer=layer,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _SaeLensCoder:
    """Encode and decode as SAELens does them."""

    sae: Any

    @property
    def threshold(self) -> Tensor | None:
        return self.sae.threshold if self.sae.cfg.architecture() == "jumprelu" else None

    def encode(self, x: Tensor, threshold_scale: float, /) -> Tensor:
        sae = self.sae
        if threshold_scale != 1.0:
            # A copy that shares all parameters but the threshold.
            sae = copy.copy(sae)
            sae._parameters = dict(sae._parameters)
            sae.threshold = nn.Parameter(self.sae.threshold * threshold_scale, requires_grad=False)
        return sae.encode(x)

    def decode(self, latents: Tensor, /) -> Tensor:
        return self.sae.decode(latents)

    def directions(self) -> Tensor:
        rows = self.sae.W_dec
        # Its TopK SAEs may take latents to be in units of their decoder rows' norms.
        if getattr(self.sae.cfg, "rescale_acts_by_decoder_norm", False):
            return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return rows.clone()


# --- what SAELens knows -------------------------------------------------------------------------


def _trained_l0(sae: Any) -> float:
    """The L0 that a TopK SAE has by construction, or that training aimed at; else NaN."""
    if sae.cfg.architecture() == "topk":
        return float(sae.cfg.k)
    details = sae.cfg.metadata.training_architecture_details or {}
    return float(details.get("target_l0") or details.get("k") or math.nan)


def _l0_in_path(path: str) -> float:
    """Gemma Scope names its folders after the L0 that was measured: `average_l0_82`."""
    found = re.search(r"average_l0_(\d+)", path)
    return float(found.group(1)) if found else math.nan


def _place(hook: str | None, config: PretrainedSaeConfig) -> tuple[Site | None, int | None]:
    """Site and layer of a hook name of TransformerLens; (None, None) where there is no name."""
    if not hook:
        return None, None
    found = re.fullmatch(r"blocks\.(\d+)\.(hook_\w+)", hook)
    if found and found.group(2) in _SITES:
        return _SITES[found.group(2)], int(found.group(1))
    if found and found.group(2) == "hook_resid_pre" and int(found.group(1)) > 0:
        return "resid_post", int(found.group(1)) - 1  # what enters a block is what left the last
    raise UserError(
        f"models.pretrained: {config.label} was trained at {hook!r}; SAEs of resid_post, mlp_out"
        " and attn_out can be tried"
    )


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are for example {', '.join(map(repr, names[:3]))}"


# --- SAELens itself -----------------------------------------------------------------------------


def _saelens() -> ModuleType:
    """SAELens, imported when it is needed: that takes seconds."""
    try:
        return importlib.import_module("sae_lens")
    except ImportError as error:
        raise UserError(
            f"models.pretrained: SAEs of others are loaded by SAELens, which cannot be imported"
            f" ({error}); pip install 'prunelens[saelens]'"
        ) from None


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"sae_lens.{name}")


@contextlib.contextmanager
def _shapes_from_the_file() -> Iterator[None]:
    """Let SAELens read tensor shapes from the file that it is about to load.

    For Gemma Scope 2 it asks the hub's server for the file's header, so that an SAE which lies
    in the cache could not be loaded without a connection.
    """
    loaders: Any = _module("loading.pretrained_sae_loaders")
    original = loaders.get_safetensors_tensor_shapes

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        with safe_open(loaders.hf_hub_download(repo_id, filename), framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118

    loaders.get_safetensors_tensor_shapes = shapes
    try:
        yield
    finally:
        loaders.get_safetensors_tensor_shapes = original


@contextlib.contextmanager
def _told(config: PretrainedSaeConfig) -> Iterator[None]:
    """SAELens' failures as one line; its warnings are about running models of its own."""
    from huggingface_hub import errors

    where = f"models.pretrained: {config.label}"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="sae_lens")
            yield
    except errors.GatedRepoError:
        raise UserError(
            f"{where} is gated; accept its licence on its hub page, then log in with"
            " `hf auth login`"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(f"{where}: the hub has no such public repository; check release") from None
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"{where} is not in the local cache and the hub cannot be reached; connect once, or"
            " give a folder"
        ) from None
    except errors.EntryNotFoundError as error:
        raise UserError(f"{where} has no such file ({_line(error)}); check sae_id") from None
    except _FAILURES as error:
        raise UserError(
            f"{where} cannot be loaded by SAELens ({_line(error)}); check release, sae_id or folder"
        ) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__
