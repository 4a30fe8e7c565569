"""Memory: pruning a checkpoint on disk against loading the whole model, on one random model.

`python benchmarks/large_models.py` writes a random Llama to disk, then prunes it to 50 % in
processes of their own, each way once: loaded as a whole, and on disk (`prunelens prune`, where a
criterion needs calibration with `--block-by-block`). Counted is the most anonymous memory that a
process holds beyond what it held once all was imported, over the model's size. Pages of mapped
files are not in it, because the system takes those back whenever others need the memory.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, NamedTuple

import torch
import transformers

from prunelens.config import ModelConfig, PruningConfig
from prunelens.model import load_model
from prunelens.prune import masks_sha256, prune_model, save_checkpoint
from prunelens.prune.checkpoint import writing_checkpoint
from prunelens.prune.on_disk import copy_to_disk
from side_by_side import Mark, options, publish

VOCABULARY = 8192
WAYS = ("whole", "on disk")
PRUNINGS: dict[str, dict[str, Any]] = {
    "magnitude": {"criterion": "magnitude", "scope": "global"},
    "wanda": {"criterion": "wanda", "scope": "row"},
    "wanda sequential": {"criterion": "wanda", "scope": "row", "calibration": "sequential"},
}


class Measured(NamedTuple):
    """One way of pruning one model."""

    peak_over_model: float
    """Most anonymous memory beyond the start's, over the bytes of the model."""
    seconds: float
    """From the files to the files."""
    masks_sha256: str
    """Equal where the masks are."""


def main() -> None:
    """Every way in a process of its own."""
    parser = options(__doc__)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--one", nargs=4, metavar=("WAY", "CRITERION", "MODEL", "OUT"))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.one:
        print(json.dumps(_measured(chosen, *chosen.one)))
        return
    found: dict[str, dict[str, Measured]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        model_bytes = _write_model(chosen, folder / "model")
        for criterion in PRUNINGS:
            found[criterion] = {way: _in_a_process(way, criterion, folder) for way in WAYS}
            assert len({one.masks_sha256 for one in found[criterion].values()}) == 1, criterion
    shown = {key: value for key, value in vars(chosen).items() if key not in ("save", "one")}
    publish(
        "large_models",
        settings={**shown, "model_mib": round(model_bytes / 2**20)},
        results=found,
        marks=_marks(found),
        save=chosen.save,
    )


def _marks(found: dict[str, dict[str, Measured]]) -> list[Mark]:
    """One block and activations was asked; of 24 blocks a quarter of the model is generous."""
    return [
        Mark(0, f"most memory over the model's size, {criterion} on disk", 0.25, "at most",
             ways["on disk"].peak_over_model)
        for criterion, ways in found.items()
    ]  # fmt: skip


def _in_a_process(way: str, criterion: str, folder: pathlib.Path) -> Measured:
    out = folder / f"{criterion}-{way}"
    command = [sys.executable, __file__, *sys.argv[1:], "--one", way, criterion]
    done = subprocess.run(
        [*command, str(folder / "model"), str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return Measured(*json.loads(done.stdout.splitlines()[-1]))


def _measured(chosen: Any, way: str, criterion: str, model: str, out: str) -> Measured:
    """Prune once, and watch this process."""
    config = ModelConfig(name=model)
    pruning = PruningConfig.model_validate({**PRUNINGS[criterion], "sparsity": 0.5})
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(VOCABULARY, (chosen.windows, chosen.context), generator=generator)
    calibration = text if pruning.is_calibrated else None
    size = sum(path.stat().st_size for path in pathlib.Path(model).glob("*.safetensors"))
    _import_all(way, pathlib.Path(out + "-first"))
    before, peak, done = _anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, _anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.perf_counter()
    if way == "whole":
        lm = load_model(config)
        masks = prune_model(lm, pruning, calibration=calibration).masks
        save_checkpoint(lm, pathlib.Path(out))
    else:
        with writing_checkpoint(pathlib.Path(out)) as partial:
            lm = copy_to_disk(config, partial)
            masks = prune_model(lm, pruning, calibration=calibration).masks
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return Measured(round((peak - before) / size, 3), round(seconds, 2), masks_sha256(masks))


def _import_all(way: str, folder: pathlib.Path) -> None:
    """By going the same way with a small model, so that what it imports is not counted."""
    if way == "whole":
        save_checkpoint(load_model("bundled"), folder)
        return
    with writing_checkpoint(folder) as partial:
        copy_to_disk(ModelConfig(), partial)


def _anonymous_bytes() -> int:
    """What this process holds that is no file's."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("large_models.py: needs Linux, which counts anonymous memory apart")


def _write_model(chosen: Any, folder: pathlib.Path) -> int:
    """A random Llama of usual proportions in files of 200 MB; returns its bytes."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=chosen.width,
        intermediate_size=chosen.width * 11 // 4,
        num_hidden_layers=chosen.blocks,
        num_attention_heads=chosen.width // 64,
        num_key_value_heads=chosen.width // 128,
        max_position_embeddings=chosen.context,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="200MB")
    return sum(parameter.nbytes for parameter in model.parameters())


if __name__ == "__main__":
    main()
