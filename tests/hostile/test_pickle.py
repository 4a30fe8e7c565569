"""No pickle is read or written while a study runs, and none is left behind.

That the source asks for none is held by tests/test_repository.py; here the interpreter itself says
what is loaded (`pickle.find_class`, which fires for the C and the Python unpickler alike).
"""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import pickletools
import shutil
import subprocess
import sys
import zipfile

import pytest

from tiny_study import tiny_study, write_text

_STUDY = """
import sys

def hear(event, arguments):
    if event == "pickle.find_class":
        frame = sys._getframe()
        while frame is not None:
            name = frame.f_globals.get("__name__", "")
            if name.startswith("prunelens.") or name == "__main__":
                print("UNPICKLED", arguments, name, flush=True)
                break
            frame = frame.f_back

import json, pathlib
from prunelens.config import study_from_data
from prunelens.report.explorer.study import write_study_explorer
from prunelens.report.write import run_and_report
import torch, transformers, matplotlib.pyplot, pandas, scipy.stats, sklearn  # libraries on import

sys.addaudithook(hear)
def refused(*_, **__):
    raise AssertionError("a pickle is read or written")
torch.load = torch.save = torch.serialization.load = torch.serialization.save = refused

out = pathlib.Path(sys.argv[2])
outcome = run_and_report(
    study_from_data(json.loads(sys.argv[1])), out, device="cpu", workers=1, quiet=True
)
assert not outcome.failures, outcome.failures
assert {result.status for result in outcome.results} == {"done"}, outcome.results
write_study_explorer(out)

print("ENDED", flush=True)
import pickle
pickle.loads(pickle.dumps(pathlib.PurePosixPath("x")))  # so that the silence says something
"""


def ran(*arguments: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "JAXTYPING_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _STUDY, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def finished(
    checkpoint_folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, pathlib.Path]:
    """What a study said while it ran, and its folder; with checkpoints of SAEs and a bait."""
    folder = tmp_path_factory.mktemp("study")
    model = shutil.copytree(checkpoint_folder, folder / "model")
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": [1.0]}))
    study = tiny_study(model, write_text(folder / "text.txt"))
    study["models"][0]["layers"] = [1]
    study["prunings"] = study["prunings"][:1]
    out = folder / "out"
    return ran(json.dumps(study), str(out)), out


def test_a_study_unpickles_nothing(finished: tuple[str, pathlib.Path]) -> None:
    """Nothing at all while it is under way, in one process, from the text to the explorer."""
    told, ended, bait = finished[0].partition("ENDED\n")
    assert ended and "UNPICKLED" not in told
    assert "UNPICKLED ('pathlib', 'PurePosixPath')" in bait


def test_no_file_of_a_study_is_a_pickle(finished: tuple[str, pathlib.Path]) -> None:
    files = [path for path in finished[1].rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 100
    assert not [path for path in files if is_pickled(path.read_bytes(), path)]
    known = {".json", ".safetensors", ".parquet", ".csv", ".yaml", ".html", ".pdf", ".png", ".txt"}
    known |= {".js", ".css", ".svg", ".log", ".md", ".LICENSE", ".NOTICE", ""}
    assert {path.suffix for path in files} <= known


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_known_when_it_is_seen(protocol: int, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(pickle.dumps({"a": [1.5, pathlib.PurePosixPath("x")]}, protocol))
    assert is_pickled(path.read_bytes(), path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"x")
    assert is_pickled(path.read_bytes(), path)
    for harmless in (b"[1, 2]", b"a,b\n1,2\n", b"PAR1", b"\x89PNG\r\n"):
        assert not is_pickled(harmless, path)


def is_pickled(content: bytes, path: pathlib.Path) -> bool:
    """Whether a file is a pickle of any protocol, or an archive as torch.save writes it."""
    if content[:4] == b"PK\x03\x04" and zipfile.is_zipfile(path):
        return True
    if content[:1] == b"\x80":
        return content[1] <= pickle.HIGHEST_PROTOCOL
    if not content.rstrip().endswith(b"."):
        return False
    try:
        operations = [operation.name for operation, _, _ in pickletools.genops(content)]
    except (ValueError, IndexError):
        return False
    return "STOP" in operations and len(operations) > 1
