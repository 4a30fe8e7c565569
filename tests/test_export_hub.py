"""SAEs and pruned models passed on: hub folders, cards, uploads to a hub on this machine."""

import hashlib
import json
import logging
import re
import shutil
import sys

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import fake_hub
from prunelens.activations import Statistics
from prunelens.cards import Sharing, _templates, escaped
from prunelens.cli import main
from prunelens.config import (
    CorpusConfig,
    ModelConfig,
    PretrainedSaeConfig,
    PruningConfig,
    study_from_data,
)
from prunelens.errors import UserError
from prunelens.hub import push_folder
from prunelens.model import load_model
from prunelens.prune import (
    ModelRecord,
    PruningRecord,
    TextRecord,
    load_masks,
    masks_sha256,
    prune_model,
    save_checkpoint,
    save_masks,
)
from prunelens.prune.apply import MatrixSparsity
from prunelens.prune.card import checkpoint_card, data_sets
from prunelens.prune.record import PerplexityRecord
from prunelens.sae.exchange.pretrained import load_given_sae
from prunelens.sae.topk import TopKSAE
from prunelens.study.alone import alone_in
from prunelens.study.exports import _path, export_checkpoint, export_hub
from prunelens.study.folder import open_study
from prunelens.study.results import study_results
from prunelens.study.run import run_study
from tiny_study import run_with_pool, tiny_study, write_text

# What SAELens says of each SAE that names how to load its model, its own included.
pytestmark = pytest.mark.filterwarnings("ignore:\\s*This SAE has non-empty model_from_pretrained")

D, LATENTS, K = 16, 48, 4
HOSTILE = "<script>alert(1)</script>|`x`*b*[a](http://evil.example)\n# not a heading\u202e"


def own_sae(folder, *, place=("resid_post", 3)):
    """An SAE of ours with a strong normalisation, outside any study."""
    generator = torch.Generator().manual_seed(0)
    sae = TopKSAE.initialise(D, LATENTS, K, init_seed=0)
    with torch.no_grad():
        sae.encoder_bias.copy_(0.1 * torch.randn(LATENTS, generator=generator))
        sae.decoder_bias.copy_(0.3 * torch.randn(D, generator=generator))
    sae.save(folder)
    mean, sigma = 5 * torch.randn(D, generator=generator), torch.rand(D, generator=generator) + 0.1
    Statistics(mean, sigma).save(folder / "normalisation.safetensors")
    if place:
        text = json.dumps({"site": place[0], "layer": place[1]})
        (folder / "place.json").write_text(text, encoding="utf-8")
    return mean + sigma * torch.randn(64, D, generator=generator)


@pytest.fixture(scope="module")
def study(checkpoint_folder, tmp_path_factory, pool):
    """A finished study of two prunings and two seeds; only look at it."""
    root = tmp_path_factory.mktemp("study")
    out = root / "tiny"
    base = tiny_study(checkpoint_folder, write_text(root / "text.txt"))
    data = {
        **base,
        "models": [{**base["models"][0], "short_name": "tiny"}],
        "sae": {**base["sae"], "steps": 8},
        "questions": ["stability", "survival", "sufficiency"],
    }
    with alone_in(out):
        outcome = run_with_pool(study_from_data(data), out, pool, run_study)
    assert [result.status for result in outcome.results] == ["done"] * 3
    return out


@pytest.fixture(scope="module")
def results(study):
    return study_results(*open_study(study))


@pytest.fixture(scope="module")
def hub_folder(study, tmp_path_factory):
    """All of the study's own SAEs."""
    return export_hub(study, tmp_path_factory.mktemp("exported") / "hub")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with fake_hub.running_hub(monkeypatch, tmp_path / "cache") as running:
        yield running


def sae_folder(study, results, condition, **which):
    """The artifact of one SAE of a condition."""
    table = results["sae_training"]
    table = table[table["run"] == f"tiny/L1/{condition}"]
    for column, value in {"training": "own", "rotated": False, **which}.items():
        table = table[table[column] == value]
    return study / table["folder"].iloc[0]


