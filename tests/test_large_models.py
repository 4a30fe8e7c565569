"""Models beyond one device or the memory: the same numbers, whichever way the weights come in."""

import gc
import json
import math
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from conftest import ARCHITECTURES, VOCABULARY, tiny_language_model
from prunelens import offload, tensor_files
from prunelens.config import ModelConfig, PruningConfig, study_from_data
from prunelens.corpus import split_tokens
from prunelens.corpus import windows as cut
from prunelens.errors import UserError
from prunelens.model import (
    load_model,
    logits,
    model_fingerprint,
    replace_at_site,
    run_to_site,
)
from prunelens.perplexity import measure_perplexity
from prunelens.prune import (
    apply_masks,
    apply_pruning,
    as_matrix,
    calibrate,
    compare_weights,
    input_norms,
    load_masks,
    masks_sha256,
    prunable_matrices,
    prune_model,
    save_checkpoint,
    save_pruning,
)
from prunelens.prune.checkpoint import writing_checkpoint
from prunelens.prune.on_disk import NotOnDiskError, copy_to_disk
from prunelens.report.write import run_and_report
from prunelens.study.plan import plan_study
from prunelens.study.single import prune_checkpoint
from prunelens.upper_blocks import UpperBlocks
from tiny_study import tiny_study, write_text

PRUNINGS = {
    "magnitude-global": {"criterion": "magnitude", "scope": "global"},
    "magnitude-2:4": {"criterion": "magnitude", "scope": "row", "pattern": "2:4"},
    "random": {"criterion": "random", "scope": "matrix", "random_seed": 3},
    "wanda": {"criterion": "wanda", "scope": "row"},
    "magnitude-head": {"criterion": "magnitude", "scope": "global", "lm_head": True},
    "wanda-sequential": {"criterion": "wanda", "scope": "row", "calibration": "sequential"},
    "sparsegpt": {"criterion": "sparsegpt", "scope": "matrix"},
}


@pytest.fixture
def windows():
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, VOCABULARY, (30, 50), generator=generator)  # two batches


