"""A study folder -> its explorer, as a folder to share and at an address of this machine."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import sys
import webbrowser
from collections.abc import Callable

from prunelens.errors import UserError
from prunelens.report.explorer.folder import write_explorer, written_identity
from prunelens.report.explorer.labels import NeuronpediaLabels
from prunelens.report.explorer.server import serve_explorer
from prunelens.study import questions
from prunelens.study.artifacts.address import artifacts_of
from prunelens.study.artifacts.links import refuse_links_out
from prunelens.study.questions import QUESTIONS

FOLDER = "explorer"


def write_study_explorer(
    folder: str | pathlib.Path,
    *,
    artifacts: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> pathlib.Path:
    """Write a study's explorer to its folder `explorer`, which can be copied and opened anywhere.

    Nothing is done where it is there and neither the study nor prunelens has changed since.

    Args:
        folder: of the study.
        artifacts: where they are, as `open_store` takes it; None: where the folder says.
        tell: told what is being done.
    Returns: the explorer's folder; `index.html` in it is the page.
    Raises: UserError where the study did not ask for evidence, none of it is there, or the folder
        `explorer` holds something else.
    """
    return _written(pathlib.Path(folder), artifacts, labels=False, tell=tell)


def view_study(
    folder: str | pathlib.Path,
    *,
    port: int = 0,
    browser: bool = True,
    labels: bool = False,
    artifacts: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
    ready: Callable[[str], None] = print,
) -> None:
    """Show a study's explorer at an address of this machine until Ctrl-C.

    Args:
        folder: of the study.
        port: 0 takes a free one.
        browser: open the page, where there is a screen.
        labels: ask Neuronpedia for the labels of latents that are looked at.
        artifacts: where they are, as `open_store` takes it; None: where the folder says.
        tell: told what is being done until the page is there.
        ready: told the page's address.
    Raises: UserError as `write_study_explorer`, and where the port is not free.
    """
    study = pathlib.Path(folder)
    written = _written(study, artifacts, labels=labels, tell=tell)
    named = NeuronpediaLabels(_neuronpedia_names(written)) if labels else None
    with serve_explorer(written, port=port, labels=named) as server:
        ready(server.address)
        if browser and _has_screen():
            webbrowser.open(server.address)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def _written(
    study: pathlib.Path, artifacts: str | None, *, labels: bool, tell: Callable[[str], None]
) -> pathlib.Path:
    out = study / FOLDER
    refuse_links_out(study)
    identity = _identity(study, artifacts, labels)
    if written_identity(out) != identity:
        tell("reading the study")
        # What takes seconds to import is not needed where the explorer is there.
        from prunelens.report.explorer.collect import study_explorer
        from prunelens.study.folder import open_study

        plan, store = open_study(study, artifacts)
        explorer = study_explorer(plan, store, tell=tell)
        tell(f"writing {out}")
        write_explorer(explorer, out, labels=labels, identity=identity)
    return out


def _identity(study: pathlib.Path, artifacts: str | None, labels: bool) -> str:
    """SHA-256 of what an explorer is made of: the study, its artifacts' identities, and our code.

    Neither model nor text is looked at, so that an explorer which is there opens at once.
    """
    try:
        described = (study / "study.yaml").read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"study folder: {str(study)!r} has no study.yaml; give the folder of a study"
        ) from None
    digest = hashlib.sha256(described)
    store = artifacts_of(study, artifacts)
    told = (question.name for question in QUESTIONS if question.told)
    for stage in ("evidence", "sae", "causal", *told):
        digest.update(f"{stage} {sorted(store.finished(stage))}".encode())
    for code in (__file__, questions.__file__):
        for path in sorted(pathlib.Path(code).parent.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.read_bytes())
    digest.update(f"{importlib.metadata.version('prunelens')} {labels}".encode())
    return digest.hexdigest()


def _neuronpedia_names(explorer: pathlib.Path) -> dict[str, str]:
    """View -> its name on Neuronpedia, from an explorer's folder."""
    script = (explorer / "data" / "study.js").read_text(encoding="ascii")
    study, _ = json.JSONDecoder().raw_decode(script[script.index("{") :])
    return {view["id"]: view["neuronpedia"] for view in study["views"] if view["neuronpedia"]}


def _has_screen() -> bool:
    """Without one, a browser for terminals might be opened in this one."""
    return sys.platform in ("darwin", "win32") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )
