"""An explorer's content -> a static folder that opens from a disk or from a server.

```
index.html  app.css  app.js  app/*.js  vendor/   the page; nothing in it comes from a study
data/study.js                                    what there is: views, conditions
data/v0/latents.js  tokens.js  places.js         numbers, eval text, where latents fire
data/v0/contexts-0000.js …                       contexts and effects, 128 latents each
data/v0/c0/latents.js  contexts-0000.js …        the same of a condition's own dictionary
```
A page opened from a disk may load scripts but not read files, so every data file is a script that
calls `prunelens.receive(name, JSON)`. `labels/v0/123.js` (`prunelens.receive("labels/v0/123",
{"text": …})`) is asked for only where `labels` is set: a server may answer, the folder has none.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping

from prunelens.errors import UserError
from prunelens.report.explorer.content import (
    Condition,
    Contexts,
    Effects,
    Explorer,
    OwnLatents,
    Tokens,
    View,
)
from prunelens.report.explorer.shards import (
    LATENTS_PER_SHARD,
    Json,
    column,
    kept_codes,
    packed,
    places,
    shard,
)

FRONT = pathlib.Path(__file__).parent / "front"
MARKER = "prunelens-explorer.json"
FORMAT = 1
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
    " base-uri 'none'; form-action 'none'"
)
POLICY_PLACE = "@CONTENT_SECURITY_POLICY@"
IDENTIFIER = {"view": re.compile(r"v\d+"), "condition": re.compile(r"c\d+")}
ADDRESS = re.compile(r"https?://\S+|(?![/\\])[^:\s]+")


def write_explorer(
    explorer: Explorer,
    out: pathlib.Path,
    *,
    links: Mapping[str, str] | None = None,
    labels: bool = False,
    identity: str = "",
) -> pathlib.Path:
    """Write the explorer whole: beside `out`, then renamed. Returns `out`.

    Args:
        explorer: what to show.
        out: the folder; an explorer that is there is replaced.
        links: text -> address (relative to the folder, or http), shown in the page's head.
        labels: the server that will serve this folder also answers for `labels/<view>/<latent>.js`.
        identity: of the content, for `written_identity`.

    Raises:
        UserError: `out` is a file, or a folder with something else in it; or an address in `links`
            is neither relative nor http.
    """
    final = out.resolve()
    _refuse_other_things(final)
    addresses = _checked(dict(links or {}))
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write_page(temporary)
        _write_script(temporary, "study", _study(explorer, addresses, labels))
        for view in explorer.views:
            for name, data in _files(view):
                _write_script(temporary, name, data)
        marker = {"prunelens_explorer": FORMAT, "identity": identity}
        (temporary / MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")
        _put_in_place(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def written_identity(folder: pathlib.Path) -> str | None:
    """The `identity` that an explorer was written with; None where there is no such folder."""
    if not _is_explorer(folder):
        return None
    return str(json.loads((folder / MARKER).read_text(encoding="utf-8"))["identity"])


# --- the folder -----------------------------------------------------------------------------------


def _refuse_other_things(final: pathlib.Path) -> None:
    if not final.exists() or _is_explorer(final):
        return
    if not final.is_dir():
        raise UserError(f"explorer: {final} is a file; name a folder that is new or empty")
    if any(final.iterdir()):
        raise UserError(
            f"explorer: {final} holds something else (no {MARKER}); name a folder that is new or"
            " empty"
        )


def _is_explorer(folder: pathlib.Path) -> bool:
    """Our marker, of a format that this version writes or wrote."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    return isinstance(marker, dict) and {"prunelens_explorer", "identity"} <= marker.keys()


