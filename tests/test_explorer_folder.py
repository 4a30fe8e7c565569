"""The explorer's folder: its format against a plain reading, and what it may replace."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pathlib
import re
from typing import Any

import numpy as np
import pytest

from explorer_world import (
    HOSTILE_STUDY,
    HOSTILE_TOKENS,
    NEEDLE_LATENT,
    SILENT_LATENT,
    explorer_world,
)
from prunelens.errors import UserError
from prunelens.report.explorer.content import DENSE, Explorer
from prunelens.report.explorer.folder import (
    CONTENT_SECURITY_POLICY,
    FRONT,
    MARKER,
    script,
    write_explorer,
    written_identity,
)
from prunelens.report.explorer.shards import packed, rounded

CALL = re.compile(r"prunelens\.receive\((.*)\);\n", re.DOTALL)


@pytest.fixture(scope="module")
def world() -> Explorer:
    return explorer_world()


@pytest.fixture(scope="module")
def folder(world: Explorer, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_explorer(world, tmp_path_factory.mktemp("explorer") / "out", identity="abc")


def read(folder: pathlib.Path, name: str) -> Any:
    """A data file as the page reads it."""
    text = (folder / "data" / f"{name}.js").read_text(encoding="ascii")
    call = CALL.fullmatch(text)
    assert call is not None
    told, data = json.loads(f"[{call[1]}]")
    assert told == name
    return data


def unpacked(data: dict[str, str]) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(data["base64"]), dtype=f"<{data['type']}")


# --- what the files hold --------------------------------------------------------------------------


def test_study_names_views_and_conditions(world: Explorer, folder: pathlib.Path) -> None:
    study = read(folder, "study")
    assert study["study"] == HOSTILE_STUDY
    assert study["labels"] is False
    (view,) = study["views"]
    assert view["numLatents"] == world.views[0].num_latents
    ids = [condition["id"] for condition in view["conditions"]]
    assert ids == ["c0", "c1", "c2"]
    assert [condition["hasOwn"] for condition in view["conditions"]] == [True, False, True]


def test_columns_come_back(world: Explorer, folder: pathlib.Path) -> None:
    view, data = world.views[0], read(folder, "v0/latents")
    for column, written in zip(view.columns, data["columns"], strict=True):
        np.testing.assert_array_equal(unpacked(written["values"]), column.values)
    for condition, written in zip(view.conditions, data["conditions"], strict=True):
        kept = unpacked(written["kept"])
        np.testing.assert_array_equal(np.where(kept < 0, np.nan, kept), condition.kept)
        if condition.match is None:
            assert written["match"] is None
        else:
            np.testing.assert_array_equal(unpacked(written["match"]), condition.match)


def test_own_dictionary_comes_back(world: Explorer, folder: pathlib.Path) -> None:
    condition = world.views[0].conditions[0]
    assert condition.own is not None
    data = read(folder, "v0/c0/latents")
    np.testing.assert_array_equal(unpacked(data["matchedBack"]), condition.matched_back)
    np.testing.assert_array_equal(
        unpacked(data["columns"][0]["values"]), condition.own.columns[0].values
    )
    assert not (folder / "data" / "v0" / "c1").exists()


def test_text_comes_back(world: Explorer, folder: pathlib.Path) -> None:
    tokens, data = world.views[0].tokens, read(folder, "v0/tokens")
    assert data["vocabulary"] == list(tokens.vocabulary)
    assert set(HOSTILE_TOKENS) <= set(data["vocabulary"])
    ids = unpacked(data["ids"]).reshape(-1, data["contextTokens"])
    np.testing.assert_array_equal(ids, tokens.ids)


@pytest.mark.parametrize("name", ["v0", "v0/c0"])
def test_contexts_come_back_to_three_digits(
    world: Explorer, folder: pathlib.Path, name: str
) -> None:
    view = world.views[0]
    own = view.conditions[0].own
    assert own is not None
    expected = view.contexts if name == "v0" else own.contexts
    found = [
        (first + i, context)
        for first, shard in ((0, 0), (128, 1), (256, 2))
        for i, latent in enumerate(read(folder, f"{name}/contexts-{shard:04d}")["latents"])
        for context in latent["contexts"]
    ]
    assert [latent for latent, _ in found] == expected.latent.tolist()
    for row, (_, context) in enumerate(found):
        assert (context["w"], context["p"]) == (expected.window[row], expected.position[row])
        assert ("s" in context) == expected.is_sample[row]
        assert context["a"].keys() == expected.activations.keys()
        for condition, pairs in context["a"].items():
            dense = np.zeros(2 * expected.either_side + 1)
            dense[context["n"]] = np.nan
            for offset, value in pairs:
                dense[offset] = value
            np.testing.assert_allclose(dense, expected.activations[condition][row], rtol=5e-3)


def test_effects_come_back(world: Explorer, folder: pathlib.Path) -> None:
    effects = world.views[0].effects
    assert effects is not None
    latent = read(folder, "v0/contexts-0000")["latents"][NEEDLE_LATENT]
    tokens, logits = zip(*latent["promoted"], strict=True)
    assert list(tokens) == effects.promoted[NEEDLE_LATENT].tolist()
    np.testing.assert_allclose(logits, effects.promoted_logits[NEEDLE_LATENT], rtol=5e-3)
    assert all(logit < 0 for _, logit in latent["suppressed"])


@pytest.mark.parametrize("either_side", [3, 15, 20])  # one word of bits, and two
def test_places_say_where_latents_fire(tmp_path: pathlib.Path, either_side: int) -> None:
    world = explorer_world(num_latents=40, num_conditions=1, either_side=either_side)
    contexts = world.views[0].contexts
    places = read(write_explorer(world, tmp_path / "out"), "v0/places")
    offsets, fires = unpacked(places["offsets"]), unpacked(places["fires"])
    assert offsets[SILENT_LATENT] == offsets[SILENT_LATENT + 1]
    for latent in range(40):
        rows = slice(offsets[latent], offsets[latent + 1])
        assert set(contexts.latent[rows]) <= {latent}
    for row, words in enumerate(fires.reshape(-1, places["words"]).tolist()):
        for offset in range(2 * either_side + 1):
            said = bool(words[offset // 32] >> (offset % 32) & 1)
            assert said == bool(contexts.activations[DENSE][row, offset] > 0)


def test_a_token_that_one_condition_did_not_read_is_null(tmp_path: pathlib.Path) -> None:
    world = explorer_world(num_latents=20, num_conditions=1)
    world.views[0].contexts.activations["c0"][0, 12] = np.nan
    context = read(write_explorer(world, tmp_path / "out"), "v0/contexts-0000")["latents"][0][
        "contexts"
    ][0]
    assert [12, None] in context["a"]["c0"]
    assert 12 not in context["n"]
    assert all(value is not None for _, value in context["a"][DENSE])


def test_rounding_keeps_three_digits() -> None:
    values = np.array([0.0, 1.23456, -0.000123456, 98765.4, 999.9, 2.5e-7, 1.0], np.float32)
    assert rounded(values) == [0.0, 1.23, -0.000123, 98800.0, 1000.0, 2.5e-07, 1.0]


@pytest.mark.parametrize(
    ("values", "kind"), [([0, 255], "u1"), ([0, 256], "u2"), ([-1, 5], "i1"), ([-1, 70000], "i4")]
)
def test_integers_take_the_fewest_bytes(values: list[int], kind: str) -> None:
    data = packed(np.array(values))
    assert data is not None
    assert data["type"] == kind
    assert unpacked(data).tolist() == values


# --- safety ---------------------------------------------------------------------------------------


def test_index_has_the_policy_and_nothing_inline(folder: pathlib.Path) -> None:
    index = (folder / "index.html").read_text(encoding="utf-8")
    assert f'content="{CONTENT_SECURITY_POLICY}"' in index
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert "connect-src" not in CONTENT_SECURITY_POLICY  # default-src 'none' holds
    assert re.findall(r"<script(?! src=\"[\w./]+\"></script>)", index) == []
    assert not re.search(r"<style|\sstyle=|\son\w+=|https?:|javascript:", index)
    for name in re.findall(r"(?:src|href)=\"([^\"]+)\"", index):
        assert name == "data:," or (folder / name).is_file()


def test_every_script_is_named_in_the_index_or_loaded_by_one(folder: pathlib.Path) -> None:
    index = (folder / "index.html").read_text(encoding="utf-8")
    own = [path.relative_to(folder) for path in [*folder.glob("*.js"), *folder.glob("app/*.js")]]
    assert own
    for path in own:
        assert f'src="{path.as_posix()}"' in index
        text = (folder / path).read_text(encoding="utf-8")
        assert '"use strict";' in text.splitlines()[0]
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text)


def test_hostile_text_stays_data(folder: pathlib.Path) -> None:
    assert "<script" not in (folder / "index.html").read_text().split("<body>")[0]
    for path in (folder / "data").rglob("*.js"):
        text = path.read_text(encoding="ascii")
        assert "<" not in text
        assert text.count("\n") == 1
    assert "\\u2028" in (folder / "data/v0/tokens.js").read_text()
    assert script("a", {"b": "\ud800</script>"}) == (
        'prunelens.receive("a",{"b":"\\ud800\\u003c/script>"});\n'
    )


def test_vendored_files_are_those_of_the_registry() -> None:
    listed = {"VERSIONS.json"}
    for library in json.loads((FRONT / "vendor" / "VERSIONS.json").read_text()):
        assert library["integrity"].startswith("sha512-")
        assert any(name.endswith(".LICENSE") for name in library["files"])
        for name, file in library["files"].items():
            content = (FRONT / "vendor" / name).read_bytes()
            assert hashlib.sha256(content).hexdigest() == file["sha256"], name
            listed.add(name)
    assert {path.name for path in (FRONT / "vendor").iterdir()} == listed


@pytest.mark.parametrize("address", ["javascript:alert(1)", "data:text/html,x", "//x.org", " a"])
def test_links_lead_to_pages(tmp_path: pathlib.Path, address: str) -> None:
    with pytest.raises(UserError, match="links"):
        write_explorer(explorer_world(num_latents=20), tmp_path / "out", links={"x": address})
    assert list(tmp_path.iterdir()) == []


# --- the folder -----------------------------------------------------------------------------------


def test_an_explorer_is_replaced_whole(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    first = write_explorer(explorer_world(num_latents=300), out, identity="one", labels=True)
    assert first == out
    assert read(out, "study")["labels"] is True
    assert written_identity(out) == "one"
    (out / "left over").write_text("x")
    write_explorer(explorer_world(num_latents=20), out, identity="two", links={"r": "../r.html"})
    assert written_identity(out) == "two"
    assert read(out, "study")["links"] == [{"text": "r", "address": "../r.html"}]
    assert not (out / "left over").exists()
    assert not (out / "data/v0/contexts-0001.js").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "name", ["app.js", "index.html", "data/study.js", "data/v0/latents.js", MARKER]
)
@pytest.mark.parametrize("damage", ["cut", "planted", "link", "gone"])
def test_an_explorer_that_is_not_as_it_was_written_has_no_identity(
    tmp_path: pathlib.Path, name: str, damage: str
) -> None:
    out = write_explorer(explorer_world(num_latents=20), tmp_path / "out", identity="one")
    path, content = out / name, (out / name).read_bytes()
    path.unlink()
    if damage == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    elif damage != "gone":
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"[" * 10**5)
    assert written_identity(out) is None
    if name != MARKER:  # without it, it may be anybody's
        write_explorer(explorer_world(num_latents=20), out, identity="one")
        assert written_identity(out) == "one"
        (out / "data/v0/more.js").write_text("alert(1)")
        assert written_identity(out) is None


@pytest.mark.timeout(20)
def test_a_pipe_in_the_place_of_the_marker_is_not_waited_for(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / MARKER)
    assert written_identity(tmp_path) is None


def test_an_empty_folder_is_filled(tmp_path: pathlib.Path) -> None:
    write_explorer(explorer_world(num_latents=20), tmp_path)
    assert (tmp_path / MARKER).is_file()


def test_other_folders_are_left_alone(tmp_path: pathlib.Path) -> None:
    world, thesis = explorer_world(num_latents=20), tmp_path / "thesis.tex"
    thesis.write_text("years of work")
    with pytest.raises(UserError, match="holds something else"):
        write_explorer(world, tmp_path)
    with pytest.raises(UserError, match="is a file"):
        write_explorer(world, thesis)
    (tmp_path / MARKER).write_text("[]")
    with pytest.raises(UserError, match="holds something else"):
        write_explorer(world, tmp_path)
    assert thesis.read_text() == "years of work"
    assert written_identity(tmp_path) is None


def test_a_failure_leaves_the_old_explorer(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write_explorer(explorer_world(num_latents=20), tmp_path / "out", identity="old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("prunelens.report.explorer.folder.places", fail)
    with pytest.raises(OSError, match="disk full"):
        write_explorer(explorer_world(num_latents=20), out, identity="new")
    assert written_identity(out) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
