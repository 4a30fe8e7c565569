"""Model cards as the hub shows them: YAML front matter, and Markdown in which names are text."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

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
    template: str,
    facts: Mapping[str, Any],
    *,
    sharing: Sharing,
    library: str,
    tags: Sequence[str],
    base_models: Sequence[str] = (),
    datasets: Sequence[str] = (),
    pipeline: str | None = None,
) -> str:
    """A card: front matter by huggingface_hub, then a template of `data/cards`.

    Args:
        template: the file's name without its ending.
        facts: what it tells; any text among them shows as it is (see `escaped`).
        sharing: license and repository.
        library: what the hub takes for the library that loads it.
        tags: by which the hub finds it.
        base_models, datasets: hub ids; nothing that is not on the hub.
        pipeline: the hub's name of the task; None: none.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=base_models[0] if len(base_models) == 1 else list(base_models) or None,
        datasets=list(datasets) or None,
        library_name=library,
        license=sharing.license,
        pipeline_tag=pipeline,
        tags=["prunelens", *tags],
    )
    return f"---\n{data.to_yaml()}\n---\n\n{part(template, sharing=sharing, **facts)}\n"


def part(template: str, **facts: Any) -> Markup:
    """Markdown of a template of `data/cards`."""
    return Markup(_templates().get_template(f"{template}.md.j2").render(facts).strip("\n"))


@functools.cache
def _templates() -> jinja2.Environment:
    """Whatever is put into a template is a name, unless it went through the filter `code`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("prunelens", "data/cards"),
        autoescape=True,  # of what is Markdown already, nothing is escaped again
        finalize=lambda value: value if isinstance(value, Markup) else Markup(escaped(value)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _code
    environment.globals |= {"version": version, "unknown": UNKNOWN, "record_file": RECORD_FILE}
    return environment


def escaped(text: object) -> str:
    """A name that shows as it is: no markup, no link, no HTML, one line, nothing invisible."""
    shown = "".join(_visible(letter) for letter in str(text))
    shown = _MARKS.sub(lambda found: "\\" + found[0], shown).translate(_ENTITIES)
    return _LINKS.sub(lambda found: found[0].replace(":", "&#58;").replace(".", "&#46;"), shown)


def version() -> str:
    """The installed prunelens."""
    return importlib.metadata.version("prunelens")


def _code(text: str) -> Markup:
    """As it is, for code; it holds no name that is not checked."""
    assert not re.search(r"[`\n]", text), text
    return Markup(text)


def _visible(letter: str) -> str:
    """Line breaks and control characters as a space, marks that reorder or hide text as a sign."""
    kind = unicodedata.category(letter)
    if kind in ("Cc", "Zl", "Zp"):
        return " "
    return "�" if kind in ("Cf", "Cs", "Co", "Cn") else letter
