"""Links in a study folder: nothing is written, read or deleted through one that leads out of it.

A study folder may come from someone else. What is in it is written by name, so a link with that
name would be followed.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

from prunelens.errors import UserError

_NOT_ARTIFACTS = ("unfinished", ".claims")  # of what lies in artifacts/


def refuse_links_out(out: pathlib.Path) -> None:
    """Raises UserError for a link in the folder `out` that leads out of it; `out` may be one.

    Links inside an artifact are left to the store, to which they are damage.
    """
    root = out.resolve()
    for path in _links(root):
        if not path.resolve().is_relative_to(root) and not _in_artifact(path.relative_to(root)):
            raise UserError(
                f"study folder: {str(path.relative_to(root))!r} is a link that leads out of"
                f" {str(out)!r}; remove it, or put its content in its place"
            )


def is_plain(folder: pathlib.Path, name: str) -> bool:
    """Whether `name` is a file in `folder` itself: not above it, not elsewhere, not a link."""
    path = folder.resolve() / name
    return path.resolve() == path and path.is_relative_to(folder.resolve()) and path.is_file()


def _in_artifact(path: pathlib.Path) -> bool:
    """Whether it is artifacts/<kind>/<identity> or in it."""
    parts = path.parts
    return len(parts) > 2 and parts[0] == "artifacts" and parts[1] not in _NOT_ARTIFACTS


def _links(root: pathlib.Path) -> Iterator[pathlib.Path]:
    for folder, folders, names in os.walk(root, followlinks=False):
        for name in (*folders, *names):
            path = pathlib.Path(folder, name)
            if path.is_symlink():
                yield path
