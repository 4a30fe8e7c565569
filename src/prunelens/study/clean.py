"""What a study's folder holds beyond what its study needs: found, and freed."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from prunelens.errors import UserError
from prunelens.study.alone import alone_in
from prunelens.study.artifacts.address import remembered_place
from prunelens.study.artifacts.links import refuse_links_out
from prunelens.study.artifacts.store import Store
from prunelens.study.conclude import predictor_stage
from prunelens.study.folder import open_study
from prunelens.study.matrix import STORES, Plan, parents_first
from prunelens.study.preflight.room import bytes_written
from prunelens.temporary import left_beside, remove

DAMAGED = "was found damaged and set aside"
KILLED = "left half-written by a process that was killed"
UNFINISHED = "checkpoints of work that is done, or that the study does not ask for"
READ = "nothing that is still to be made reads these activations"
UNASKED = "the study does not ask for it"

_IDENTITY = re.compile("[0-9a-f]{64}")


class Leftover(NamedTuple):
    """A folder or file that a study can do without."""

    path: str
    """Below the study's folder, with `/` between folders."""
    label: str
    """Of the stage that made it, where that is known; else empty."""
    why: str
    """Why it is not needed."""
    num_bytes: int
    """Of its files."""


def leftovers(out: pathlib.Path) -> list[Leftover]:
    """What of the study folder `out` can be freed; nothing is changed.

    Of another folder, in which `prune` or `export` were to write: what killed processes left.

    What is set aside or half-written, checkpoints that no training goes on from, activation stores
    that nothing missing reads, and, once the study has ended, artifacts that `study.yaml` does not
    ask for: those of settings or versions that it had before.

    Raises: UserError where `out` is no study's folder and nothing is left in it, or the study's
        artifacts are elsewhere, where other studies may need them.
    """
    if not _is_study(out) and (half := sorted(left_beside(out))):
        return [Leftover(path.name, "", KILLED, int(bytes_written(path))) for path in half]
    refuse_links_out(out)
    if (place := remembered_place(out)) not in (None, str((out / "artifacts").absolute())):
        raise UserError(
            f"clean: the artifacts of {str(out)!r} are in {place!r}, where other studies may need"
            " them; delete there by hand what you do not need"
        )
    plan, store = open_study(out)
    unneeded = [*_unneeded(plan, store), *((path, KILLED) for path in _half_written(out))]
    return [
        Leftover(path.relative_to(out).as_posix(), _label(path), why, int(bytes_written(path)))
        for path, why in unneeded
    ]


def clean_study(out: pathlib.Path) -> list[Leftover]:
    """Free what `leftovers` finds, and tell what it was.

    Raises: UserError as `leftovers`, and where another process works in the folder.
    """
    with alone_in(out) if _is_study(out) else contextlib.nullcontext():
        found = leftovers(out)
        for leftover in found:
            remove(out / leftover.path)
    return found


def _is_study(out: pathlib.Path) -> bool:
    return (out / "study.yaml").exists()


def _unneeded(plan: Plan, store: Store) -> Iterator[tuple[pathlib.Path, str]]:
    predictor = predictor_stage(plan, store)
    targets = [*plan.targets().values(), *([predictor] if predictor else [])]
    asked = {stage.identity: stage for stage in parents_first(targets)}
    missing = list(parents_first(targets, but=store.has))
    awaited = {parent.identity for stage in missing for parent in stage.parents.values()}
    going_on = {f"{stage.name}-{stage.identity}" for stage in missing}
    yield from ((path, DAMAGED) for path in _folders(store.root / "damaged"))
    yield from ((path, KILLED) for path in sorted(store.left_half_written()))
    for path in _folders(store.root / "unfinished"):
        if path.name not in going_on:
            yield path, UNFINISHED
    for kind in _folders(store.root):
        for path in _folders(kind):
            if not _IDENTITY.fullmatch(path.name):
                continue
            if path.name not in asked:
                if not missing:  # else the study may be about to be what it was
                    yield path, UNASKED
            elif kind.name in STORES and path.name not in awaited:
                yield path, READ


def _half_written(out: pathlib.Path) -> list[pathlib.Path]:
    """What killed processes left of pages, tables, figures and the explorer."""
    places = (out, out / "tables", out / "figures")
    return sorted(path for p in places if not p.is_symlink() for path in left_beside(p))


def _folders(above: pathlib.Path) -> list[pathlib.Path]:
    """The folders in a folder, in order; what a link leads to is not ours."""
    if above.is_symlink() or not above.is_dir():
        return []
    found = sorted(path for path in above.iterdir() if path.is_dir() and not path.is_symlink())
    return [path for path in found if not path.name.endswith(".tmp")]


def _label(folder: pathlib.Path) -> str:
    """As `meta.json` has it, which nobody has verified here."""
    try:
        label = json.loads((folder / "meta.json").read_bytes())["label"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return "".join(letter for letter in str(label) if letter.isprintable())