def section(text, heading):
    """What stands below a heading of a card."""
    found = re.search(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##+ |\Z)", text, re.M | re.S)
    return found[1]


def cells(text):
    """The rows of the first table, without its head."""
    lines = re.search(r"(?:^\|.*\n?)+", text, re.M)[0].strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def loaded(folder):
    return load_given_sae(PretrainedSaeConfig(layer=1, folder=str(folder)))


# ---- cards ----


def a_pruning(model, **more):
    """A record of half of one matrix."""
    pruning = PruningConfig(criterion="magnitude", scope="global", sparsity=0.5)
    matrix = MatrixSparsity("model.layers.0.mlp.down_proj", 8, 4, 0.5)
    return PruningRecord(model, pruning, (matrix,), "abc", **more)


def test_front_matter_is_what_the_hub_reads():
    model = ModelRecord("google/gemma-3-1b-pt", "hub", "f00", "float32")
    text = TextRecord(CorpusConfig(source="hub", dataset="HuggingFaceFW/fineweb-edu"), "f00")
    shown = checkpoint_card(a_pruning(model, calibration=text), Sharing("apache-2.0", "me/mine"))
    assert ModelCard(shown).data.to_dict() == {
        "base_model": "google/gemma-3-1b-pt",
        "datasets": ["HuggingFaceFW/fineweb-edu"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["prunelens", "pruning", "sparsity", "magnitude"],
    }
    title = "# google/gemma-3-1b-pt, pruned: magnitude-global-0.50\n"
    assert ModelCard(shown).text.strip().startswith(title)


def test_names_are_only_text():
    """As a Markdown reader sees them: GitHub's dialect, the hub's."""
    markdown_it = pytest.importorskip("markdown_it")
    reader = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table")
    perplexity = (PerplexityRecord(HOSTILE, 512, 2.0, 3.0),)
    record = a_pruning(ModelRecord(HOSTILE, "folder", "abc", "float32"), perplexity=perplexity)
    shown = reader.render(ModelCard(checkpoint_card(record, Sharing(base_model=HOSTILE))).text)
    assert not re.search("<(?!/?(h1|h2|p|pre|code|table|thead|tbody|tr|th|td)\\b)", shown)
    cell = re.search(r"<td>([^<]*)</td>\s*<td>512</td>", shown)[1]
    assert cell.replace("&lt;", "<").replace("&gt;", ">") == (
        "<script>alert(1)</script>|`x`*b*[a](http://evil.example) # not a heading�"
    )
    assert "://" not in escaped(HOSTILE) and "www." not in escaped("see www.evil.example")
    for name in ("gemma-3-1b", "wanda-row-0.50", "mlp.down_proj", "google/gemma-3-1b-pt"):
        assert escaped(name) == name  # what is harmless stays readable
    assert escaped("_a_ a_b") == r"\_a\_ a_b" and escaped("@me") == "&#64;me"


@pytest.mark.parametrize("dtype", ["```", "x\ny"])
def test_a_block_of_code_cannot_be_left(dtype):
    with pytest.raises(AssertionError):
        checkpoint_card(a_pruning(ModelRecord("a", "folder", "abc", dtype)), Sharing())


@pytest.mark.parametrize("name", ["", "Apache 2.0", "mit\ntags: [x]", "<b>", "-mit"])
def test_a_license_is_a_name_of_the_hubs(name):
    with pytest.raises(UserError, match=r"--license: .* is no license") as told:
        Sharing(name)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["mine", 'me/mine"); import os', "me/mine\n```", "a/b/c"])
def test_a_repository_in_a_cards_code_is_one(name):
    with pytest.raises(UserError, match=r"repository: .* is not USER/REPO"):
        Sharing(repository=name)


def in_words(record, sharing=None):
    """A model, or a text, as cards tell of it."""
    parts = _templates().get_template("parts.md.j2").module
    return str(
        parts.text(record) if isinstance(record, TextRecord) else parts.model(record, sharing)
    )


def test_where_a_model_and_a_text_come_from():
    sharing = Sharing(base_model="google/gemma-3-1b-pt")
    local = ModelRecord.of(ModelConfig(name="/secret/place/gemma"), "abc")
    assert "secret" not in in_words(local, sharing)
    assert "of google/gemma-3-1b-pt, as its exporter says" in in_words(local, sharing)
    hub_model = ModelRecord.of(ModelConfig(name="google/gemma-3-1b-pt", short_name="g"), "f00")
    assert in_words(hub_model, Sharing()) == "google/gemma-3-1b-pt (commit f00)"
    bundled = ModelRecord.of(ModelConfig(name="bundled"), "abc")
    assert bundled.origin == "shipped" and "ships with prunelens" in in_words(bundled, Sharing())
    corpus = CorpusConfig(source="files", paths=("/secret/place/a.txt",))
    text = TextRecord(corpus, "abc")
    assert "secret" not in json.dumps(text.as_json()) + in_words(text)
    corpus = CorpusConfig(source="hub", dataset="a/b", subset="<c>", split="d")
    assert in_words(TextRecord(corpus, "f00")) == (
        "data set a/b, subset &lt;c&gt;, split d, revision f00"
    )
    assert data_sets(TextRecord(corpus, "f00"), text, None) == ["a/b"]
    own = TextRecord(CorpusConfig(source="hub", dataset="/secret/place/rows"), "abc")
    assert "secret" not in json.dumps(own.as_json()) + in_words(own)
    assert data_sets(own) == []  # the hub would refuse a card with it


# ---- masks ----


def test_the_hash_of_masks_is_what_its_docstring_says(tmp_path):
    """From numpy alone; the same for loose, packed and stored masks in any order."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"b": (3, 5), "a": (4, 8), "é": (1, 7)}
    masks = {n: torch.rand(s, generator=generator) < 0.5 for n, s in shapes.items()}
    digest = hashlib.sha256()
    for name in sorted(masks):
        rows, columns = shapes[name]
        bits = np.packbits(masks[name].numpy().reshape(-1)).tobytes()
        digest.update(name.encode() + b"\0" + f"{rows}x{columns}".encode() + b"\0" + bits)
    save_masks(masks, tmp_path / "masks.safetensors")
    stored = load_masks(tmp_path / "masks.safetensors")
    backwards = dict(reversed(masks.items()))
    assert masks_sha256(masks) == masks_sha256(stored) == masks_sha256(backwards)
    assert masks_sha256(masks) == digest.hexdigest()


def test_any_change_of_masks_changes_their_hash():
    mask = torch.ones(4, 6, dtype=torch.bool)
    other = mask.clone()
    other[2, 3] = False
    variants = [{"a": mask}, {"b": mask}, {"a": other}, {"a": mask.T}, {"a": mask, "b": mask}, {}]
    assert len({masks_sha256(masks) for masks in variants}) == len(variants)


# ---- a hub folder of one SAE ----


def test_all_layouts_compute_the_same(tmp_path, sae_lens, sparsify):
    """By prunelens' own reading, and by the code of SAELens and sparsify."""
    x = own_sae(tmp_path / "own")
    out = export_hub(tmp_path / "own", tmp_path / "out").folder
    ours = loaded(tmp_path / "own")
    z = ours.encode(x)
    x_rec = ours.decode(z)
    with torch.no_grad():
        other = sae_lens.SAE.load_from_disk(out / "saelens")
        torch.testing.assert_close(other.encode(x), z, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(other(x), x_rec, atol=1e-4, rtol=1e-4)
        other = sparsify.Sae.load_from_disk(out / "sparsify")
        found = other.encode(x)
        torch.testing.assert_close(
            other.decode(found.top_acts, found.top_indices), x_rec, atol=1e-4, rtol=1e-4
        )
    again = loaded(out / "prunelens")
    assert torch.equal(again.encode(x), z) and torch.equal(again.decode(z), x_rec)
    for layout in ("saelens", "sparsify"):
        back = loaded(out / layout)
        assert (back.site, back.layer) == ("resid_post", 3)
        torch.testing.assert_close(back.encode(x), z, atol=1e-4, rtol=1e-4)


def test_what_nobody_knows_is_said(tmp_path):
    own_sae(tmp_path / "own", place=None)
    sharing = Sharing("mit", base_model=HOSTILE)
    out = export_hub(tmp_path / "own", tmp_path / "out", sharing=sharing).folder
    text = (out / "README.md").read_text(encoding="utf-8")
    parsed = ModelCard(text)
    assert parsed.data.license == "mit" and parsed.data.base_model is None  # it is no hub id
    assert "place unknown" in text and "<script>" not in text
    assert section(text, "How it was trained").startswith("\nNot known: training text")
    assert section(text, "The pruning of the model").strip() == "Not known."
    (row,) = cells(section(text, "The SAE"))
    assert row == ["."] + ["not known"] * 10 + [str(LATENTS), str(K), str(D)] + ["not known"] * 2
    facts = json.loads((out / "prunelens.json").read_text(encoding="utf-8"))
    assert facts["saes"][0]["training"] is None and facts["saes"][0]["quality"]["fvu"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "own"]


def test_a_stated_model_is_the_base_model(tmp_path):
    own_sae(tmp_path / "own")
    sharing = Sharing(base_model="google/gemma-3-1b-pt")
    out = export_hub(tmp_path / "own", tmp_path / "out", sharing=sharing).folder
    assert ModelCard.load(out / "README.md").data.base_model == "google/gemma-3-1b-pt"
    described = json.loads((out / "saelens" / "cfg.json").read_text(encoding="utf-8"))
    assert described["metadata"]["model_name"] == "google/gemma-3-1b-pt"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("place.json", '{"site": "<b>", "layer": 3}', r"place.json names site '<b>' and layer 3"),
        ("place.json", '{"site": "mlp_out", "layer": "3"}', r"names site 'mlp_out' and layer '3'"),
        ("quality.json", '{"l0": 3, "fvu": "low"}', r"quality.json cannot be read"),
        ("quality.json", "[]", r"quality.json cannot be read"),
        ("sae.safetensors", "no weights", r"damaged or incomplete"),
        ("meta.json", '{"config": {"rotated": true}}', r"control in a rotated space"),
    ],
)
def test_a_damaged_sae_is_told_and_leaves_nothing(name, content, message, tmp_path):
    own_sae(tmp_path / "own")
    (tmp_path / "own" / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as told:
        export_hub(tmp_path / "own", tmp_path / "out")
    assert "\n" not in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_what_is_no_sae_and_no_place_for_one(tmp_path):
    with pytest.raises(UserError, match=r"holds neither sae.json .* nor study.yaml"):
        export_hub(tmp_path, tmp_path / "out")
    own_sae(tmp_path / "own")
    with pytest.raises(UserError, match=r"out: .* exists and is not an empty folder"):
        export_hub(tmp_path / "own", tmp_path / "own")


# ---- hub folders of a study ----


def test_a_studys_folder_holds_every_own_sae_and_no_control(hub_folder, results):
    table = results["sae_quality"]
    expected = [f"{row.run}/seed-{row.seed}" for row in table.itertuples()]
    assert list(hub_folder.saes) == expected and len(expected) == 6
    for path in expected:
        assert sorted(p.name for p in (hub_folder.folder / path).iterdir()) == [
            "prunelens",
            "saelens",
            "sparsify",
        ]
    written = [p.name for p in hub_folder.folder.rglob("*") if p.is_file()]
    assert not [name for name in written if name.endswith((".parquet", ".pt", ".pkl"))]
    assert "meta.json" not in written  # it names the machine


def test_the_cards_numbers_are_those_of_the_tables(hub_folder, results):
    text = (hub_folder.folder / "README.md").read_text(encoding="utf-8")
    facts = json.loads((hub_folder.folder / "prunelens.json").read_text(encoding="utf-8"))
    rows = cells(section(text, "The SAEs"))
    table = results["sae_quality"]
    measured = ["fvu", "fvu_raw", "fvu_dense_var", "l0"]
    for shown, exact, row in zip(rows, facts["saes"], table.itertuples(), strict=True):
        assert (
            shown[:2] == [f"{row.run}/seed-{row.seed}", row.model] and exact["folder"] == shown[0]
        )
        assert shown[2:6] == [str(row.layer), "resid_post", row.run.split("/")[2], str(row.seed)]
        assert [float(x) for x in shown[6:10]] == [round(getattr(row, m), 4) for m in measured]
        assert [int(x) for x in shown[10:12]] == [row.alive, row.num_latents]
        assert int(shown[14]) == row.steps
        assert [exact["quality"][m] for m in measured] == [getattr(row, m) for m in measured]
        assert exact["training"]["init_seed"] == row.seed
    told = [{"label": p["label"], "masks_sha256": p["masks_sha256"]} for p in facts["prunings"]]
    assert [sae["training"]["pruning"] for sae in facts["saes"]] == [
        *(None, None),
        *(told[0], told[0]),
        *(told[1], told[1]),
    ]
    verdicts = cells(section(text, "Were they trained enough?"))
    judged = results["sufficiency"].set_index("run")["trained_enough"]
    assert {row[0]: row[1] for row in verdicts} == {
        run: {True: "yes", False: "no"}.get(enough, "not known") for run, enough in judged.items()
    }


def test_the_cards_prunings_are_those_of_the_masks(hub_folder, study):
    """Counted from the stored masks and hashed by definition."""
    text = (hub_folder.folder / "README.md").read_text(encoding="utf-8")
    plan, store = open_study(study)
    for run in plan.runs:
        if run.pruning is None:
            continue
        masks = load_masks(store.read(run.stages["prune"]) / "masks.safetensors")
        kept = sum(int(mask.sum()) for mask in masks.values())
        total = sum(mask.numel() for mask in masks.values())
        shown = dict(cells(section(text, f"tiny, {run.pruning.label}")))
        assert shown["masks, SHA-256"] == masks_sha256(masks)
        assert shown["sparsity achieved"] == f"{1 - kept / total:.6f}"
        assert float(shown["sparsity asked for"]) == run.pruning.sparsity
        assert shown["criterion"] == run.pruning.criterion
        wanda = run.pruning.criterion == "wanda"
        assert shown["calibration"].startswith("800 tokens" if wanda else "none")
        by_kind = dict(
            part.rsplit(" ", 1)
            for part in shown["sparsity achieved, by kind of matrix"].split(", ")
        )
        down = [m for name, m in masks.items() if name.endswith("mlp.down_proj")]
        share = 1 - sum(int(m.sum()) for m in down) / sum(m.numel() for m in down)
        assert len(down) == 3 and float(by_kind["mlp.down_proj"]) == round(share, 4)


def test_no_card_names_the_machine(hub_folder, study):
    """Neither the study's folder, nor the model's, nor the text's."""
    for path in hub_folder.folder.rglob("*"):
        if path.suffix in (".md", ".json"):
            told = path.read_text(encoding="utf-8")
            assert "/tmp" not in told and str(study.parent) not in told, path
    text = (hub_folder.folder / "README.md").read_text(encoding="utf-8")
    assert "The local checkpoint tiny, files' SHA-256" in text
    assert ModelCard(text).data.base_model is None


def test_one_sae_of_a_study_knows_its_study(study, results, tmp_path):
    folder = sae_folder(study, results, "wanda-row-0.30")
    out = export_hub(folder, tmp_path / "out", sharing=Sharing(repository="me/mine"))
    text = (out.folder / "README.md").read_text(encoding="utf-8")
    assert out.saes == (".",) and "# Sparse autoencoder of tiny, layer 1, resid\\_post" not in text
    assert "# Sparse autoencoder of tiny, layer 1, resid_post, wanda-row-0.30" in text
    trained = dict(cells(section(text, "How it was trained")))
    assert trained["steps"] == "8 of 64 tokens" and trained["start"] == "random"
    assert trained["mean and deviation"].startswith("of the activations it was trained on")
    pruned = dict(cells(section(text, "The pruning of the model")))
    assert pruned["criterion"] == "wanda" and len(pruned["masks, SHA-256"]) == 64
    assert ModelCard(text).data.tags[-1] == "pruning"
    dense = sae_folder(study, results, "dense")
    out = export_hub(dense, tmp_path / "dense")
    text = (out.folder / "README.md").read_text(encoding="utf-8")
    assert "None: the model is the dense one." in section(text, "The pruning of the model")
    assert "pruning" not in ModelCard(text).data.tags
    doubled = sae_folder(study, results, "dense", training="doubled")
    text = (export_hub(doubled, tmp_path / "doubled").folder / "README.md").read_text()
    trained = dict(cells(section(text, "How it was trained")))
    assert trained["steps"] == "16 of 64 tokens" and "twice as long" in trained["start"]


def test_a_study_that_is_not_whole(study, results, tmp_path, caplog):
    copy = tmp_path / "copy"
    shutil.copytree(study, copy)
    shutil.rmtree(sae_folder(copy, results, "dense"))
    with caplog.at_level(logging.WARNING):
        out = export_hub(copy, tmp_path / "out")
    assert len(out.saes) == 5 and "1 of the study's 6 SAEs are not there yet" in caplog.text
    damaged = sae_folder(copy, results, "wanda-row-0.30") / "sae.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"away")
    with pytest.raises(UserError, match=r"sae.safetensors is missing or damaged"):
        export_hub(copy, tmp_path / "other")
    moved = copy / "artifacts" / "sae" / "0123"
    own_sae(moved)
    with pytest.raises(UserError, match=r"none of those that its study.yaml asks for"):
        export_hub(moved, tmp_path / "other")
    shutil.rmtree(copy / "artifacts" / "sae")
    with pytest.raises(UserError, match=r"none of its SAEs is there yet"):
        export_hub(copy, tmp_path / "other")


def test_the_planted_world_is_not_passed_on(tmp_path):
    world = {"name": "w", "models": [{"name": "planted", "layers": [0]}], "questions": []}
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "study.yaml").write_text(json.dumps(world), encoding="utf-8")
    with pytest.raises(UserError, match=r"planted world"):
        export_hub(tmp_path / "w", tmp_path / "out")


