"""The whole flow at the size of Gemma 3 1B, once with few tokens and once with twice as many.

usage: python benchmarks/real_size.py [--tokens 8192] [--workers 1] [--rounds 1] [--device cpu]
       python benchmarks/real_size.py --questions persistence
       python benchmarks/real_size.py --device cuda --full

The model has the true architecture (the shape that ships with prunelens) and random weights, the
text is random token ids, so nothing is downloaded and no number of the study means anything; what
counts is what each kind of stage takes. The study is the shipped `paper-a1`, with every question,
fewer conditions and seeds, and every count of tokens scaled down alike. If a step were quadratic
in the tokens, doubling them would take up to four times as long. (Costs that do not grow hide a
part of that; the numbers of latents, seeds and conditions stay as they are.)

With `--questions` only the stages that those need are run, and the report is a file of its own.
With `--full` it is instead one run of tier A1's size: 1.5 M tokens, 20,000 steps, three seeds, a
dense and a pruned condition, with the wall clock of every kind of stage. That needs a GPU.
"""

from __future__ import annotations

import argparse
import bisect
import collections
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import psutil
import torch
from safetensors.torch import save_file

from prunelens.config import NEEDS
from prunelens.paper import shipped_shape
from side_by_side import Mark, options, publish

SHAPED_LIKE = "google/gemma-3-1b-pt"
PARAMETERS = 999_885_952  # of the true architecture; checked
BOS, CONTEXT = 2, 256
SPARE = 1.3  # times the tokens that are asked for: a hash decides the split of every window
LEAST_TOKENS = 8192  # a quarter of them is one of perplexity's windows of 2,048
ROW = 10  # of docs/performance.md
MOST_GIB, MOST_RATIO = 24.0, 2.2
WORTH_A_RATIO = 4.0  # seconds of CPU time; below, a ratio of times says nothing
SECONDS_BETWEEN_SAMPLES = 0.2
ALL_QUESTIONS = list(NEEDS)
PRUNINGS = "[{criterion: wanda, scope: row, sparsities: [0.3]}]"


class Kind(NamedTuple):
    """All stages of one kind in one run of the study."""

    stages: int
    seconds: float
    """Wall time of all of them."""
    cpu_seconds: float
    """Time of all threads; on a machine that is not idle it says more than wall time."""
    peak_gib: float
    """The most memory that the study's processes held while one of them ran; NaN where all of them
    together were too short to be seen."""


class Ran(NamedTuple):
    """One run of the study."""

    seconds: float
    """From start to end, imports, tables and page included."""
    peak_gib: float
    disk_gib: float
    """What the study's folder holds at its end; activation stores are kept."""
    gpu_gib: float
    """The most GPU memory in use; NaN without a GPU."""
    kinds: dict[str, Kind]


class Sample(NamedTuple):
    """What was held at one moment."""

    at: float
    """Seconds since the epoch."""
    held: float
    """Bytes of memory, pages that several processes share counted once."""
    gpu: float
    """Bytes of GPU memory; 0 without one."""


def main() -> None:
    """Measure and publish."""
    chosen = _options()
    torch.set_num_threads(chosen.threads)
    sizes = [chosen.tokens] if chosen.full else [chosen.tokens, 2 * chosen.tokens]
    with tempfile.TemporaryDirectory(prefix="prunelens-real-size-") as name:
        folder = pathlib.Path(name)
        make_checkpoint(folder / "model")
        runs: dict[int, list[Ran]] = {size: [] for size in sizes}
        for _ in range(chosen.rounds):
            for size in sizes:
                runs[size].append(_run(folder, size, chosen))
                print(size, runs[size][-1], file=sys.stderr)
    marks = []
    if not chosen.full:
        peak = max(ran.peak_gib for size in sizes for ran in runs[size])
        marks = [Mark(ROW, "most memory at one time, GiB", MOST_GIB, "at most", peak)]
        marks += _growth(*(runs[size] for size in sizes))
    part = [] if chosen.questions == ALL_QUESTIONS else chosen.questions
    publish(
        "real_size",
        variant="_".join(["full"] * chosen.full + part),
        settings={
            "model": f"random weights in the shape of {SHAPED_LIKE}",
            "parameters": PARAMETERS,
            "device": chosen.device,
            "workers": chosen.workers,
            "rounds": chosen.rounds,
            "study": {str(size): _settings(pathlib.Path(), size, chosen) for size in sizes},
        },
        results={f"{size} training tokens": runs[size] for size in sizes},
        marks=marks,
        save=chosen.save,
    )


