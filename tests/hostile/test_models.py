"""Model folders made to run code, to fill the memory, or to break what reads them."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import resource
import shutil
import sys
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
import transformers
from tokenizers import Tokenizer

from conftest import Ended, panicking
from prunelens.checkpoint import load_tokenizer, load_weights, model_fingerprint, model_shape
from prunelens.config import CorpusConfig, ModelConfig
from prunelens.corpus import split_tokens
from prunelens.errors import UserError
from prunelens.model import load_model
from prunelens.study.stages import failure_of
from tiny_study import tiny_study

HTML = "<img src=x onerror=alert(1)>"


@pytest.fixture
def folder(checkpoint_folder: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(checkpoint_folder, tmp_path / "model")


def changed(path: pathlib.Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(action: Callable[[], Any]) -> str:
    before = peak_bytes()
    with pytest.raises(UserError) as caught:
        action()
    assert peak_bytes() - before < 500e6
    told = str(caught.value)
    assert told.isprintable() and len(told) < 700, told
    return told


def peak_bytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def shape_and_weights(folder: pathlib.Path) -> None:
    model_shape(ModelConfig(name=str(folder)))
    load_weights(ModelConfig(name=str(folder)))


# --- no code --------------------------------------------------------------------------------------


@pytest.fixture
def bait(folder: pathlib.Path) -> pathlib.Path:
    """A module beside the weights that leaves a file when it is run, and what would be left."""
    left = folder.parent / "ran"
    (folder / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(left)!r}).touch()\n"
        "class Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
    )
    return left


def test_the_bait_bites_those_who_trust_it(
    folder: pathlib.Path, bait: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the tests below say something."""
    changed(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    monkeypatch.setattr(
        transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder.parent / "modules")
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(AttributeError):
        transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert bait.exists()


@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_code_of_a_model_is_not_run(
    model_type: str, folder: pathlib.Path, bait: pathlib.Path
) -> None:
    """Of a known type the library's own code is used, of another the model is refused."""
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    changed(folder / "config.json", model_type=model_type, auto_map=names, trust_remote_code=True)
    config = ModelConfig(name=str(folder))
    if model_type == "llama":
        shape_and_weights(folder)
        assert load_tokenizer(config) is not None
    else:
        for action in (model_shape, load_weights):
            assert "does not run" in refusal(lambda: action(config))  # noqa: B023
    assert not bait.exists()


@pytest.mark.parametrize("name", ["evil.Tokenizer", "someone/else--evil.Tokenizer"])
def test_code_of_a_tokenizer_is_not_run(
    name: str, folder: pathlib.Path, bait: pathlib.Path
) -> None:
    own = {"auto_map": {"AutoTokenizer": [name, name]}, "tokenizer_class": "EvilTokenizer"}
    changed(folder / "tokenizer_config.json", **own)
    assert "does not run" in refusal(lambda: load_tokenizer(ModelConfig(name=str(folder))))
    assert not bait.exists()


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation_internal"])
def test_kernels_of_others_are_not_fetched(field: str, folder: pathlib.Path) -> None:
    changed(folder / "config.json", **{field: "someone/kernel"})
    assert "someone/kernel" in refusal(lambda: shape_and_weights(folder))


def test_pickles_are_not_read(folder: pathlib.Path, bait: pathlib.Path) -> None:
    """Neither alone, nor where an index names them."""
    (folder / "pytorch_model.bin").write_bytes(
        b"\x80\x04cpathlib\nPath.touch\n(cpathlib\nPath\n(V" + str(bait).encode() + b"\ntRtR."
    )
    for file in ("pytorch_model.bin", "../model/pytorch_model.bin", "/etc/passwd", 7):
        index = {"metadata": {}, "weight_map": {"lm_head.weight": file}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        weights = folder / "model.safetensors"
        weights.rename(folder / "other.safetensors")
        assert "index.json names" in refusal(lambda: shape_and_weights(folder))
        (folder / "other.safetensors").rename(weights)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").unlink()
    assert "no .safetensors weights" in refusal(lambda: shape_and_weights(folder))
    assert not bait.exists()


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": "x"}', "[" * 100_000])
def test_an_index_that_is_none(index: str, folder: pathlib.Path) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    assert "index.json" in refusal(lambda: shape_and_weights(folder))


def test_an_adapter_is_refused_wherever_it_points(folder: pathlib.Path) -> None:
    where = {"base_model_name_or_path": "/somewhere/else", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(where))
    assert "adapter" in refusal(lambda: shape_and_weights(folder))


def test_no_chat_template_is_rendered(folder: pathlib.Path, bait: pathlib.Path) -> None:
    template = "{{ cycler.__init__.__globals__.os.popen('touch " + str(bait) + "') }}" + HTML
    (folder / "chat_template.jinja").write_text(template)
    changed(folder / "tokenizer_config.json", chat_template=template)
    assert load_model(str(folder)).tokenizer is not None
    assert not bait.exists()


# --- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "7", "{", "[" * 100_000, '{"a":' * 50_000, '{"a": ' + "9" * 5000 + "}"],
)
def test_a_config_that_is_none(text: str, folder: pathlib.Path) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(lambda: model_shape(ModelConfig(name=str(folder))))
    assert "config.json" in refusal(lambda: load_weights(ModelConfig(name=str(folder))))


@pytest.mark.parametrize("text", ["[]", "7", "{", "[" * 100_000, '{"a":' * 50_000])
def test_a_generation_config_that_is_none(
    text: str, folder: pathlib.Path, tmp_path: pathlib.Path, prunelens: Callable[..., Ended]
) -> None:
    (folder / "generation_config.json").write_text(text)
    ended = prunelens("prune", folder, "--criterion", "magnitude", "--out", tmp_path / "out")
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert "its generation_config.json cannot be read" in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 10**9, "head_dim": 10**9},
        {"hidden_size": 2**62},
        {"intermediate_size": 10**11},
        {"vocab_size": 10**12},
        {"num_hidden_layers": 10**7},
        {"num_hidden_layers": 300, "intermediate_size": 10**7},
        {"num_attention_heads": 10**6},
        {"hidden_size": -1},
        {"hidden_size": "x"},
        {"hidden_size": 16.5},
        {"num_attention_heads": 0},
        {"num_attention_heads": None},
        {"num_hidden_layers": 0},
        {"model_type": "../../x"},
        {"model_type": [1]},
        {"hidden_act": "__import__('os')"},
        {"layer_types": ["x"]},
        {"rope_parameters": [1]},
        {"rms_norm_eps": "x"},
        {"dtype": "os"},
        {"quantization_config": "x"},
        {"quantization_config": {"quant_method": ["x"]}},
        {"bos_token_id": HTML},
    ],
    ids=str,
)
def test_a_config_of_absurd_sizes_or_types(fields: dict[str, Any], folder: pathlib.Path) -> None:
    """Refused before memory is reserved for what it speaks of."""
    changed(folder / "config.json", **fields)
    assert refusal(lambda: shape_and_weights(folder)).startswith("models.name: ")