@pytest.fixture(scope="module", params=ARCHITECTURES)
def shards(request, tmp_path_factory):
    """A checkpoint in several files."""
    folder = tmp_path_factory.mktemp("shards") / request.param
    tiny_language_model(request.param).model.save_pretrained(folder, max_shard_size="15KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def narrow_shards(tiny_tokenizer, tmp_path_factory):
    """A checkpoint of bfloat16 in several files, with its tokenizer."""
    folder = tmp_path_factory.mktemp("narrow") / "shards"
    lm = tiny_language_model("llama", vocabulary=len(tiny_tokenizer), dtype=torch.bfloat16)
    lm.model.save_pretrained(folder, max_shard_size="15KB")
    tiny_tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def windows_of(study, lm):
    """The calibration text of a study."""
    splits = split_tokens(study.corpus, lm.tokenizer, only=("calibration",))
    return cut(splits.calibration, study.corpus.context_tokens, splits.bos_token)


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(calibrate, "BATCH_TOKENS", 800)


def pruning_of(name):
    return PruningConfig.model_validate({**PRUNINGS[name], "sparsity": 0.5})


def spread(folder, tmp_path, memory="12KB", dtype="float32"):
    """The configuration of a model most of which waits on disk."""
    return ModelConfig(
        name=str(folder),
        dtype=dtype,
        device_map="auto",
        max_memory={"cpu": memory},
        offload_folder=str(tmp_path),
    )


def tensors_of(folder):
    files = folder.glob("model*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


# Pruned where it lies


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PRUNINGS)
def test_pruned_on_disk_is_pruned_in_memory(shards, name, dtype, windows, tmp_path, small_batches):
    model, pruning = ModelConfig(name=str(shards), dtype=dtype), pruning_of(name)
    text = windows if pruning.is_calibrated else None
    lm = load_model(model)
    expected = prune_model(lm, pruning, calibration=text)
    save_checkpoint(lm, tmp_path / "memory")
    with writing_checkpoint(tmp_path / "disk") as partial:
        on_disk = copy_to_disk(model, partial)
        assert all(parameter.is_meta for parameter in on_disk.model.parameters())
        found = prune_model(on_disk, pruning, calibration=text)
        assert all(parameter.is_meta for parameter in on_disk.model.parameters())
    assert masks_sha256(found.masks) == masks_sha256(expected.masks)
    assert found.report == expected.report
    assert_same_tensors(tensors_of(tmp_path / "disk"), tensors_of(tmp_path / "memory"))
    for file in ("config.json", "generation_config.json"):
        disk, memory = (tmp_path / way / file for way in ("disk", "memory"))
        assert json.loads(disk.read_text()) == json.loads(memory.read_text())
    names = {path.name for path in shards.glob("*.safetensors*")}
    assert {path.name for path in (tmp_path / "disk").glob("*.safetensors*")} == names
    again = load_model(model.model_copy(update={"name": str(tmp_path / "disk")}))
    assert torch.equal(logits(again, windows[:2]), logits(lm, windows[:2]))


def test_a_study_that_prunes_a_checkpoint_says_the_same_on_disk(
    checkpoint_folder, tmp_path, small_batches
):
    text = write_text(tmp_path / "text.txt")
    study = study_from_data(tiny_study(checkpoint_folder, text))
    pruning = pruning_of("wanda")
    folders = {}
    for way in (False, True):
        folders[way] = tmp_path / f"out-{way}"
        prune_checkpoint(
            study.models[0], pruning, study.corpus, folders[way], "cpu", block_by_block=way
        )
    assert {p.name for p in folders[True].iterdir()} == {p.name for p in folders[False].iterdir()}
    for name in ("README.md", "prunelens.json", "config.json", "tokenizer.json"):
        assert (folders[True] / name).read_bytes() == (folders[False] / name).read_bytes()
    masks = [load_masks(folder / "prune_masks.safetensors") for folder in folders.values()]
    assert masks_sha256(masks[0]) == masks_sha256(masks[1])
    assert_same_tensors(tensors_of(folders[True]), tensors_of(folders[False]))


@pytest.mark.parametrize("name", PRUNINGS)
def test_files_are_of_the_dtype_and_the_size_of_those_that_they_were_made_from(
    narrow_shards, name, tmp_path, small_batches
):
    """By either way, although the model runs in float32; they hold the model that was pruned."""
    study = study_from_data(tiny_study(narrow_shards, write_text(tmp_path / "text.txt")))
    model, pruning = study.models[0], pruning_of(name)
    lm = load_model(model)
    text = windows_of(study, lm) if pruning.is_calibrated else None
    expected = prune_model(lm, pruning, calibration=text, rounded_to=torch.bfloat16)
    largest = max(path.stat().st_size for path in narrow_shards.glob("*.safetensors"))
    for way in (False, True):
        out = tmp_path / f"out-{way}"
        found = prune_checkpoint(model, pruning, study.corpus, out, "cpu", block_by_block=way)
        assert masks_sha256(found.masks) == masks_sha256(expected.masks)
        saved = tensors_of(out)
        assert saved.keys() == tensors_of(narrow_shards).keys()
        for key, tensor in lm.model.state_dict().items():
            assert saved[key].dtype == torch.bfloat16
            assert torch.equal(saved[key].float(), tensor), key
        assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
        sizes = [path.stat().st_size for path in out.glob("model*.safetensors")]
        assert len(sizes) > 1 and max(sizes) < 1.2 * largest


@pytest.mark.parametrize("block_by_block", [False, True])
def test_a_dtype_that_is_given_is_that_of_the_files(narrow_shards, block_by_block, tmp_path):
    study = study_from_data(tiny_study(narrow_shards, write_text(tmp_path / "text.txt")))
    model = ModelConfig(name=str(narrow_shards), dtype="float16")
    options = {"block_by_block": block_by_block}
    prune_checkpoint(model, pruning_of("wanda"), study.corpus, tmp_path / "out", "cpu", **options)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.float16}
    files = [len(list(f.glob("model*.safetensors"))) for f in (narrow_shards, tmp_path / "out")]
    assert files[1] == files[0]


def test_one_file_stays_one_and_a_number_is_worth_more_than_a_dtype(tmp_path, caplog):
    lm = tiny_language_model("llama")
    lm.model.save_pretrained(tmp_path / "one")
    lm = load_model(str(tmp_path / "one"))
    as_matrix(next(iter(prunable_matrices(lm).values())))[0, 0] = 1 + 2**-20
    save_checkpoint(lm, tmp_path / "out", dtype=torch.bfloat16)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.float32}
    assert "saved in torch.float32, which it ran in" in caplog.text