def _put_in_place(temporary: pathlib.Path, final: pathlib.Path) -> None:
    """A folder cannot be renamed onto a full one: the old one is moved aside first."""
    old = final.with_name(f".{final.name}.{os.getpid()}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _write_page(folder: pathlib.Path) -> None:
    shutil.copytree(FRONT, folder)
    index = folder / "index.html"
    text = index.read_text(encoding="utf-8")
    index.write_text(text.replace(POLICY_PLACE, CONTENT_SECURITY_POLICY), encoding="utf-8")


def _write_script(folder: pathlib.Path, name: str, data: Json) -> None:
    path = folder / "data" / f"{name}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script(name, data), encoding="ascii")


def script(name: str, data: Json) -> str:
    """`prunelens.receive(name, data)`, in ASCII: U+2028 and lone surrogates cannot harm it.

    `<` is escaped too, so that the text stays data wherever it is pasted.
    """
    written = [
        json.dumps(part, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
        for part in (name, data)
    ]
    return f"prunelens.receive({','.join(written)});\n".replace("<", "\\u003c")


def _checked(links: dict[str, str]) -> dict[str, str]:
    for text, address in links.items():
        if not ADDRESS.fullmatch(address):
            raise UserError(
                f"links: {text!r} leads to {address!r}; give an http address or a path relative to"
                " the explorer's folder"
            )
    return links


# --- what the files hold --------------------------------------------------------------------------


def _study(explorer: Explorer, links: dict[str, str], labels: bool) -> Json:
    return {
        "format": FORMAT,
        "study": explorer.study,
        "labels": labels,
        "links": [{"text": text, "address": address} for text, address in links.items()],
        "latentsPerShard": LATENTS_PER_SHARD,
        "views": [_view(view) for view in explorer.views],
    }


def _view(view: View) -> Json:
    assert IDENTIFIER["view"].fullmatch(view.id), view.id  # it becomes a file name
    return {
        "id": view.id,
        "label": view.label,
        "model": view.model,
        "layer": view.layer,
        "dictionary": view.dictionary,
        "numLatents": view.num_latents,
        "tau": view.tau,
        "keptMeans": view.kept_means,
        "neuronpedia": view.neuronpedia,
        "conditions": [
            {
                "id": condition.id,
                "label": condition.label,
                "run": condition.run,
                "sparsity": condition.sparsity,
                "hasOwn": condition.own is not None,
            }
            for condition in view.conditions
        ],
    }


def _files(view: View) -> Iterator[tuple[str, Json]]:
    """Name and content of every data file of a view."""
    yield f"{view.id}/latents", _latents(view)
    yield f"{view.id}/tokens", _tokens(view.tokens)
    yield f"{view.id}/places", places(view.contexts, view.num_latents)
    yield from _shards(view.id, view.num_latents, view.contexts, view.effects)
    for condition in view.conditions:
        assert IDENTIFIER["condition"].fullmatch(condition.id), condition.id
        if condition.own is not None:
            yield from _own_files(f"{view.id}/{condition.id}", condition, condition.own)


def _latents(view: View) -> Json:
    return {
        "columns": [column(each) for each in view.columns],
        "conditions": [
            {
                "id": condition.id,
                "columns": [column(each) for each in condition.columns],
                "kept": packed(kept_codes(condition.kept)),
                "match": packed(condition.match),
            }
            for condition in view.conditions
        ],
    }


def _tokens(tokens: Tokens) -> Json:
    return {
        "vocabulary": list(tokens.vocabulary),
        "contextTokens": int(tokens.ids.shape[1]),
        "ids": packed(tokens.ids),
    }


def _own_files(name: str, condition: Condition, own: OwnLatents) -> Iterator[tuple[str, Json]]:
    num_latents = len(own.columns[0].values)  # a dictionary has firing rates at least
    data = {
        "numLatents": num_latents,
        "columns": [column(each) for each in own.columns],
        "matchedBack": packed(condition.matched_back),
    }
    yield f"{name}/latents", data
    yield from _shards(name, num_latents, own.contexts, own.effects)


def _shards(
    name: str, num_latents: int, contexts: Contexts, effects: Effects | None
) -> Iterator[tuple[str, Json]]:
    for number, first in enumerate(range(0, num_latents, LATENTS_PER_SHARD)):
        last = min(first + LATENTS_PER_SHARD, num_latents)
        yield f"{name}/contexts-{number:04d}", shard(contexts, effects, first, last)
