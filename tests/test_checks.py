"""What `plan` warns of and refuses: each check sees its fault, and is silent without it."""

import math
import pathlib
import shutil
import types

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from conftest import tiny_language_model
from fake_hub import Repository, running_hub
from prunelens import hub
from prunelens.checkpoint import model_shape
from prunelens.config import ModelConfig, study_from_data
from prunelens.errors import UserError
from prunelens.model import load_model, run_to_site
from prunelens.prune import prune_model
from prunelens.report.write import run_and_report
from prunelens.study.footprint import disk_use, memory_use
from prunelens.study.matrix import parents_first
from prunelens.study.plan import plan_study
from prunelens.study.preflight import checks as checks_module
from prunelens.study.preflight import preview, room
from prunelens.study.preflight.access import _listed, access_checks, repositories
from prunelens.study.preflight.before import cheap_checks, refuse_hopeless
from prunelens.study.preflight.checks import study_checks
from prunelens.study.preflight.finding import Finding, refuse
from prunelens.study.preflight.model_checks import model_checks, running_checks, site_checks
from prunelens.study.preflight.preview import preflight
from prunelens.study.preflight.text_checks import (
    bos_checks,
    perplexity_check,
    text_check,
    unigram_nll,
)
from prunelens.study.run import run_study
from prunelens.study_file import read_study
from prunelens.text import documents
from tiny_study import tiny_study, write_text


@pytest.fixture
def data(checkpoint_folder, tmp_path):
    return tiny_study(checkpoint_folder, write_text(tmp_path / "text.txt"))


def found(data, check):
    """Levels of one check, and all that it says."""
    study = study_from_data(data)
    shapes = {model.label: model_shape(model) for model in study.models}
    own = [f for f in study_checks(plan_study(study), shapes) if f.check == check]
    return [f.level for f in own], " ".join(f.what for f in own)


# --- from configs alone -------------------------------------------------------------------------


def test_a_sound_study_has_nothing_to_warn_of(data):
    data["sae"]["steps"] = 100
    study = study_from_data(data)
    shapes = {"tiny-llama": model_shape(study.models[0])}
    assert {f.level for f in study_checks(plan_study(study), shapes)} == {"ok"}


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3", "gpt2"])
def test_soft_capping_tied_weights_and_dtype_are_told(architecture):
    config = tiny_language_model(architecture).model.config
    study = study_from_data({})
    model = ModelConfig(dtype="float16")
    capping = checks_module._soft_capping(study, model, config)
    assert ("eager" in capping.what) == (architecture == "gemma2")
    tied = checks_module._tied_weights(study, model, config)
    assert ("one matrix" in tied.what) == config.tie_word_embeddings
    config.dtype = torch.float32
    level = checks_module._dtype(study, model, config).level
    assert level == ("warning" if architecture.startswith("gemma") else "ok")
    config.dtype = torch.bfloat16
    assert checks_module._dtype(study, model, config).level == "warning"
    exact = checks_module._dtype(study, ModelConfig(), config)
    assert exact.level == "ok"
    assert "twice the memory" in exact.what
    stored = study_from_data({"activations": {"storage": "float16"}})
    assert checks_module._dtype(stored, ModelConfig(), config).what.startswith(
        "activations.storage"
    )


@pytest.mark.parametrize(
    ("sae", "corpus", "words"),
    [
        ({"k": 8}, {}, "sae.k: 8 is 50% of d_model 16"),
        ({"expansion": 400}, {}, "6,400 latents, more than the 3,200"),
        ({"expansion": 20}, {}, "corpus.train_tokens: 3,200 is 10.0 tokens"),
        ({"steps": 20}, {}, "an average latent fires 80 times"),
        ({"steps": 100, "resample_every": 76}, {}, "sae.resample_every: 76 of 100"),
    ],
)
def test_doubtful_sizes(data, sae, corpus, words):
    data["sae"] |= {"steps": 100, **sae}
    data["corpus"] |= corpus
    levels, what = found(data, "SAE sizes")
    assert "warning" in levels
    assert words in what