def test_magnitude_never_loads_the_model(checkpoint_folder, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    study = study_from_data(tiny_study(checkpoint_folder, tmp_path / "none.txt"))
    for name in ("magnitude-global", "random"):
        pruned = prune_checkpoint(
            study.models[0], pruning_of(name), study.corpus, tmp_path / name, "cpu"
        )
        # of every scope group floor(n / 2)
        assert math.isclose(pruned.achieved_sparsity, 0.5, abs_tol=0.01)


def test_tied_weights_are_one_tensor(tmp_path, windows):
    config = tiny_language_model("llama").model.config
    config.tie_word_embeddings = True
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "tied")
    (tmp_path / "copy").mkdir()
    lm = copy_to_disk(ModelConfig(name=str(tmp_path / "tied")), tmp_path / "copy")
    assert "lm_head.weight" not in tensors_of(tmp_path / "copy")
    assert torch.equal(logits(lm, windows[:2]), model(windows[:2]).logits)
    assert not any("lm_head" in name for name in prunable_matrices(lm))


def test_what_one_name_does_not_tell_is_loaded_and_said(
    checkpoint_folder, tmp_path, monkeypatch, caplog
):
    """Parts that stay in float32 by themselves: what they are only loading tells."""
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules", ["norm"])
    study = study_from_data(tiny_study(checkpoint_folder, write_text(tmp_path / "text.txt")))
    model = ModelConfig(name=str(checkpoint_folder), dtype="bfloat16")
    with pytest.raises(NotOnDiskError, match="leave out --block-by-block"):
        prune_checkpoint(
            model, pruning_of("wanda"), study.corpus, tmp_path / "out", "cpu", block_by_block=True
        )
    assert not (tmp_path / "out").exists()
    prune_checkpoint(model, pruning_of("magnitude-global"), study.corpus, tmp_path / "out", "cpu")
    assert "the whole model is loaded, as parts of it stay in float32" in caplog.text


