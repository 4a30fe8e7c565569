"""An explorer's content -> a static folder that opens from a disk or from a server.

```
index.html  app.css  app.js  app/*.js  vendor/   the page; nothing in it comes from a study
data/study.js                                    what there is: views, conditions
data/v0/latents.js  tokens.js  places.js         numbers, eval text, where latents fire
data/v0/contexts-0000.js …                       contexts and effects, 128 latents each
data/v0/c0/latents.js  contexts-0000.js …        the same of a condition's own dictionary
prunelens-explorer.json                          whose it is, and the SHA-256 of every data file
```
A page opened from a disk may load scripts but not read files, so every data file is a script that
calls `prunelens.receive(name, JSON)`. `labels/v0/123.js` (`prunelens.receive("labels/v0/123",
{"text": …})`) is asked for only where `labels` is set: a server may answer, the folder has none.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

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
from prunelens.study.artifacts.links import is_plain
from prunelens.study.artifacts.seal import sha256_of
from prunelens.temporary import new_folder

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
    with new_folder(final) as folder:
        for name, content in front_files().items():
            _write(folder / name, content)
        _write_script(folder, "study", _study(explorer, addresses, labels))
        for view in explorer.views:
            for name, data in _files(view):
                _write_script(folder, name, data)
        files = {name: sha256_of(folder / name) for name in _data_files(folder)}
        marker = {"prunelens_explorer": FORMAT, "identity": identity, "files": files}
        _write(folder / MARKER, f"{json.dumps(marker)}\n".encode())
    return out


def written_identity(folder: pathlib.Path) -> str | None:
    """The `identity` that an explorer was written with; None where it is not there or not whole.

    Whole: the page is this version's, and every data file is the one that was written.
    """
    marker, data = _marker(folder), _data_files(folder)
    if marker is None or not all(is_plain(folder, name) for name in (*front_files(), *data)):
        return None
    page = {name: (folder / name).read_bytes() for name in front_files()}
    hashes = {name: sha256_of(folder / name) for name in data}
    is_whole = page == front_files() and hashes == marker.get("files")
    return str(marker["identity"]) if is_whole else None


@functools.cache
def front_files() -> dict[str, bytes]:
    """What the page consists of, by its path in the folder, as it is installed here."""
    files = {
        path.relative_to(FRONT).as_posix(): path.read_bytes()
        for path in FRONT.rglob("*")
        if path.is_file()
    }
    policy = (POLICY_PLACE.encode(), CONTENT_SECURITY_POLICY.encode())
    return files | {"index.html": files["index.html"].replace(*policy)}


def is_data(name: str, content: bytes) -> bool:
    """Whether a data file does nothing but hand over data: it may have come from someone else."""
    head, tail = f"prunelens.receive({json.dumps(name)},".encode(), b");\n"
    if not (content.startswith(head) and content.endswith(tail) and content.isascii()):
        return False
    try:
        json.loads(content[len(head) : -len(tail)])
    except (ValueError, RecursionError):
        return False
    return True


# --- the folder -----------------------------------------------------------------------------------


def _refuse_other_things(final: pathlib.Path) -> None:
    if not final.exists() or _marker(final):
        return
    if not final.is_dir():
        raise UserError(f"explorer: {final} is a file; name a folder that is new or empty")
    if any(final.iterdir()):
        raise UserError(
            f"explorer: {final} holds something else (no {MARKER}); name a folder that is new or"
            " empty"
        )


def _marker(folder: pathlib.Path) -> dict[str, Any] | None:
    """What an explorer's folder says of itself, in a format that this version writes or wrote."""
    if not is_plain(folder, MARKER):
        return None
    try:
        marker = json.loads((folder / MARKER).read_bytes())
    except (ValueError, RecursionError):
        return None
    is_ours = isinstance(marker, dict) and {"prunelens_explorer", "identity"} <= marker.keys()
    return marker if is_ours else None


def _data_files(folder: pathlib.Path) -> list[str]:
    """All that is there beside page and marker, by its path in the folder."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name not in front_files() and name != MARKER)


def _write_script(folder: pathlib.Path, name: str, data: Json) -> None:
    _write(folder / "data" / f"{name}.js", script(name, data).encode("ascii"))


def _write(path: pathlib.Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


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
    plain = ("id", "label", "model", "layer", "dictionary", "tau", "neuronpedia")
    told = ("id", "label", "run", "sparsity")
    return {
        **{name: getattr(view, name) for name in plain},
        "numLatents": view.num_latents,
        "keptMeans": view.kept_means,
        "conditions": [
            {name: getattr(each, name) for name in told} | {"hasOwn": each.own is not None}
            for each in view.conditions
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