def test_the_last_restart_is_where_the_training_has_it(data):
    data["sae"] |= {"steps": 100, "resample_every": 75}
    assert found(data, "SAE sizes")[0] == ["ok"]


def test_the_same_weights_twice_are_refused(data, checkpoint_folder, tmp_path):
    copy = shutil.copytree(checkpoint_folder, tmp_path / "copy")
    data["models"].append({"name": str(copy), "layers": [1]})
    levels, what = found(data, "duplicates")
    assert levels == ["error"] * 3  # dense, and both prunings
    assert "copy/L1/dense and tiny-llama/L1/dense are the same weights" in what
    data["models"][1]["layers"] = [0]  # another layer of the same model is another run
    assert found(data, "duplicates")[0] == ["ok"]


def test_a_checkpoint_that_is_the_model_or_stands_twice(data, checkpoint_folder, tmp_path):
    same = shutil.copytree(checkpoint_folder, tmp_path / "same")
    data["prunings"] = [{"checkpoint": str(same)}]
    levels, what = found(data, "duplicates")
    assert levels == ["warning"]
    assert "same is the dense model" in what
    other = shutil.copytree(checkpoint_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    twin = shutil.copytree(other, tmp_path / "twin")
    data["prunings"] = [{"checkpoint": str(other)}, {"checkpoint": str(twin)}]
    levels, what = found(data, "duplicates")
    assert levels == ["error"]
    assert "twin and tiny-llama/L1/other" in what


@pytest.mark.parametrize(("scope", "sparsity"), [("row", 0.02), ("global", 1e-5)])
def test_a_sparsity_that_rounds_down_to_nothing_is_dense_again(data, scope, sparsity):
    data["prunings"][0] = {"criterion": "magnitude", "scope": scope, "sparsities": [sparsity]}
    levels, what = found(data, "duplicates")
    assert "error" in levels
    assert f"prunings.sparsities: {sparsity}" in what
    data["prunings"][0]["sparsities"] = [0.05]
    assert "error" not in found(data, "duplicates")[0]


def test_refuse_raises_the_first_error_alone():
    fine = [Finding("ok", "a", "b"), Finding("warning", "a", "b", "c")]
    refuse(fine)
    with pytest.raises(UserError, match=r"^field: 7 is wrong; make it 8$"):
        refuse([*fine, Finding("error", "a", "field: 7 is wrong", "make it 8")])


# --- room ---------------------------------------------------------------------------------------


def levels_of(findings):
    return {finding.check: finding.level for finding in findings}


def test_free_disk_and_memory_against_need(data, tmp_path, monkeypatch):
    study = study_from_data(data)
    plan = plan_study(study)
    shapes = {"tiny-llama": model_shape(study.models[0])}
    disk = disk_use(study, shapes, list(parents_first(plan.targets().values())))
    for free, level in ((2 * disk.peak, "ok"), (disk.peak, "warning"), (disk.peak / 2, "error")):
        usage = types.SimpleNamespace(free=free)
        monkeypatch.setattr(room.shutil, "disk_usage", lambda _place, usage=usage: usage)
        checked = cheap_checks(plan, shapes, tmp_path / "new" / "folder", "cpu")
        assert levels_of(checked.findings)["disk"] == level
    with pytest.raises(UserError, match=r"^--out: .*GB free for about .*; make room"):
        refuse_hopeless(plan, tmp_path / "new", "cpu")
    written = tmp_path / "done" / "artifacts"
    written.mkdir(parents=True)
    (written / "file").write_bytes(b"0" * math.ceil(disk.peak))  # what is there is not needed again
    refuse_hopeless(plan, written, "cpu")
    monkeypatch.undo()
    need = memory_use(study, shapes, "cpu").host
    for total, free, level in (
        (2 * need, 2 * need, "ok"), (2 * need, need / 2, "warning"), (need / 2, 1.0, "error"),
    ):  # fmt: skip
        monkeypatch.setattr(room, "machine_memory", lambda total=total, free=free: (total, free))
        checked = cheap_checks(plan, shapes, tmp_path, "cpu")
        assert levels_of(checked.findings)["memory"] == level


def test_a_model_that_is_spread_may_be_larger_than_memory(data, monkeypatch):
    data["models"][0]["device_map"] = "auto"
    study = study_from_data(data)
    need = memory_use(study, {"tiny-llama": model_shape(study.models[0])}, "cpu")
    monkeypatch.setattr(room, "machine_memory", lambda: (need.host / 2, 1.0))
    (finding,) = room.memory_checks(need, study, "cpu")
    assert finding.level == "warning"
    assert "device_map" in finding.fix


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Lays out control groups; returns this process's."""

    def lay(lines, own):
        monkeypatch.setattr(room, "GROUPS", tmp_path)
        monkeypatch.setattr(room, "OWN_GROUPS", tmp_path / "lines")
        (tmp_path / "lines").write_text(lines)
        (tmp_path / own).mkdir(parents=True)
        return tmp_path / own

    return lay


def test_a_containers_limit_counts(groups):
    """Of the group that this process is in, and of those above it; files read do not fill it."""
    own = groups("0::/job/step\n", "job/step")
    (own / "memory.max").write_text("max\n")
    assert room.machine_memory()[0] > 1e8
    (own.parent / "memory.max").write_text("1000000\n")
    (own.parent / "memory.current").write_text("400000\n")
    assert room.machine_memory() == (1_000_000, 600_000)
    (own.parent / "memory.stat").write_text("anon 250000\ninactive_file 150000\n")
    assert room.machine_memory() == (1_000_000, 750_000)


def test_a_containers_limit_counts_in_the_older_interface(groups):
    own = groups("5:cpu,cpuacct:/slurm\n4:memory:/slurm\n", "memory/slurm")
    (own.parent / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")  # none
    (own / "memory.limit_in_bytes").write_text("1000000\n")
    (own / "memory.usage_in_bytes").write_text("300000\n")
    assert room.machine_memory() == (1_000_000, 700_000)


def test_a_comparison_holds_two_models_and_sparsegpt_its_products(data, checkpoint_folder):
    shape = model_shape(ModelConfig(name=str(checkpoint_folder)))
    lm = tiny_language_model("llama", vocabulary=200)
    inputs = [p.shape[1] for _, p in lm.blocks.named_parameters() if p.dim() == 2]
    assert shape.products == sum(size**2 for size in inputs)
    assert shape.widest_input == max(inputs) == 40

    def pruning(entry, device="cpu"):
        study = study_from_data(data | {"prunings": [entry]})
        return memory_use(study, {"tiny-llama": shape}, device).pruning

    weights = shape.parameters * 4
    wanda = pruning({"criterion": "wanda", "scope": "row", "sparsities": [0.5]})
    assert wanda == weights
    assert pruning({"checkpoint": "somewhere"}) == 2 * weights
    assert pruning({"checkpoint": "somewhere"}, "cuda") == weights
    sparse = pruning({"criterion": "sparsegpt", "scope": "row", "sparsities": [0.5]})
    hidden, products = 800 * 16 * 4, sum(size**2 for size in inputs) / 3 * 4
    assert sparse >= weights + hidden + products + 40 * 40 * 8 * 5


# --- text ---------------------------------------------------------------------------------------


def bos(data):
    study = study_from_data(data)
    return [(f.level, f.check, f.what) for f in bos_checks(study, study.models[0])]


def with_tokenizer(data, tokenizer, checkpoint_folder, tmp_path):
    """The study on the same model with another tokenizer; None: without."""
    folder = tmp_path / "other-tokenizer"
    shutil.copytree(checkpoint_folder, folder, ignore=shutil.ignore_patterns("tokenizer*", "spec*"))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    data["models"][0]["name"] = str(folder)
    return data


def changed(tiny_tokenizer, *, bos_token="<bos>", template=None):
    inner = type(tiny_tokenizer._tokenizer).from_str(tiny_tokenizer._tokenizer.to_str())
    if template:
        inner.post_processor = TemplateProcessing(single=template, special_tokens=[("<bos>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos_token)


def test_bos_as_it_should_be(data):
    assert {level for level, _, _ in bos(data)} == {"ok"}
    assert any("open with '<bos>'" in what for _, _, what in bos(data))


def test_a_tokenizer_without_bos(data, tiny_tokenizer, checkpoint_folder, tmp_path):
    tokenizer = changed(tiny_tokenizer, bos_token=None)
    data = with_tokenizer(data, tokenizer, checkpoint_folder, tmp_path)
    assert [level for level, check, _ in bos(data) if check == "BOS"] == ["ok"]
    data["corpus"]["bos"] = "always"
    (finding,) = [f for f in bos(data) if f[0] == "error"]
    assert finding[2].startswith("corpus.bos: 'always'")


def test_a_bos_that_the_tokenizer_adds_is_turned_off_or_missed(
    data, tiny_tokenizer, checkpoint_folder, tmp_path
):
    tokenizer = changed(tiny_tokenizer, template="<bos> $A")
    data = with_tokenizer(data, tokenizer, checkpoint_folder, tmp_path)
    assert {level for level, _, _ in bos(data)} == {"ok"}
    assert any("which is turned off" in what for _, _, what in bos(data))
    data["corpus"]["bos"] = "never"
    (warning,) = [what for level, _, what in bos(data) if level == "warning"]
    assert "far worse without it" in warning


def test_a_tokenizer_that_adds_its_bos_whatever_it_is_told(data, monkeypatch):
    class Stubborn:
        bos_token, bos_token_id = "<bos>", 0

        def __call__(self, _text, **_options):
            return {"input_ids": [0, 5, 6]}

    monkeypatch.setattr(
        "prunelens.study.preflight.text_checks.load_tokenizer", lambda _model: Stubborn()
    )
    assert next(level for level, check, _ in bos(data) if check == "double BOS") == "warning"
    data["corpus"]["bos"] = "never"
    assert next(level for level, check, _ in bos(data) if check == "double BOS") == "error"


def test_text_that_spells_out_its_bos(data, tmp_path):
    lines = pathlib.Path(data["corpus"]["paths"][0]).read_text().splitlines()
    marked = tmp_path / "marked.txt"
    marked.write_text("\n".join(f"<bos>{line}" for line in lines))
    data["corpus"]["paths"] = [str(marked)]
    (warning,) = [what for level, _, what in bos(data) if level == "warning"]
    assert "100 of the first 100 documents open with '<bos>'; these are dropped" in warning


def test_a_model_without_a_tokenizer(data, checkpoint_folder, tmp_path):
    (finding,) = bos(with_tokenizer(data, None, checkpoint_folder, tmp_path))
    assert finding[0] == "error"
    assert "has no tokenizer" in finding[2]


def of_rows(data, tmp_path, rows):
    path = tmp_path / "rows.safetensors"
    save_file({"tokens": rows}, path)
    return data | {"corpus": {**data["corpus"], "source": "tokens", "paths": [str(path)]}}


def test_ready_made_windows_with_two_bos(data, tmp_path):
    rows = torch.randint(1, 200, (400, 16), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = 0
    assert [level for level, _, _ in bos(of_rows(data, tmp_path, rows))] == ["ok"]
    rows[:, 1] = 0
    (finding,) = bos(of_rows(data, tmp_path, rows))
    assert finding[:2] == ("warning", "double BOS")


# --- is there enough? ---------------------------------------------------------------------------


def refusals(data, out):
    """What `plan` and `run` say, neither having made anything."""
    study, told = study_from_data(data), []
    for ask in (
        lambda: preflight(study, calibration_seconds=0),
        lambda: run_and_report(study, out, quiet=True),
    ):
        with pytest.raises(UserError) as caught:
            ask()
        told.append(str(caught.value))
    return told


@pytest.mark.parametrize("kind", ["short", "one line", "broken row", "tokens", "perplexity"])
def test_a_plan_refuses_the_text_that_a_run_refuses_in_the_same_words(kind, data, tmp_path):
    lines = pathlib.Path(data["corpus"]["paths"][0]).read_text().splitlines()
    expected = "is more than the text holds: "
    path = tmp_path / "other.txt"
    data["corpus"]["paths"] = [str(path)]
    if kind == "short":
        path.write_text("\n".join(lines[:50]))
    elif kind == "one line":
        path.write_text(" ".join(lines))
        expected = "makes 1 of it, each in one split alone"
    elif kind == "broken row":
        path = path.with_suffix(".jsonl")
        data["corpus"]["paths"] = [str(path)]
        path.write_text("\n".join([*(f'{{"text": "{n}"}}' for n in range(60)), "{"]))
        expected = "line 61 of other.jsonl is not JSON"
    elif kind == "tokens":
        data = of_rows(data, tmp_path, torch.arange(1, 16 * 99 + 1).view(99, 16))
    else:
        path.write_text("\n".join(lines))
        (tmp_path / "blank.txt").write_text("\n\n")
        data["perplexity"]["corpus"] = {"source": "files", "paths": [str(tmp_path / "blank.txt")]}
        expected = "blank.txt'] holds no text"
    planned, ran = refusals(data, tmp_path / "out")
    assert planned == ran
    assert expected in planned


@pytest.mark.parametrize("kind", ["ids", "other ids", "eval", "text", "max_tokens"])
def test_a_plan_refuses_what_the_stages_of_a_run_would(kind, data, tmp_path):
    """The run goes on without what failed, so it is asked for the reason."""
    data |= {"questions": ["persistence"], "prunings": data["prunings"][:1]}
    rows = torch.randint(1, 200, (400, 16), generator=torch.Generator().manual_seed(0))
    expected = "perplexity.context_tokens: 64 is more than the "
    if kind == "ids":
        rows[::7, 3] = 2**20
        data = of_rows(data, tmp_path, rows)
        expected = f"corpus: token id {2**20} is outside the vocabulary of tiny-llama ("
    elif kind == "other ids":
        rows[5, 3] = 70_000
        ids = of_rows(data, tmp_path, rows)["corpus"]
        data["perplexity"] = {"context_tokens": [16], "corpus": ids}
        expected = "corpus: token id 70000 is outside the vocabulary of tiny-llama ("
    elif kind == "eval":
        data["corpus"]["eval_tokens"] = 48
        data["perplexity"] = {"context_tokens": [16, 64]}
    elif kind == "text":
        (tmp_path / "short.txt").write_text("The quick brown fox")
        short = {"source": "files", "paths": [str(tmp_path / "short.txt")]}
        data["perplexity"] = {"context_tokens": [64], "corpus": short}
    else:
        data["perplexity"] = {"context_tokens": [16], "max_tokens": 14}
        expected = "perplexity.max_tokens: 14 is less than one window of 16 tokens"
    study = study_from_data(data)
    with pytest.raises(UserError) as planned:
        preflight(study, calibration_seconds=0)
    assert str(planned.value).startswith(expected)
    ran = run_study(study, tmp_path / "out", quiet=True)
    assert str(planned.value) in str([*(run.reason for run in ran.results), *ran.failures])


def test_a_plan_counts_no_further_than_is_wanted(data, monkeypatch):
    """4,800 tokens of 400 lines of 25 or more: 64 of each split and some."""
    path = pathlib.Path(data["corpus"]["paths"][0])
    path.write_text(path.read_text() * 20)
    monkeypatch.setattr("prunelens.corpus._BATCH_DOCUMENTS", 10)
    read = []

    def counted(*arguments, **named):
        for document in documents(*arguments, **named):
            read.append(document)
            yield document

    monkeypatch.setattr("prunelens.corpus.documents", counted)
    study = study_from_data(data)
    assert [f.level for f in text_check(study, study.models[0])] == ["ok"]
    assert 0 < len(read) < 400


def test_text_out_of_reach_is_skipped(data, tmp_path, monkeypatch):
    study = study_from_data(data)
    away = study.models[0].model_copy(update={"name": "org/not-here"})
    (finding,) = text_check(study, away)
    assert (finding.level, "not on this machine" in finding.what) == ("ok", True)
    ids = study_from_data(of_rows(data, tmp_path, torch.arange(1, 16 * 99 + 1).view(99, 16)))
    monkeypatch.setattr("prunelens.study.preflight.text_checks.is_here", lambda _model: False)
    with pytest.raises(UserError, match="is more than the text holds"):  # its config is known
        list(text_check(ids, ids.models[0]))


# --- does the model allow what is asked? --------------------------------------------------------

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
}
SEVERAL_STREAMS = {
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 4,
    "laurel_rank": 4,
}
REFUSED = {  # model type, its fields, site -> what is said
    "experts": ("mixtral", {"num_local_experts": 2}, "resid_post", "mixtures of experts"),
    "gates": ("recurrent_gemma", {"lru_width": 16}, "resid_post", "of RecurrentGemmaRglru cannot"),
    "no attention": ("mamba", {}, "attn_out", "which has norm (MambaRMSNorm), mixer (MambaMixer)"),
    "quantised": (
        "llama",
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "resid_post",
        "is quantised (gptq); prune the float",
    ),
    "pattern": ("llama", {"intermediate_size": 27}, "resid_post", "a multiple of 4 weights"),
    "two lists of blocks": ("xlm", {"emb_dim": 16}, "resid_post", "2 lists of decoder blocks"),
}


def of_kind(tmp_path, kind, fields, site="resid_post", weights=False):
    """A study that prunes a small model of some type, of which only the config is there."""
    known = SMALL if kind != "mamba" else {name: SMALL[name] for name in ("hidden_size",)}
    config = transformers.AutoConfig.for_model(kind, **(known | fields))
    if weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(tmp_path / kind)
    else:
        config.save_pretrained(tmp_path / kind)
    prunings = [
        {"criterion": "wanda", "scope": "row", "pattern": "2:4", "sparsities": [0.5]},
        {"criterion": "sparsegpt", "scope": "row", "sparsities": [0.5]},
    ]
    models = [{"name": str(tmp_path / kind), "layers": [1], "site": site}]
    study = study_from_data({"models": models, "prunings": prunings})
    return study, study.models[0]


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_architecture_does_not_allow_is_told_before_anything_is_read(tmp_path, case):
    kind, fields, site, words = REFUSED[case]
    study, model = of_kind(tmp_path, kind, fields, site)
    [finding] = model_checks(study, model)
    assert finding.level == "error"
    assert words in f"{finding.what}; {finding.fix}"
    assert finding.fix


def test_plan_refuses_experts_in_the_words_of_prune(tmp_path):
    """And the dense model alone is a study like any other."""
    study, model = of_kind(tmp_path, "mixtral", {"num_local_experts": 2}, weights=True)
    [finding] = model_checks(study, model)
    with pytest.raises(UserError) as refused:
        prune_model(load_model(model), study.conditions()[0], calibration=torch.ones(1, 8).long())
    assert str(refused.value) == f"{finding.what}; {finding.fix}"
    [dense] = model_checks(study_from_data({"models": [model.model_dump()]}), model)
    assert dense.level == "ok"


@pytest.mark.parametrize(
    ("kind", "fields", "site"),
    [
        ("llama4_text", {"num_local_experts": 2, "intermediate_size_mlp": 24}, "mlp_out"),
        ("gemma3n_text", SEVERAL_STREAMS, "resid_post"),
    ],
    ids=["tokens and windows in one axis", "several streams"],
)
def test_a_site_that_gives_no_vector_per_token_is_refused_from_shapes(tmp_path, kind, fields, site):
    _, model = of_kind(tmp_path, kind, fields, site, weights=True)
    [finding] = site_checks(model)
    assert finding.level == "error"
    assert "not one vector of 16 numbers per token" in finding.what
    with pytest.raises(UserError, match="not one vector of 16 numbers per token"):
        run_to_site(load_model(model), torch.ones(2, 3, dtype=torch.long), site, 1)


def test_what_cannot_be_run_is_planned_without_timing_it(tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "calibrate", None)
    study, _ = of_kind(tmp_path, "mixtral", {"num_local_experts": 2})
    planned = preflight(study)
    errors = [check["what"] for check in planned.checks if check["level"] == "error"]
    assert any("mixtures of experts" in what for what in errors)
    assert planned.hours is None


def test_sites_of_a_sound_model_are_said_nothing_of(checkpoint_folder):
    assert not list(site_checks(ModelConfig(name=str(checkpoint_folder), layers=(0, 2))))


def test_a_model_that_looks_ahead_is_no_causal_model(tmp_path):
    for is_decoder, level in ((False, "error"), (True, "ok")):
        study, model = of_kind(
            tmp_path / str(is_decoder), "bert", {"is_decoder": is_decoder}, weights=True
        )
        found = next(iter(running_checks(study, model, load_model(model))))
        assert found.level == level
        assert ("is_decoder: true" in found.fix) == (level == "error")


def test_ablations_of_a_model_without_keys_and_values_are_refused_with_its_weights(tmp_path):
    study, model = of_kind(tmp_path, "mamba", {"num_hidden_layers": 3}, weights=True)
    lm = load_model(model)
    ahead, causal = running_checks(study, model, lm)
    assert (ahead.level, causal.level) == ("ok", "error")
    assert causal.fix == "leave 'causal' out of questions"


# --- can the model read the text? ---------------------------------------------------------------


def test_unigram_nll_is_what_counting_gives():
    draw = torch.Generator().manual_seed(0)
    train = torch.randint(7, (300,), generator=draw, dtype=torch.int32)
    held_out = torch.randint(9, (40,), generator=draw, dtype=torch.int32)
    listed = train.tolist()
    expected = -sum(math.log((listed.count(t) + 1) / (300 + 10)) for t in held_out.tolist()) / 40
    assert unigram_nll(train, held_out, 10) == pytest.approx(expected, rel=1e-12)


def test_a_model_worse_than_a_unigram_model_is_an_error(data, tmp_path):
    study = study_from_data(data)  # the tiny model is random
    finding = perplexity_check(study, study.models[0], load_model(study.models[0]))
    assert finding.level == "error"
    assert finding.what.startswith("models.name: tiny-llama has perplexity")
    rows = torch.randint(0, 200, (400, 16), generator=torch.Generator().manual_seed(0))
    study = study_from_data(of_rows(data, tmp_path, rows))  # nobody knows what the ids stand for
    assert perplexity_check(study, study.models[0], load_model(study.models[0])).level == "warning"


def test_the_bundled_model_reads_python_and_broken_weights_do_not(tmp_path):
    demo = read_study("demo")
    assert perplexity_check(demo, demo.models[0], load_model(demo.models[0])).level == "ok"
    from prunelens.checkpoint import BUNDLED

    folder = shutil.copytree(BUNDLED, tmp_path / "broken")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if "mlp" in name or "attn" in name:
                tensors[name] = tensors[name].flip(0).contiguous()
        save_file(tensors, path, metadata={"format": "pt"})
    broken = demo.models[0].model_copy(update={"name": str(folder)})
    assert perplexity_check(demo, broken, load_model(broken)).level == "error"


def test_a_plan_says_what_it_skipped(data):
    checks = preflight(study_from_data(data), calibration_seconds=0).checks
    skipped = [check for check in checks if "skipped" in check["what"]]
    assert [check["check"] for check in skipped] == ["perplexity"]
    assert "without calibration" in skipped[0]["what"]


# --- access -------------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path, monkeypatch):
    hub.snapshot.cache_clear()
    with running_hub(monkeypatch, tmp_path / "hub") as running:
        yield running
    hub.snapshot.cache_clear()


def on_the_hub(data, **fields):
    return study_from_data(data | {"models": [{"name": "me/model", "layers": [1]}], **fields})


def test_what_the_hub_gives_and_what_it_refuses(data, fake, tmp_path):
    fake.repositories["me/model"] = Repository(private=False, files={"config.json": b"{}"})
    study = on_the_hub(data, prunings=[{"checkpoint": "me/absent"}])
    opened, refused = access_checks(study)
    assert (opened.level, refused.level) == ("ok", "error")
    assert "me/model can be read" in opened.what
    assert refused.what.startswith("prunings.checkpoint: the hub has no public model 'me/absent'")
    assert refused.fix.startswith("check the spelling")
    assert not (tmp_path / "hub").exists()  # nothing was fetched


def test_a_gated_model_is_an_error(data, fake, monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    def gated(self, name, **_options):
        import httpx2

        raise GatedRepoError(
            "no", response=httpx2.Response(403, request=httpx2.Request("GET", "http://a"))
        )

    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", gated)
    (finding,) = access_checks(on_the_hub(data))
    assert finding.level == "error"
    assert finding.what == "models.name: 'me/model' is gated"
    assert "accept its licence" in finding.fix


def test_offline_is_said_once_and_weights_in_the_cache_are_enough(
    data, tmp_path, checkpoint_folder, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    lay_in_cache(tmp_path / "hub", "me/cached", checkpoint_folder, "a" * 40)
    prunings = [{"checkpoint": name} for name in ("me/cached", "me/other")]
    findings = list(access_checks(on_the_hub(data, prunings=prunings)))
    assert [f.level for f in findings] == ["ok", "warning"]
    assert "me/cached is in the cache" in findings[0].what
    assert "me/model, me/other" in findings[1].what


def lay_in_cache(cache, name, source, commit):
    folder = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(source, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)


def test_a_half_fetched_model_is_not_there(tmp_path, checkpoint_folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    lay_in_cache(tmp_path / "hub", "me/half", checkpoint_folder, "a" * 40)
    assert hub.cached_model("me/half", revision=None) is not None
    index = '{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}'
    folder = tmp_path / "hub" / "models--me--half" / "snapshots" / ("a" * 40)
    (folder / "model.safetensors.index.json").write_text(index)
    assert hub.cached_model("me/half", revision=None) is None


def test_every_repository_is_asked_for_once():
    study = study_from_data(
        {
            "models": [
                {
                    "name": "a/model",
                    "pretrained": [
                        {"layer": 3, "release": "b/saes", "sae_id": one} for one in ("x", "y")
                    ],
                }
            ],
            "corpus": {"source": "hub", "dataset": "c/text"},
            "perplexity": {"corpus": {"source": "hub", "dataset": "d/text"}},
            "prunings": [{"checkpoint": "e/pruned"}],
        }
    )
    names = [(r.name, r.kind, r.field) for r in repositories(study)]
    assert names == [
        ("a/model", "model", "models.name"),
        ("e/pruned", "model", "prunings.checkpoint"),
        ("c/text", "dataset", "corpus.dataset"),
        ("d/text", "dataset", "perplexity.corpus.dataset"),
        ("b/saes", "model", "models.pretrained.release"),
    ]


def test_a_release_of_saelens_is_found_in_its_list():
    text = "some-res:\n  model: x\n  repo_id: them/some\n  saes:\n  - id: 1\nother:\n  model: y\n"
    assert _listed("some-res", text) == "them/some"
    assert _listed("other", text) is None
    assert _listed("res", text) is None


# --- before a run -------------------------------------------------------------------------------


def test_a_run_refuses_before_anything_is_written(data, checkpoint_folder, tmp_path):
    copy = shutil.copytree(checkpoint_folder, tmp_path / "copy")
    data["models"].append({"name": str(copy), "layers": [1]})
    with pytest.raises(UserError, match=r"^models: copy/L1/dense and .*; remove one$"):
        run_and_report(study_from_data(data), tmp_path / "out", device="cpu", quiet=True)
    assert not (tmp_path / "out").exists()
