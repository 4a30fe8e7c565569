"""Safetensors that lie, in each place where prunelens reads one that came from elsewhere."""

from __future__ import annotations

import json
import pathlib
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from hostile.tensor_files import HTML, KINDS, damaged
from prunelens.activations import Statistics
from prunelens.checkpoint import load_weights
from prunelens.config import CorpusConfig, ModelConfig, PretrainedSaeConfig
from prunelens.corpus import split_tokens
from prunelens.errors import UserError
from prunelens.prune.masks import FORMAT, load_masks, save_masks
from prunelens.sae.exchange.pretrained import load_given_sae
from prunelens.sae.topk import TopKSAE

PLACES = ("our SAE", "its normalisation", "SAELens", "sparsify", "tokens", "masks", "model")
WIDTH, LATENTS, K = 16, 64, 4
MEMORY = 6 * 2**30  # of addresses; what a child with torch and transformers takes, and some


class Place(NamedTuple):
    path: pathlib.Path
    read: Callable[[], Any]
    named: str  # in errors


@pytest.fixture(params=PLACES)
def place(
    request: pytest.FixtureRequest, tmp_path: pathlib.Path, checkpoint_folder: pathlib.Path
) -> Place:
    return made(request.param, tmp_path, checkpoint_folder)


def made(kind: str, folder: pathlib.Path, checkpoint: pathlib.Path) -> Place:
    """A whole file of its kind, and how it is read."""
    if kind == "model":
        model = shutil.copytree(checkpoint, folder / "model")
        config = ModelConfig(name=str(model))
        return Place(model / "model.safetensors", lambda: load_weights(config), "models.name")
    if kind == "masks":
        path = folder / "masks.safetensors"
        save_masks({"a": torch.ones(4, 8, dtype=torch.bool)}, path)
        return Place(path, lambda: load_masks(path), "masks")
    if kind == "tokens":
        path = folder / "tokens.safetensors"
        save_file({"tokens": torch.arange(64 * 16, dtype=torch.int32).view(64, 16)}, path)
        sizes = {"train_tokens": 160, "eval_tokens": 160, "calibration_tokens": 160}
        corpus = CorpusConfig(source="tokens", paths=(str(path),), context_tokens=16, **sizes)
        return Place(path, lambda: split_tokens(corpus, None), "corpus.paths")
    file = {"its normalisation": "normalisation.safetensors", "SAELens": "sae_weights.safetensors"}
    sae = folder / "sae"
    sae.mkdir()
    {"SAELens": of_saelens, "sparsify": of_sparsify}.get(kind, ours)(sae)
    config = PretrainedSaeConfig(layer=1, folder=str(sae))
    path = sae / file.get(kind, "sae.safetensors")
    return Place(path, lambda: load_given_sae(config), "sae" if "our" in kind else "")


def ours(folder: pathlib.Path) -> None:
    TopKSAE.initialise(WIDTH, LATENTS, K, init_seed=0).save(folder)
    Statistics(torch.zeros(WIDTH), torch.ones(WIDTH)).save(folder / "normalisation.safetensors")


def of_sparsify(folder: pathlib.Path) -> None:
    described = {"d_in": WIDTH, "num_latents": LATENTS, "k": K, "activation": "topk"}
    (folder / "cfg.json").write_text(json.dumps(described))
    names = {"encoder.weight": (LATENTS, WIDTH), "encoder.bias": (LATENTS,)}
    names |= {"W_dec": (LATENTS, WIDTH), "b_dec": (WIDTH,)}
    save_file({n: torch.zeros(shape) for n, shape in names.items()}, folder / "sae.safetensors")


def of_saelens(folder: pathlib.Path) -> None:
    described = {
        "architecture": "standard",
        "d_in": WIDTH,
        "d_sae": LATENTS,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": {"hook_name": "blocks.1.hook_resid_post"},
    }
    (folder / "cfg.json").write_text(json.dumps(described))
    names = {"W_enc": (WIDTH, LATENTS), "b_enc": (LATENTS,)}
    names |= {"W_dec": (LATENTS, WIDTH), "b_dec": (WIDTH,)}
    save_file(
        {n: torch.zeros(shape) for n, shape in names.items()}, folder / "sae_weights.safetensors"
    )


