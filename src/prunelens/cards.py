"""Model cards as the hub shows them: YAML front matter, and Markdown in which names are text."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import unicodedata
from collections.abc import Mapping, Sequence

from prunelens.errors import UserError
from prunelens.hub import is_hub_id, is_repository

CARD_FILE = "README.md"  # where the hub looks for a card
RECORD_FILE = "prunelens.json"  # the same facts for programs, in full precision
UNKNOWN = "not known"
_NO_REPOSITORY = "USER/REPO"

# What Markdown would read as its own inside a line; `_` within a word it leaves alone.
_MARKS = re.compile(r"[\\`*\[\]|~$!#{}]|(?<![^\W_])_|_(?![^\W_])")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;"})
_LINKS = re.compile(r"(?i)://|\bwww\.|\bmailto:")


@dataclasses.dataclass(frozen=True)
class Sharing:
    """How something is passed on; what the user alone can say."""

    license: str | None = None
    """The hub's name of a license, e.g. `apache-2.0`; None: the card says that none is stated."""
    repository: str | None = None
    """USER/REPO on the hub, for the lines that load it; None: a place to fill in."""
    base_model: str | None = None
    """The dense model, where the user knows better than the study: of a folder that is a copy."""

    def __post_init__(self) -> None:
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            raise UserError(
                f"--license: {self.license!r} is no license as the hub names them; give for"
                " example apache-2.0, mit or cc-by-4.0"
            )
        if self.repository is not None and not is_repository(self.repository):
            raise UserError(f"repository: {self.repository!r} is not USER/REPO; give such a name")

    @property
    def base_model_id(self) -> str | None:
        """The stated model where it may be a hub id, which is all that the front matter takes."""
        return self.base_model if self.base_model and is_hub_id(self.base_model) else None

    @property
    def address(self) -> str:
        """USER/REPO as the card's examples say it."""
        return self.repository or _NO_REPOSITORY


def card(
    body: Sequence[str],
    *,
    sharing: Sharing,
    library: str,
    tags: Sequence[str],
    base_models: Sequence[str] = (),
    datasets: Sequence[str] = (),
    pipeline: str | None = None,
) -> str:
    """A card: front matter by huggingface_hub, then the paragraphs of `body`.

    Args:
        body: Markdown, one paragraph, heading, table or block of code each.
        sharing: license and repository.
        library: what the hub takes for the library that loads it.
        tags: by which the hub finds it.
        base_models, datasets: hub ids; nothing that is not on the hub.
        pipeline: the hub's name of the task; None: none.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=_one_or_several(base_models),
        datasets=list(datasets) or None,
        library_name=library,
        license=sharing.license,
        pipeline_tag=pipeline,
        tags=["prunelens", *tags],
    )
    return "\n\n".join([f"---\n{data.to_yaml()}\n---", *body]) + "\n"


def escaped(text: object) -> str:
    """A name that shows as it is: no markup, no link, no HTML, one line, nothing invisible."""
    shown = "".join(_visible(letter) for letter in str(text))
    shown = _MARKS.sub(lambda found: "\\" + found[0], shown).translate(_ENTITIES)
    return _LINKS.sub(lambda found: found[0].replace(":", "&#58;").replace(".", "&#46;"), shown)


def grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; cells are Markdown: names in them have gone through `escaped`."""
    lines = [columns, ["---"] * len(columns), *rows]
    assert all(len(line) == len(columns) for line in lines), columns
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pairs(rows: Mapping[str, str]) -> str:
    """A table of two columns: what, and its value."""
    return grid(["", ""], list(rows.items()))


def code(*lines: str) -> str:
    """A block of Python; the lines hold no name that is not checked."""
    assert not any("`" in line for line in lines), lines
    return "\n".join(["```python", *lines, "```"])


def license_line(sharing: Sharing) -> str:
    """What is said of the license in words."""
    if sharing.license:
        return f"License: {sharing.license}."
    return "License: not stated; ask who shares this. The base model's terms apply as well."


def version() -> str:
    """The installed prunelens."""
    return importlib.metadata.version("prunelens")


def share(value: float) -> str:
    """A fraction to four digits; `not known` where it is NaN."""
    return UNKNOWN if value != value else f"{value:.4f}"


def _visible(letter: str) -> str:
    """Line breaks and control characters as a space, marks that reorder or hide text as a sign."""
    kind = unicodedata.category(letter)
    if kind in ("Cc", "Zl", "Zp"):
        return " "
    return "�" if kind in ("Cf", "Cs", "Co", "Cn") else letter


def _one_or_several(names: Sequence[str]) -> str | list[str] | None:
    if not names:
        return None
    return names[0] if len(names) == 1 else list(names)