def make_checkpoint(folder: pathlib.Path) -> None:
    """Save a random model of the true architecture, in bfloat16, without a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = shipped_shape(SHAPED_LIKE)
    assert shape is not None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == PARAMETERS, parameters
    model.save_pretrained(folder)


# --- the study ------------------------------------------------------------------------------------


def _options() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="training tokens of the first run")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--questions", nargs="+", choices=ALL_QUESTIONS, default=ALL_QUESTIONS)
    parser.add_argument("--full", action="store_true", help="tier A1's size; needs a GPU")
    parser.set_defaults(rounds=1)
    chosen = parser.parse_args()
    if chosen.full:
        if not chosen.device.startswith("cuda"):
            parser.error("--full takes days without a GPU; add --device cuda")
        chosen.tokens = 1_500_000
    if chosen.tokens < LEAST_TOKENS:
        parser.error(f"--tokens: {chosen.tokens} is too few; give at least {LEAST_TOKENS}")
    return chosen


def _settings(folder: pathlib.Path, tokens: int, chosen: argparse.Namespace) -> dict[str, str]:
    """`--set` of `paper-a1`; every size that counts tokens grows with `tokens`."""
    settings = {
        "models.0.name": str(folder / "model"),
        "models.0.pretrained": "[]",
        "prunings": PRUNINGS,
        "corpus.source": "tokens",
        "corpus.paths": f"[{folder / f'{tokens}.safetensors'}]",
        "perplexity.corpus": "null",
        "questions": f"[{', '.join(chosen.questions)}]",
        "sae.seeds": "[0, 1, 2]",
        "threads_per_stage": str(chosen.threads),
        "keep_activations": "true",  # their stages are to be seen at the end
    }
    if chosen.full:
        return settings
    sizes = {
        "corpus.train_tokens": tokens,
        "corpus.eval_tokens": tokens // 2,
        "corpus.calibration_tokens": tokens // 4,
        "perplexity.max_tokens": tokens // 4,
        "transfer.ce_tokens": tokens // 8,
        "transfer.refit_tokens": tokens // 4,
        "sae.batch_tokens": 1024,
        "sae.steps": tokens // 512,
        "sae.checkpoint_every": 10**6,
        "causal.prompts": max(2, tokens // 4096),
        "causal.group_size": 2,
        "causal.contexts_per_latent": max(2, tokens // 4096),
    }
    written = {field: str(size) for field, size in sizes.items()}
    return settings | {"sae.seeds": "[0, 1]"} | written


def _write_text(path: pathlib.Path, tokens: int) -> None:
    """Windows of random ids behind a BOS: enough for train, eval and calibration together."""
    shape = shipped_shape(SHAPED_LIKE)
    assert shape is not None
    windows = int(SPARE * 1.75 * tokens / CONTEXT) + 64
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(BOS + 1, shape["vocab_size"], (windows, CONTEXT), generator=generator)
    ids[:, 0] = BOS
    save_file({"tokens": ids.int()}, path)


def _run(folder: pathlib.Path, tokens: int, chosen: argparse.Namespace) -> Ran:
    """The study in processes of its own, watched from here."""
    _write_text(folder / f"{tokens}.safetensors", tokens)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        out = pathlib.Path(name) / "study"
        program = pathlib.Path(sys.executable).with_name("prunelens")
        command = [str(program), "run", "paper-a1", "--out", str(out), "--quiet"]
        command += ["--device", chosen.device, "--workers", str(chosen.workers)]
        for field, value in _settings(folder, tokens, chosen).items():
            command += ["--set", f"{field}={value}"]
        started = time.time()
        process = subprocess.Popen(command)
        samples = list(_samples(process, chosen.device))
        seconds = time.time() - started
        assert process.returncode == 0, f"the study ended with exit code {process.returncode}"
        disk = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        return Ran(
            round(seconds, 1),
            _gib(max(sample.held for sample in samples)),
            _gib(disk),
            _gib(max(s.gpu for s in samples)) if chosen.device.startswith("cuda") else float("nan"),
            _kinds(out, samples),
        )


def _samples(process: subprocess.Popen[bytes], device: str) -> Iterator[Sample]:
    """What the process and its children hold, several times a second, until it has ended."""
    root = psutil.Process(process.pid)
    while process.poll() is None:
        held = 0
        for one in [root, *_children(root)]:
            try:
                held += one.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        gpu = 0
        if device.startswith("cuda"):
            free, total = torch.cuda.mem_get_info()
            gpu = total - free
        yield Sample(time.time(), held, gpu)
        time.sleep(SECONDS_BETWEEN_SAMPLES)


def _children(root: psutil.Process) -> list[psutil.Process]:
    try:
        return root.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _kinds(out: pathlib.Path, samples: list[Sample]) -> dict[str, Kind]:
    """Stages by kind, the dearest first.

    A stage ended when its `meta.json` was written. What was held at a moment is put down to the
    stage that ended next, which with one worker is the one that ran.
    """
    seconds: dict[str, list[float]] = collections.defaultdict(list)
    cpu_seconds: dict[str, float] = collections.defaultdict(float)
    ends: list[tuple[float, str]] = []
    for path in (out / "artifacts").glob("*/*/meta.json"):
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        seconds[meta["stage"]].append(meta["wall_seconds"])
        cpu_seconds[meta["stage"]] += meta["cpu_seconds"]
        ends.append((path.stat().st_mtime, meta["stage"]))
    ends.sort()
    held = dict.fromkeys(seconds, float("nan"))
    for sample in samples:
        following = bisect.bisect(ends, (sample.at, ""))
        if following < len(ends):
            kind = ends[following][1]
            held[kind] = max(sample.held, held[kind]) if held[kind] > 0 else sample.held
    found = {
        kind: Kind(len(times), round(sum(times), 2), round(cpu_seconds[kind], 2), _gib(held[kind]))
        for kind, times in seconds.items()
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].seconds))


def _gib(number: float) -> float:
    return round(number / 2**30, 3)


# --- how it grows ---------------------------------------------------------------------------------


def _growth(some: list[Ran], twice: list[Ran]) -> Iterator[Mark]:
    """Ratios at twice the tokens: the worst kind of stage, and the memory."""
    once, double = _medians(some), _medians(twice)
    ratios = {
        kind: round(double[kind] / once[kind], 2)
        for kind in once
        if double[kind] > WORTH_A_RATIO and once[kind] > 0
    }
    assert ratios, f"no kind of stage took {WORTH_A_RATIO} s of CPU: give more --tokens"
    worst = max(ratios, key=lambda kind: ratios[kind])
    what = f"CPU time of a kind of stage at twice the tokens, the worst ({worst})"
    yield Mark(ROW, what, MOST_RATIO, "at most", ratios[worst])
    peaks = [statistics.median(ran.peak_gib for ran in runs) for runs in (some, twice)]
    grown = round(peaks[1] / peaks[0], 2)
    yield Mark(ROW, "most memory at twice the tokens", MOST_RATIO, "at most", grown)


def _medians(runs: list[Ran]) -> Mapping[str, float]:
    return {
        kind: statistics.median(ran.kinds[kind].cpu_seconds for ran in runs)
        for kind in runs[0].kinds
    }


if __name__ == "__main__":
    main()
