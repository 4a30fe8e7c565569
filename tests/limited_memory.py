"""Prune a model in a process that may take only so much memory: run by test_large_models.py.

`python limited_memory.py MODEL OUT BYTES` prints, as JSON, what became of loading the whole model
under the limit, then the masks' SHA-256 of each pruning on disk.
"""

import gc
import json
import pathlib
import re
import resource
import sys

import torch

from prunelens.config import CorpusConfig, ModelConfig, PruningConfig
from prunelens.errors import UserError
from prunelens.model import load_model
from prunelens.prune import masks_sha256, prune_model
from prunelens.prune.checkpoint import writing_checkpoint
from prunelens.prune.on_disk import copy_to_disk
from prunelens.study.single import prune_checkpoint

PRUNINGS = {
    "wanda": {"criterion": "wanda", "scope": "row"},
    "wanda-sequential": {"criterion": "wanda", "scope": "row", "calibration": "sequential"},
}


def main() -> None:
    """All ways in turn."""
    model, out = ModelConfig(name=sys.argv[1]), pathlib.Path(sys.argv[2])
    torch.set_num_threads(1)
    _prune(ModelConfig(), "wanda-sequential", out / "warm")  # so that all modules are imported
    _limit(int(sys.argv[3]))
    found = {}
    magnitude = PruningConfig(criterion="magnitude", scope="global", sparsity=0.5)
    pruned = prune_checkpoint(model, magnitude, CorpusConfig(), out / "magnitude-global", "cpu")
    found["magnitude-global"] = masks_sha256(pruned.masks)
    for name in PRUNINGS:
        gc.collect()
        found[name] = _prune(model, name, out / name)
    found["loaded as a whole"] = _loaded(model)
    print(json.dumps(found))


def _prune(model: ModelConfig, name: str, out: pathlib.Path) -> str:
    """The masks' SHA-256."""
    text = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
    pruning = PruningConfig.model_validate({**PRUNINGS[name], "sparsity": 0.5})
    with writing_checkpoint(out) as partial:
        lm = copy_to_disk(model, partial)
        return masks_sha256(prune_model(lm, pruning, calibration=text).masks)


def _limit(num_bytes: int) -> None:
    """Allow so many bytes beyond what is held now; files that are mapped for all do not count."""
    status = pathlib.Path("/proc/self/status").read_text()
    match = re.search(r"VmData:\s+(\d+) kB", status)
    assert match
    limit = int(match[1]) * 1024 + num_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _loaded(model: ModelConfig) -> str:
    """What goes wrong."""
    try:
        load_model(model)
    except (UserError, MemoryError, RuntimeError, OSError) as error:
        return str(error) or "memory"
    return "it fits"


if __name__ == "__main__":
    main()