# ---- checkpoints ----


def test_a_studys_pruned_model_is_rebuilt_exactly(study, checkpoint_folder, tmp_path):
    """As pruning the dense model again by the same recipe, from the text on."""
    found = export_checkpoint(study, "magnitude-global-0.50", tmp_path / "out")
    lm = load_model(ModelConfig(name=str(checkpoint_folder)))
    config = PruningConfig(criterion="magnitude", scope="global", sparsity=0.5)
    masks = prune_model(lm, config).masks
    assert found.record.masks_sha256 == masks_sha256(masks)
    rebuilt = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = lm.model.state_dict()
    assert rebuilt.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[n]) for n, t in rebuilt.state_dict().items())
    stored = load_masks(tmp_path / "out" / "prune_masks.safetensors")
    assert masks_sha256(stored) == found.record.masks_sha256


def test_a_checkpoints_card(study, results, tmp_path):
    sharing = Sharing("gemma", "me/mine", "google/gemma-3-1b-pt")
    out = export_checkpoint(study, "tiny/wanda-row-0.30", tmp_path / "out", sharing=sharing)
    text = (out.folder / "README.md").read_text(encoding="utf-8")
    assert ModelCard(text).data.to_dict() == {
        "base_model": "google/gemma-3-1b-pt",
        "library_name": "transformers",
        "license": "gemma",
        "pipeline_tag": "text-generation",
        "tags": ["prunelens", "pruning", "sparsity", "wanda"],
    }
    assert 'from_pretrained("me/mine", dtype="float32")' in text
    table = results["perplexity"]
    by_method = table.set_index("method")["perplexity"]
    (row,) = cells(section(text, "Perplexity"))
    assert row[:2] == ["files eval", "16"]
    assert row[2:] == [f"{by_method['dense']:.4f}", f"{by_method['wanda']:.4f}"]
    facts = json.loads((out.folder / "prunelens.json").read_text(encoding="utf-8"))
    achieved = table.set_index("method")["achieved_sparsity"]["wanda"]
    assert facts["achieved_sparsity"] == achieved and facts["pruning"]["scope"] == "row"
    assert facts["masks_sha256"] == out.record.masks_sha256
    assert sum(m["num_zeroed"] for m in facts["matrices"]) == round(
        achieved * sum(m["num_weights"] for m in facts["matrices"])
    )
    assert "/tmp" not in text and "/tmp" not in json.dumps(facts)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("wanda-row-0.99", r"--condition: 'wanda-row-0.99' is none .* tiny/magnitude-global-0.50"),
        ("dense", r"is none of the study's prunings"),
    ],
)
def test_conditions_that_a_study_lacks(condition, message, study, tmp_path):
    with pytest.raises(UserError, match=message):
        export_checkpoint(study, condition, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_has_the_dtype_of_the_dense_files(study, tmp_path, monkeypatch):
    """The study ran in float32; the masked weights are numbers of bfloat16 as before."""

    def narrow(config):
        lm = load_model(config)
        for weight in lm.model.parameters():
            weight.data = weight.bfloat16().float()
        return lm

    expected = export_checkpoint(study, "wanda-row-0.30", tmp_path / "wide").folder
    monkeypatch.setattr("prunelens.study.exports.stored_dtype", lambda _: torch.bfloat16)
    monkeypatch.setattr("prunelens.study.exports.load_model", narrow)
    out = export_checkpoint(study, "wanda-row-0.30", tmp_path / "out").folder
    wide, found = (load_file(folder / "model.safetensors") for folder in (expected, out))
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in wide.items())