# --- the file -------------------------------------------------------------------------------------


def test_damaged_files_are_told_in_one_line(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing else is printed either, such as names of tensors that steer a terminal."""
    place.read()
    good, before = place.path.read_bytes(), peak_bytes()
    for kind in KINDS:
        place.path.write_bytes(damaged(kind, good))
        with pytest.raises(UserError) as caught:
            place.read()
        told = str(caught.value)
        assert told.isprintable() and "; " in told, (kind, told)
        assert told.startswith((place.named, "models.pretrained")), (kind, told)
        assert len(told) < 700, (kind, told)
    assert peak_bytes() - before < 300e6  # the sizes that they speak of are up to 2^80
    assert capfd.readouterr() == ("", "")


def test_a_folder_or_a_link_to_nowhere_in_its_place(place: Place) -> None:
    place.path.unlink()
    place.path.mkdir()
    with pytest.raises(UserError):
        place.read()
    place.path.rmdir()
    place.path.symlink_to(place.path.parent / "nowhere")
    with pytest.raises(UserError):
        place.read()


def peak_bytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_every_kind_of_damage_is_one() -> None:
    good = damaged_free()
    assert len({damaged(kind, good) for kind in KINDS} | {good}) == len(KINDS) + 1
    assert HTML.encode()[:10] in damaged("hostile name", good)
    assert struct.unpack("<Q", damaged("header of 2^63 bytes", good)[:8]) == (2**63,)


def damaged_free() -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * 32


@pytest.mark.parametrize(
    "shapes", ["[", "[" * 100_000, "[]", '{"a": 7}', '{"a": ["x", 8]}', '{"a": [-4, 8]}', "null"]
)
def test_masks_that_are_not_described(shapes: str, tmp_path: pathlib.Path) -> None:
    bits = {"a": torch.zeros(4, dtype=torch.uint8)}
    path = tmp_path / "masks.safetensors"
    save_file(bits, path, metadata={"format": FORMAT, "shapes": shapes})
    with pytest.raises(UserError, match=r"describe|damaged"):
        load_masks(path)
    save_file(bits, path, metadata={"format": FORMAT})
    with pytest.raises(UserError, match="describe"):
        load_masks(path)
    described = f'{{"format": "{FORMAT}", "shapes": {shapes}}}'
    for text in (described, shapes, json.dumps({"format": FORMAT})):
        save_file(bits, path, metadata={"masks": text})
        with pytest.raises(UserError, match=r"describe|damaged|no masks"):
            load_masks(path)


# --- what stands beside it ------------------------------------------------------------------------

DESCRIPTIONS = {"our SAE": "sae.json", "SAELens": "cfg.json", "sparsify": "cfg.json"}
SIZES = {"our SAE": ("d_model", "num_latents"), "SAELens": ("d_in", "d_sae")}
SIZES["sparsify"] = ("d_in", "num_latents")


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_descriptions_that_are_none(
    kind: str, tmp_path: pathlib.Path, checkpoint_folder: pathlib.Path
) -> None:
    found = made(kind, tmp_path, checkpoint_folder)
    path = found.path.with_name(DESCRIPTIONS[kind])
    good = json.loads(path.read_text())
    wrong: dict[str, Any] = dict.fromkeys(SIZES[kind], -1)
    texts = ["", "[]", "null", "NaN", "{", "[" * 100_000, "9" * 5000, '"x"']
    texts += [json.dumps({**good, **dict.fromkeys(SIZES[kind], size)}) for size in ("x", [1], {})]
    texts += [json.dumps(good | wrong)]
    for text in texts:
        path.write_text(text)
        with pytest.raises(UserError) as caught:
            found.read()
        assert str(caught.value).isprintable() and len(str(caught.value)) < 700
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError):
        found.read()


@pytest.mark.parametrize("kind", DESCRIPTIONS)
@pytest.mark.parametrize("size", [40_000, 10**9, 2**62])
def test_descriptions_of_more_than_there_is_reserve_no_memory(
    kind: str, size: int, tmp_path: pathlib.Path, checkpoint_folder: pathlib.Path
) -> None:
    """Refused by the sizes in the file's header; 40,000 squared would be 6.4 GB a matrix."""
    found = made(kind, tmp_path, checkpoint_folder)
    path = found.path.with_name(DESCRIPTIONS[kind])
    path.write_text(json.dumps(json.loads(path.read_text()) | dict.fromkeys(SIZES[kind], size)))
    with pytest.raises(UserError, match=r"described|speaks of|speak of"):
        found.read()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("place.json", {"site": "<b>", "layer": 1}),
        ("place.json", {"site": "resid_post", "layer": "../1"}),
        ("place.json", [1]),
        ("quality.json", {"l0": "x"}),
        ("quality.json", {"l0": 10**400}),
        ("quality.json", 7),
        ("meta.json", [1]),
    ],
)
def test_what_lies_beside_our_sae_is_checked(
    file: str, content: Any, tmp_path: pathlib.Path, checkpoint_folder: pathlib.Path
) -> None:
    found = made("our SAE", tmp_path, checkpoint_folder)
    found.path.with_name(file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=file.partition(".")[0]):
        found.read()


