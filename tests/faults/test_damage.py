"""Damaged artifacts are found, moved aside, made again, and named."""

import logging
import pathlib
import random
import shutil

import pytest

from faults.kill import results_of
from prunelens.report.write import run_and_report
from prunelens.sae.state import Training
from prunelens.study.plan import plan_study


def artifacts_of(folder):
    found = folder.glob("artifacts/*/*/meta.json")
    return sorted(path.parent for path in found if path.parts[-3] != "damaged")


def flip_a_bit(artifact, generator):
    """One bit of one of its files, meta.json included; returns the file."""
    path = generator.choice(sorted(p for p in artifact.iterdir() if p.stat().st_size))
    content = bytearray(path.read_bytes())
    position = generator.randrange(8 * len(content))
    content[position // 8] ^= 1 << position % 8
    path.write_bytes(content)
    return path


def named_in(caplog):
    """Kind and first letters of the identity of each artifact that a warning names."""
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    told = [line.split() for line in said if line.startswith("damaged artifact")]
    return sorted((words[2], words[3].rstrip(":")) for words in told)


def names(artifacts):
    return sorted((path.parent.name, path.name[:12]) for path in artifacts)


def set_aside_in(folder):
    return sorted(
        tuple(path.name.rsplit("-", 2)[:2]) for path in (folder / "artifacts/damaged").iterdir()
    )


def test_a_flipped_bit_in_every_artifact(finished, request, tmp_path, caplog):
    """Other bits with another --fault-seed."""
    folder = finished.copy(tmp_path / "copy")
    generator = random.Random(request.config.getoption("--fault-seed", 0))
    damaged = artifacts_of(folder)
    assert len(damaged) >= 50
    for artifact in damaged:
        flip_a_bit(artifact, generator)
    with caplog.at_level(logging.WARNING):
        outcome = run_and_report(finished.study, folder, quiet=True)
    assert {result.status for result in outcome.results} == {"done"} and not outcome.failures
    assert named_in(caplog) == set_aside_in(folder) == names(damaged)
    assert results_of(folder) == finished.results
    assert run_and_report(finished.study, folder, quiet=True).num_executed == 0


@pytest.mark.timeout(3600)
def test_a_flipped_bit_makes_that_artifact_again_and_no_other(finished, request, tmp_path, caplog):
    """But for the activation stores that it is made from, which were deleted."""
    folder = finished.copy(tmp_path / "copy")
    generator = random.Random(1 + request.config.getoption("--fault-seed", 0))
    for _ in range(request.config.getoption("--flips", 3)):
        artifact = generator.choice(artifacts_of(folder))
        before = {path: path.stat().st_ino for path in artifacts_of(folder)}
        where = flip_a_bit(artifact, generator)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            outcome = run_and_report(finished.study, folder, quiet=True)
        assert named_in(caplog) == set_aside_in(folder) == names([artifact]), where
        remade = [p for p in artifacts_of(folder) if p.stat().st_ino != before[p]]
        assert remade == [artifact]
        assert 1 <= outcome.num_executed <= 4  # activations of at most three conditions
        assert results_of(folder) == finished.results
        shutil.rmtree(folder / "artifacts" / "damaged")


def truncate(artifact, _):
    path = max(artifact.iterdir(), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete_a_file(artifact, _):
    next(p for p in sorted(artifact.iterdir()) if p.name != "meta.json").unlink()


def delete_meta(artifact, _):
    (artifact / "meta.json").unlink()


def swap_files(artifact, other):
    name = next(p.name for p in sorted(artifact.iterdir()) if p.name != "meta.json")
    swap(artifact / name, other / name)


def swap(one, other):
    aside = one.with_name("aside")
    one.rename(aside), other.rename(one), aside.rename(other)


DAMAGES = {  # to artifacts of which kind -> what is done, and to how many of two
    "persistence": (truncate, 1),
    "survival": (delete_a_file, 1),
    "transfer": (delete_meta, 1),
    "fates": (swap_files, 2),
    "subspace": (swap, 2),
}


def test_other_damage(finished, tmp_path, caplog):
    folder = finished.copy(tmp_path / "copy")
    damaged = []
    for kind, (damage, num_damaged) in DAMAGES.items():
        one, other, *_ = sorted((folder / "artifacts" / kind).iterdir())
        damage(one, other)
        damaged += [one, other][:num_damaged]
    with caplog.at_level(logging.WARNING):
        run_and_report(finished.study, folder, quiet=True)
    assert named_in(caplog) == set_aside_in(folder) == names(damaged)
    assert results_of(folder) == finished.results


class KilledError(BaseException):
    """Stands for a kill."""


def flip_a_weight(path):
    """A bit that makes another number, not no number: nothing but a checksum shows it."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1 << 3
    path.write_bytes(content)


def spoil_the_note(path):
    """What lies beside the tensors: the step, the curve."""
    path.write_bytes(path.read_bytes().replace(b'"note"', b'"nota"', 1))


@pytest.fixture(scope="module")
def unfinished(finished, tmp_path_factory):
    """The study, killed at the last step of a training; copy it before changing it."""
    folder = finished.copy(tmp_path_factory.mktemp("unfinished") / "tiny")
    run = plan_study(finished.study).runs[1]
    for stage in (*run.saes.values(), run.stages["persistence"]):
        shutil.rmtree(folder / "artifacts" / stage.name / stage.identity)
    advance = Training.advance

    def killed(training, *rest, **options):
        if training.step == finished.study.sae.steps - 1:
            raise KilledError
        advance(training, *rest, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(Training, "advance", killed)
        run_and_report(finished.study, folder, quiet=True)
    return folder


@pytest.mark.parametrize("damage", [flip_a_weight, spoil_the_note])
@pytest.mark.parametrize("name", ["checkpoint", "at_*"])
def test_damage_in_an_unfinished_training(finished, unfinished, tmp_path, caplog, name, damage):
    folder = shutil.copytree(unfinished, tmp_path / "copy")
    half_done = folder / "artifacts" / "unfinished"
    damaged = sorted(half_done.glob(f"sae-*/{name}.safetensors"))[0]
    damage(damaged)
    with caplog.at_level(logging.WARNING):
        run_and_report(finished.study, folder, quiet=True)
    assert [record.getMessage() for record in caplog.records] == [
        f"damaged checkpoint {damaged}: training starts again"
    ]
    assert results_of(folder) == finished.results
    assert not list(half_done.iterdir())


# ---- results ----


def cut(path):
    path.write_bytes(path.read_bytes()[:7])


@pytest.mark.parametrize("spoil", [pathlib.Path.unlink, cut])
@pytest.mark.parametrize(
    "name", ["report.html", "figures/fig2.png", "figures/fig2.pdf", "tables/survival.csv"]
)
def test_a_spoilt_result_is_made_again(finished, tmp_path, monkeypatch, name, spoil):
    """Whatever of the results is missing or not whole, whether anything else has changed or not."""
    folder = finished.copy(tmp_path / "copy")

    def figures(_, out):
        (out / "figures").mkdir(exist_ok=True)
        for suffix in ("png", "pdf"):
            (out / "figures" / f"fig2.{suffix}").write_text("a whole figure")

    monkeypatch.setattr("prunelens.report.write.write_figures", figures)
    monkeypatch.setattr(
        "prunelens.report.write.write_page",
        lambda out, *_: (out / "report.html").write_text("a whole page"),
    )
    run_and_report(finished.study, folder, quiet=True)
    path = folder / name
    whole = path.read_bytes()
    spoil(path)
    assert run_and_report(finished.study, folder, quiet=True).num_executed == 0
    assert path.read_bytes() == whole