def test_experts_are_refused_from_the_config_alone(tmp_path):
    """Before anything is read: the folder has no weights at all."""
    config = transformers.MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    config.save_pretrained(tmp_path / "experts")
    model, corpus = ModelConfig(name=str(tmp_path / "experts")), study_from_data({}).corpus
    for name in ("magnitude-global", "wanda"):
        with pytest.raises(UserError, match="mixtures of experts"):
            prune_checkpoint(model, pruning_of(name), corpus, tmp_path / "out", "cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["cut", "shape", "missing file", "index", "path"])
def test_a_damaged_checkpoint_is_refused_whole(checkpoint_folder, tmp_path, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint_folder, folder)
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    tensors = load_file(weights)
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "shape":
        first = next(name for name in tensors if "q_proj" in name)
        save_file({**tensors, first: torch.zeros(3, 5)}, weights, metadata={"format": "pt"})
    else:
        weights.unlink()
        file = "../secret.safetensors" if damage == "path" else "model-00001.safetensors"
        content = json.dumps({"weight_map": dict.fromkeys(tensors, file)})
        index.write_text("[" if damage == "index" else content)
        (folder / "other.safetensors").write_bytes(b"")
    corpus = study_from_data({}).corpus
    with pytest.raises(UserError, match=r"^models\.name: "):
        prune_checkpoint(
            ModelConfig(name=str(folder)),
            pruning_of("magnitude-global"),
            corpus,
            tmp_path / "out",
            "cpu",
        )
    assert not (tmp_path / "out").exists()


# Files as memory


def test_a_file_that_is_made_before_its_content(tmp_path):
    generator = torch.Generator().manual_seed(0)
    content = {
        "flag": torch.tensor([True, False, True]),
        "half": torch.randn(3, 5, generator=generator).bfloat16(),
        "wide": torch.randn(7, generator=generator).double(),
        "empty": torch.zeros(0, 4),
        "one": torch.tensor(3),
    }
    made = tensor_files.create(
        tmp_path / "made.safetensors", {n: (t.dtype, tuple(t.shape)) for n, t in content.items()}
    )
    for name, tensor in content.items():
        made[name].copy_(tensor)
    assert_same_tensors(load_file(tmp_path / "made.safetensors"), content)
    places = tensor_files.layout(tmp_path / "made.safetensors")
    for name, tensor in content.items():
        read = torch.empty_like(tensor)
        tensor_files.fill(read, tmp_path / "made.safetensors", places[name])
        assert torch.equal(read, tensor)


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(UserError, match=r"no room for .*No space left on device"):
        tensor_files.create(tmp_path / "x.safetensors", {"a": (torch.float32, (4, 4))})


# Spread over devices and disk by accelerate


def test_a_model_that_waits_on_disk_gives_the_same_numbers(shards, windows, tmp_path):
    one = load_model(ModelConfig(name=str(shards)))
    many = load_model(spread(shards, tmp_path))
    assert sum(p.is_meta for p in many.model.parameters()) > 10
    few = windows[:4]
    assert many.device == torch.device("cpu")
    assert torch.equal(logits(many, few), logits(one, few))
    for site in ("resid_post", "attn_out", "mlp_out"):
        assert torch.equal(run_to_site(many, few, site, 1), run_to_site(one, few, site, 1))
        assert torch.equal(
            replace_at_site(many, few, site, 1, torch.zeros_like),
            replace_at_site(one, few, site, 1, torch.zeros_like),
        )
    ours, theirs = (
        measure_perplexity(lm, windows.flatten(), context_tokens=32, bos_token=None)
        for lm in (many, one)
    )
    assert ours.nll == theirs.nll
    upper, reference = (UpperBlocks(lm, few, site="resid_post", layer=0) for lm in (many, one))
    baselines = upper.baseline(upper.states), reference.baseline(reference.states)
    assert torch.equal(baselines[0].top, baselines[1].top)
    assert not compare_weights(one, many).as_json()["weight_difference"]


@pytest.mark.parametrize("name", PRUNINGS)
def test_a_model_that_waits_on_disk_is_pruned_alike(shards, name, windows, tmp_path, small_batches):
    one, many = load_model(ModelConfig(name=str(shards))), load_model(spread(shards, tmp_path))
    before = model_fingerprint(ModelConfig(name=str(shards)))
    pruning = pruning_of(name)
    text = windows if pruning.is_calibrated else None
    expected = prune_model(one, pruning, calibration=text)
    found = prune_model(many, pruning, calibration=text)
    assert masks_sha256(found.masks) == masks_sha256(expected.masks)
    assert torch.equal(logits(many, windows[:3]), logits(one, windows[:3]))
    # stored by one, given to another
    stored = tmp_path / "stored"
    stored.mkdir()
    save_pruning(many, found, stored)
    for config in (spread(shards, tmp_path), ModelConfig(name=str(shards))):
        other = load_model(config)
        apply_pruning(other, stored)
        assert torch.equal(logits(other, windows[:3]), logits(one, windows[:3]))
    save_checkpoint(many, tmp_path / "saved")
    save_checkpoint(one, tmp_path / "expected")
    assert_same_tensors(tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "expected"))
    assert model_fingerprint(ModelConfig(name=str(shards))) == before  # the source is untouched


def test_norms_are_the_same_bit_for_bit(shards, windows, tmp_path, small_batches):
    expected = input_norms(load_model(ModelConfig(name=str(shards))), windows)
    found = input_norms(load_model(spread(shards, tmp_path)), windows)
    assert_same_tensors(found, expected)


def test_blocks_that_cannot_be_run_alone_are_run_together(shards, windows, tmp_path, monkeypatch):
    expected = input_norms(load_model(ModelConfig(name=str(shards))), windows)
    monkeypatch.setattr(calibrate, "_not_replayable", lambda *_: "block 1 takes more")
    many = load_model(spread(shards, tmp_path))
    assert_same_tensors(input_norms(many, windows), expected)
    with pytest.raises(UserError, match="block 1 takes more; use dense"):
        prune_model(many, pruning_of("wanda-sequential"), calibration=windows)