def test_a_checkpoint_without_a_record_is_as_before(tiny_llama, tmp_path):
    save_checkpoint(tiny_llama, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in names
    assert not names & {"README.md", "prunelens.json", "prune_masks.safetensors"}


def test_kinds_of_matrices_in_any_architecture(tiny_lm):
    pruned = prune_model(tiny_lm, PruningConfig(criterion="magnitude", scope="row", sparsity=0.5))
    record = PruningRecord(
        ModelRecord("m", "folder", "abc", "float32"),
        PruningConfig(criterion="magnitude", scope="row", sparsity=0.5),
        pruned.report,
        masks_sha256(pruned.masks),
    )
    kinds = record.by_kind()
    assert all(0.4 < achieved <= 0.5 for achieved in kinds.values())
    assert len(kinds) == len(pruned.report) // len(tiny_lm.blocks)
    assert not [kind for kind in kinds if re.search(r"\d", kind.replace("c_", ""))]


# ---- upload ----


@pytest.mark.usefixtures("sae_lens", "sparsify")
def test_an_uploaded_folder_loads_from_the_hub(hub, tmp_path, monkeypatch):
    """Through the real client in both directions, by the lines that the card gives."""
    x = own_sae(tmp_path / "own")
    out = export_hub(tmp_path / "own", tmp_path / "out", sharing=Sharing(repository="me/mine"))
    assert push_folder(out.folder, "me/mine") == f"{hub.address}/me/mine"
    repository = hub.repositories["me/mine"]
    assert not repository.private and repository.messages == ["Upload by prunelens"]
    written = {str(p.relative_to(out.folder)) for p in out.folder.rglob("*") if p.is_file()}
    assert set(repository.files) == written
    for path, content in repository.files.items():
        assert (out.folder / path).read_bytes() == content
    expected = loaded(tmp_path / "own").encode(x)
    blocks = re.findall(r"```python\n(.*?)```", (out.folder / "README.md").read_text(), re.S)
    assert [len(block.strip().splitlines()) for block in blocks] == [3, 3, 3]
    for block in blocks:
        scope = {"activations": x}
        with torch.no_grad():
            exec(compile(block, "README.md", "exec"), scope)
            found = scope["sae"].encode(x)
        if hasattr(found, "top_acts"):
            empty = torch.zeros(len(x), LATENTS)
            found = empty.scatter(1, found.top_indices, found.top_acts)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    again = load_given_sae(PretrainedSaeConfig(layer=3, release="me/mine", sae_id="saelens"))
    assert (again.site, again.layer, again.nominal_l0) == ("resid_post", 3, K)


def test_private_repositories(hub, tmp_path):
    (tmp_path / "README.md").write_text("# x\n", encoding="utf-8")
    push_folder(tmp_path, "me/hidden", private=True)
    assert hub.repositories["me/hidden"].private
    push_folder(tmp_path, "me/hidden", private=True, message="again")  # what is there is kept
    push_folder(tmp_path, "me/open")
    before = dict(hub.repositories["me/open"].files)
    (tmp_path / "secret.txt").write_text("secret", encoding="utf-8")
    with pytest.raises(UserError, match=r"--private: 'me/open' is there already and public"):
        push_folder(tmp_path, "me/open", private=True)
    assert hub.repositories["me/open"].files == before


@pytest.mark.parametrize("name", ["mine", "a/b/c", "me/mine!", "me/", "/mine", "me/x--y", ""])
def test_repositories_that_cannot_be(name, hub, tmp_path):
    with pytest.raises(UserError, match=r"--push: .* is no repository of the hub") as told:
        push_folder(tmp_path, name)
    assert "\n" not in str(told.value) and not hub.repositories


def test_uploads_that_fail_are_told_in_one_line(hub, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("# x\n", encoding="utf-8")

    def told(repository="me/mine"):
        with pytest.raises(UserError) as caught:
            push_folder(tmp_path, repository)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "you may not write there" in told("someone/else")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not accept your token; run `hf auth login` again" in told()
    monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
    hub.failure = 400
    assert "'me/mine' cannot be uploaded" in told()
    hub.failure = None
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        huggingface_hub.close_session()
        assert "HF_HUB_OFFLINE is set" in told()
    huggingface_hub.close_session()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "check the connection" in told()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert told() == "--push: you are not logged in to the hub; run `hf auth login` first"


# ---- the commands ----


@pytest.fixture
def run(monkeypatch, capsys):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["prunelens", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capsys.readouterr()

    return command


def test_export_and_upload_a_study(hub, run, study, tmp_path):
    out = tmp_path / "out"
    command = ("export", study, "--format", "hub", "--out", out, "--license", "mit", "--json")
    code, told = run(*command, "--push", "me/saes", "--private")
    assert not code, told.err
    found = json.loads(told.out)
    assert found["pushed"] == f"{hub.address}/me/saes" and len(found["saes"]) == 6
    assert hub.repositories["me/saes"].private
    text = hub.repositories["me/saes"].files["README.md"].decode()
    assert ModelCard(text).data.license == "mit" and 'snapshot_download("me/saes")' in text


def test_export_a_checkpoint(run, study, tmp_path):
    out = tmp_path / "out"
    command = ("export", study, "--format", "checkpoint", "--out", out)
    code, told = run(*command, "--condition", "wanda-row-0.30")
    assert not code, told.err
    assert told.out.startswith("tiny/wanda-row-0.30, achieved sparsity 0.")
    assert (out / "prune_masks.safetensors").is_file()


def test_prune_writes_a_card_and_uploads(hub, run, checkpoint_folder, study, tmp_path):
    out, text = tmp_path / "out", study.parent / "text.txt"
    settings = {"source": "files", "paths": f"[{text}]", "document": "line"}
    settings |= {"context_tokens": 16, "calibration_tokens": 800}
    settings |= {"train_tokens": 3200, "eval_tokens": 1600}
    options = [part for k, v in settings.items() for part in ("--set", f"corpus.{k}={v}")]
    command = ("prune", checkpoint_folder, "--out", out, "--sparsity", 0.3, *options, "--json")
    code, told = run(*command, "--device", "cpu", "--push", "me/pruned")
    assert not code, told.err
    found = json.loads(told.out)
    facts = json.loads((out / "prunelens.json").read_text(encoding="utf-8"))
    assert found["masks_sha256"] == facts["masks_sha256"]
    weights = load_file(out / "model.safetensors")
    stayed = {m["name"]: weights[f"{m['name']}.weight"] != 0 for m in facts["matrices"]}
    assert masks_sha256(stayed) == facts["masks_sha256"]
    assert masks_sha256(load_masks(out / "prune_masks.safetensors")) == facts["masks_sha256"]
    same_text = export_checkpoint(study, "wanda-row-0.30", tmp_path / "same").record.calibration
    assert facts["calibration"] == same_text.as_json()
    card_text = hub.repositories["me/pruned"].files["README.md"].decode()
    assert "Not measured" in section(card_text, "Perplexity")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "gguf"), "--format: 'gguf' is none of saelens, sparsify, hub, checkpoint"),
        (("--format", "checkpoint"), "--condition: a checkpoint is of one pruning"),
        (("--format", "hub", "--condition", "x"), "--condition: it goes with --format checkpoint"),
        (("--format", "saelens", "--push", "me/x"), "--push: it goes with --format hub"),
        (("--format", "saelens", "--license", "mit"), "--license: it goes with --format hub"),
        (("--format", "hub", "--private"), "--private: it is about --push"),
        (("--format", "hub", "--push", "nobody"), "--push: 'nobody' is no repository"),
        (("--format", "hub", "--license", "M I T"), "--license: 'M I T' is no license"),
    ],
)
def test_wrong_options_are_told_before_anything_is_done(options, message, run, tmp_path):
    code, told = run("export", tmp_path / "nowhere", "--out", tmp_path / "out", *options)
    assert (code, told.out) == (2, "") and message in told.err
    assert len(told.err.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def test_the_files_stay_where_an_upload_fails(hub, run, tmp_path):
    own_sae(tmp_path / "own")
    command = ("export", tmp_path / "own", "--format", "hub", "--out", tmp_path / "out")
    code, told = run(*command, "--push", "someone/else")
    assert code == 2 and "the files are in" in told.err
    assert len(told.err.strip().splitlines()) == 1
    assert (tmp_path / "out" / "README.md").is_file()


@pytest.mark.parametrize(
    "options", [("hub",), ("saelens",), ("checkpoint", "--condition", "wanda-row-0.30")]
)
def test_a_link_is_refused_before_the_work(options, run, study, tmp_path, monkeypatch):
    monkeypatch.setattr("prunelens.sae.exchange.export.own_sae", None)
    monkeypatch.setattr("prunelens.study.exports._Facts", lambda *_: None)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    code, told = run("export", study, "--out", tmp_path / "link", "--format", *options)
    assert code == 2 and "is a symbolic link to" in told.err and "name a new one" in told.err
    assert len(told.err.strip().splitlines()) == 1


def test_an_export_is_the_same_at_any_time(tmp_path):
    """The same SAE gives the same files to the byte, at any time and place."""
    own_sae(tmp_path / "own")
    folders = [export_hub(tmp_path / "own", tmp_path / name).folder for name in ("a", "b")]
    names = [sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in folders]
    assert names[0] == names[1]
    for name in names[0]:
        first, second = ((folder / name).read_bytes() for folder in folders)
        assert first == second, name


def test_paths_of_runs_are_safe():
    assert _path("gemma-3-1b/L12/wanda-row-0.30") == "gemma-3-1b/L12/wanda-row-0.30"
    assert _path("a b<c>/L1/dense") == "a-b-c/L1/dense" and _path("../L1") == "model/L1"
    assert _path("é\n/L1") == "model/L1"