def test_a_fingerprint_takes_files_alone(folder: pathlib.Path) -> None:
    before = model_fingerprint(ModelConfig(name=str(folder)))
    (folder / "vocab.d").mkdir()
    (folder / "tokenizer.gone").symlink_to(folder / "nowhere")
    assert model_fingerprint(ModelConfig(name=str(folder))) == before


# --- tokenizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "[]", "{", "null", "7", "[" * 100_000])
def test_a_tokenizer_that_is_none(file: str, text: str, folder: pathlib.Path) -> None:
    (folder / file).write_text(text)
    assert "tokenizer" in refusal(lambda: load_tokenizer(ModelConfig(name=str(folder))))


@pytest.mark.parametrize(
    "fields",
    [
        {"version": "9.0"},
        {"model": {"type": "X"}},
        {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
        {"added_tokens": None},
    ],
    ids=str,
)
def test_a_tokenizer_that_the_library_refuses(fields: dict[str, Any], folder: pathlib.Path) -> None:
    changed(folder / "tokenizer.json", **fields)
    assert "tokenizer" in refusal(lambda: load_tokenizer(ModelConfig(name=str(folder))))


@pytest.mark.parametrize("bos", [{"a": 1}, 7])
def test_a_bos_that_is_no_token(bos: object, folder: pathlib.Path) -> None:
    changed(folder / "tokenizer_config.json", bos_token=bos)
    assert "tokenizer" in refusal(lambda: load_tokenizer(ModelConfig(name=str(folder))))


def test_without_bos_and_eos_windows_have_none(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    path = folder / "tokenizer_config.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in described.items() if "_token" not in k}))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    tokenizer = load_tokenizer(ModelConfig(name=str(folder)))
    assert tokenizer is not None and tokenizer.bos_token_id is None
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"The quick brown fox {n}" for n in range(400)))
    corpus = CorpusConfig(
        source="files",
        paths=(str(text),),
        document="line",
        context_tokens=16,
        train_tokens=160,
        eval_tokens=160,
        calibration_tokens=160,
    )
    assert split_tokens(corpus, tokenizer).bos_token is None
    always = corpus.model_copy(update={"bos": "always"})
    assert "bos" in refusal(lambda: split_tokens(always, tokenizer))