def test_a_place_sets_nothing_but_the_place(
    tmp_path: pathlib.Path, checkpoint_folder: pathlib.Path
) -> None:
    found = made("our SAE", tmp_path, checkpoint_folder)
    planted = {"site": "mlp_out", "layer": 3, "threshold_scale": 1e9, "coder": None}
    found.path.with_name("place.json").write_text(json.dumps(planted))
    sae = found.read()
    assert (sae.site, sae.layer, sae.threshold_scale) == ("mlp_out", 3, 1.0)
    assert sae.coder is not None


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint16, torch.complex64, torch.bool])
def test_token_ids_of_every_type(
    dtype: torch.dtype, tmp_path: pathlib.Path, checkpoint_folder: pathlib.Path
) -> None:
    """Ids that would not fit are refused, not wrapped around."""
    found = made("tokens", tmp_path, checkpoint_folder)
    ids = torch.arange(64 * 16).view(64, 16)
    save_file({"tokens": ids.to(dtype)}, found.path)
    if dtype in (torch.complex64, torch.bool):
        with pytest.raises(UserError, match="integers"):
            found.read()
    else:
        assert set(found.read().train.tolist()) <= set(ids.flatten().tolist())
    save_file({"tokens": torch.full((64, 16), 2**40, dtype=torch.int64)}, found.path)
    with pytest.raises(UserError, match="above"):
        found.read()


# --- memory ---------------------------------------------------------------------------------------

_READ_ALL = """
import pathlib, resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
from hostile.tensor_files import KINDS, damaged
from prunelens.config import ModelConfig
from prunelens.checkpoint import load_weights
from prunelens.errors import UserError
folder = pathlib.Path(sys.argv[1])
good = (folder / "model.safetensors").read_bytes()
for kind in KINDS:
    (folder / "model.safetensors").write_bytes(damaged(kind, good))
    try:
        load_weights(ModelConfig(name=str(folder)))
    except UserError as error:
        assert "memory" not in str(error), error
        print(kind)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is kept on Linux alone")
def test_a_process_that_may_have_little_memory_needs_no_more(
    tmp_path: pathlib.Path, checkpoint_folder: pathlib.Path
) -> None:
    folder = shutil.copytree(checkpoint_folder, tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", _READ_ALL.format(memory=MEMORY), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(pathlib.Path(__file__).parents[1]), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == list(KINDS)
