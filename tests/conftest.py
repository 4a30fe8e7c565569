"""Tiny random models of four architectures, and a saved checkpoint with a trained tokenizer."""

from __future__ import annotations

import logging
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import typechecking
import warm
from prunelens.cli import main
from prunelens.model import LanguageModel, as_language_model

ARCHITECTURES = ("llama", "gemma2", "gemma3", "gpt2")
LONGEST = ("test_kill", "test_cluster", "test_examples", "test_selftest")
VOCABULARY, CONTEXT = 128, 64
TEXT = (
    "def greet(name):\n    return 'hello ' + name\n\nThe quick brown fox jumps over the lazy dog.\n"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: at the end, the other process would wait for them."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """The first calls of every function are checked in every test."""
    typechecking.next_test()


def pytest_configure() -> None:
    """Ctrl-C is part of what is tested, but shells have it ignored by what they start with `&`."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Artifacts for whoever asks for the same stages, of all processes of this run of pytest."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "pool"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def sae_lens() -> ModuleType:
    return pytest.importorskip("sae_lens", reason="the extra `saelens` is not installed")


@pytest.fixture(scope="session")
def sparsify() -> ModuleType:
    """Its first import by a process decides whether it decodes with kernels for GPUs only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSIFY_DISABLE_TRITON", "1")
        return pytest.importorskip("sparsify", reason="eai-sparsify (extra `dev`) is not installed")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two test processes share two cores, and on tensors this small a second thread costs more
    than it gives; the test before may have set others.
    """
    torch.set_num_threads(1)


@pytest.fixture
def warm_workers() -> Iterator[None]:
    """Studies of several workers have them without the seconds of imports."""
    with warm.warm_workers():
        yield


class Ended(NamedTuple):
    """What a command left, named as subprocess does."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def prunelens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """The command line as a user types it, in this process: imports take seconds of a fresh one."""

    def run(*arguments: object) -> Ended:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(logging.root, "handlers", [])  # it sets its own where there are none
            patch.setattr(sys, "argv", ["prunelens", *map(str, arguments)])
            main()
        return Ended(ended.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture(params=ARCHITECTURES)
def tiny_lm(request: pytest.FixtureRequest) -> LanguageModel:
    """One tiny random model per architecture, float32, fresh for every test."""
    return tiny_language_model(request.param)


@pytest.fixture
def tiny_llama() -> LanguageModel:
    """The tiny Llama alone."""
    return tiny_language_model("llama")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of up to 384 tokens with a BOS (id 0) that it never adds by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<bos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>")


def panicking(
    tokenizer: transformers.PreTrainedTokenizerFast,
) -> transformers.PreTrainedTokenizerFast:
    """A copy with a regular expression that gives up, in Rust, on many letters a."""
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    catastrophic = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    copy.pre_tokenizer = pre_tokenizers.Sequence([catastrophic, copy.pre_tokenizer])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=copy, bos_token="<bos>")


@pytest.fixture(scope="session")
def checkpoint_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: transformers.PreTrainedTokenizerFast
) -> pathlib.Path:
    """A saved tiny Llama with its tokenizer. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-llama"
    tiny_language_model("llama", vocabulary=len(tiny_tokenizer)).model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def tiny_language_model(
    architecture: str, *, vocabulary: int = VOCABULARY, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """A random model whose weights are large enough that every part of it matters."""
    config = _tiny_config(architecture, vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return as_language_model(model, label=f"tiny-{architecture}")


def _tiny_config(architecture: str, vocabulary: int) -> transformers.PreTrainedConfig:
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    if architecture == "gpt2":
        return transformers.GPT2Config(
            vocab_size=vocabulary,
            n_embd=16,
            n_layer=3,
            n_head=2,
            n_positions=CONTEXT,
            initializer_range=0.2,
            **ids,
        )
    common = {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,
        **ids,
    }
    if architecture == "llama":
        return transformers.LlamaConfig(**common)
    if architecture == "gemma2":  # a small cap, so that it matters
        return transformers.Gemma2Config(**common, sliding_window=8, attn_logit_softcapping=2.0)
    return transformers.Gemma3TextConfig(**common, sliding_window=8)