def test_added_tokens_full_of_html_are_tokens(folder: pathlib.Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens([HTML])
    tokenizer.save(str(path))
    found = load_tokenizer(ModelConfig(name=str(folder)))
    assert found is not None
    assert found.decode(found(HTML, add_special_tokens=False)["input_ids"]) == HTML


@pytest.fixture
def panicking_study(
    folder: pathlib.Path,
    tmp_path: pathlib.Path,
    tiny_tokenizer: transformers.PreTrainedTokenizerFast,
) -> dict[str, Any]:
    """Of a model whose tokenizer gives up on the text."""
    panicking(tiny_tokenizer).save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("a" * 40 + "c")
    return tiny_study(folder, text)


def test_a_tokenizer_that_panics_ends_every_command_in_one_line(
    panicking_study: dict[str, Any], tmp_path: pathlib.Path, prunelens: Callable[..., Ended]
) -> None:
    path, out = tmp_path / "study.json", tmp_path / "out"
    path.write_text(json.dumps(panicking_study))
    model = panicking_study["models"][0]["name"]
    corpus = panicking_study["corpus"]
    settings = [f"--set=corpus.{field}={json.dumps(value)}" for field, value in corpus.items()]
    for command in (
        ["plan", path, "--no-calibration"],
        ["run", path, "--out", out],
        ["prune", model, "--out", out / "pruned", *settings],
    ):
        ended = prunelens(*command)
        assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
        assert ended.stderr.startswith("prunelens: ") and "cannot read the text" in ended.stderr
    assert not (out / "pruned").exists() and not list(out.rglob("*.tmp"))


def test_a_panic_fails_a_stage_and_nothing_else(
    tmp_path: pathlib.Path, tiny_tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    """One that no code of ours expects; what ends a process is let through."""
    tokenizer = panicking(tiny_tokenizer)
    told = failure_of(lambda: tokenizer("a" * 40 + "c"), tmp_path / "logs" / "x.log")
    assert told is not None and told.startswith("PanicException: Onig: Regex search error")
    assert "PanicException" in (tmp_path / "logs" / "x.log").read_text()
    for error in (KeyboardInterrupt, SystemExit):
        with pytest.raises(error):
            failure_of(lambda: raise_(error), tmp_path / "x.log")  # noqa: B023


def raise_(error: type[BaseException]) -> None:
    raise error("no memory")


@pytest.mark.parametrize(
    "error",
    [
        pa.lib.ArrowMemoryError("malloc of size 123 failed"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
    ids=repr,
)
def test_too_little_memory_is_told_in_one_line(
    error: BaseException,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    prunelens: Callable[..., Ended],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    assert (failure_of(fail, tmp_path / "x.log") or "").startswith("out of memory: ")
    monkeypatch.setattr("prunelens.study.finished.match_saes", fail)
    ended = prunelens("match", "a", "b")
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("prunelens: out of memory (") and "; free some" in ended.stderr