def test_masks_last_and_the_disk_is_given_back(shards, windows, tmp_path):
    one, many = load_model(ModelConfig(name=str(shards))), load_model(spread(shards, tmp_path))
    masks = {n: torch.rand(as_matrix(m).shape) < 0.5 for n, m in prunable_matrices(one).items()}
    for lm in (one, many):
        apply_masks(lm, masks)
    for _ in range(2):
        assert torch.equal(logits(many, windows[:3]), logits(one, windows[:3]))
    assert len(list(tmp_path.iterdir())) == 1  # nothing but the folder of the model
    del many, lm
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_block_is_brought_in_once(shards, windows, tmp_path, monkeypatch):
    many = load_model(spread(shards, tmp_path))
    block = many.blocks[1]
    with offload.resident(block):
        assert not any(parameter.is_meta for parameter in block.parameters())
        logits(many, windows[:1])
        assert not any(parameter.is_meta for parameter in block.parameters())
    assert all(parameter.is_meta for parameter in block.parameters())


def test_a_study_on_a_spread_model_gives_the_same_tables(checkpoint_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("prunelens.report.write.write_figures", lambda *_: [])
    monkeypatch.setattr("prunelens.report.write.write_page", lambda *_: None)
    data = tiny_study(checkpoint_folder, write_text(tmp_path / "text.txt"))
    data["prunings"] = [{"criterion": "sparsegpt", "scope": "matrix", "sparsities": [0.5]}]
    data["questions"] = ["survival", "persistence", "transfer", "causal"]
    data["causal"] = {"prompts": 2, "group_size": 1, "contexts_per_latent": 1}
    (tmp_path / "offload").mkdir()
    places = spread(checkpoint_folder, tmp_path / "offload", "70KB").model_dump(
        include={"device_map", "max_memory", "offload_folder"}
    )
    elsewhere = {**data, "models": [{**data["models"][0], **places}]}
    tables = []
    for number, chosen in enumerate((data, elsewhere)):
        study = study_from_data(chosen)
        out = tmp_path / str(number)
        outcome = run_and_report(study, out, quiet=True)
        assert {result.status for result in outcome.results} == {"done"}
        tables.append({p.name: p.read_bytes() for p in sorted((out / "tables").glob("*.csv"))})
    assert tables[0] == tables[1]
    assert {"perplexity.csv", "transfer.csv", "causal.csv"} <= set(tables[0])
    # places are no part of what an artifact is
    first, second = (plan_study(study_from_data(chosen)) for chosen in (data, elsewhere))
    assert list(first.targets()) == list(second.targets())
    gc.collect()
    assert not list((tmp_path / "offload").iterdir())


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_memory": {"cpu": "1GB"}},
        {"offload_folder": "x"},
        {"device_map": "auto", "max_memory": {"cpu": "plenty"}},
        {"device_map": "auto", "max_memory": {"gpu": "1GB"}},
        {"device_map": "auto", "max_memory": {"cpu": "-1GB"}},
    ],
)
def test_wrong_places_are_refused(wrong):
    with pytest.raises(UserError, match=r"max_memory|offload_folder"):
        study_from_data({"models": [{"name": "bundled", **wrong}]})


def test_a_folder_that_is_not_there_is_named(checkpoint_folder, tmp_path):
    with pytest.raises(UserError, match=r"models\.offload_folder: cannot write"):
        load_model(spread(checkpoint_folder, tmp_path / "none"))


# Several times the memory

LIMITED = pathlib.Path(__file__).parent / "limited_memory.py"
BUDGET = 74 << 20


def test_a_model_of_several_times_the_memory(tmp_path):
    """The ordinary path fails under the limit; pruning on disk gives the same masks under it."""
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=28,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model", max_shard_size="20MB")
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size > 4 * BUDGET
    del model
    done = subprocess.run(
        [sys.executable, str(LIMITED), str(tmp_path / "model"), str(tmp_path), str(BUDGET)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    limited = json.loads(done.stdout)
    assert "memory" in limited.pop("loaded as a whole")
    text = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
    for name, found in limited.items():
        lm = load_model(str(tmp_path / "model"))
        pruning = pruning_of(name)
        expected = prune_model(lm, pruning, calibration=text if pruning.is_calibrated else None)
        assert found == masks_sha256(expected.masks)
        saved = tensors_of(tmp_path / name)
        assert all(torch.equal(saved[n], t) for n, t in lm.model.state_dict().items())
    assert set(limited) == {"magnitude-global", "wanda", "wanda-sequential"}
