"""Write docs/study.md, the reference of a study file's fields, from their docstrings.

.venv/bin/python tools/write_study_fields.py
"""

from __future__ import annotations

import json
import pathlib

import pydantic

from prunelens import config
from prunelens.criteria import CRITERIA

SECTIONS: dict[str, type[pydantic.BaseModel]] = {  # what a study file calls it -> its model
    "(top level)": config.StudyConfig,
    "models (a list)": config.ModelConfig,
    "models.pretrained (a list)": config.PretrainedSaeConfig,
    "corpus": config.CorpusConfig,
    "perplexity": config.PerplexityConfig,
    "prunings (a list)": config.PruningGrid,
    "prunings, an entry with `checkpoint`": config.CheckpointEntry,
    "activations": config.ActivationConfig,
    "sae": config.SaeConfig,
    "sufficiency": config.SufficiencyConfig,
    "transfer": config.TransferConfig,
    "causal": config.CausalConfig,
    "evidence": config.EvidenceConfig,
}
PAGE = pathlib.Path(__file__).parents[1] / "docs" / "study.md"


def page() -> str:
    """The whole page."""
    parts = [
        "# Every field of a study file\n\n"
        "Written by `tools/write_study_fields.py` from the docstrings of `prunelens.config`;"
        " a test keeps it true. What a file leaves out has the default.\n"
    ]
    for name, model in SECTIONS.items():
        head = "| field | default | what it is |\n|---|---|---|\n"
        parts.append(f"\n## {name}\n\n{(model.__doc__ or '').strip()}\n\n{head}")
        parts += [_row(field, about) for field, about in model.model_fields.items()]
        if model is config.PruningGrid:
            parts += _criteria()
    return "".join(parts)


def _criteria() -> list[str]:
    columns = ("criterion", "a weight's score", "scopes, the usual one first", "what it needs")
    rows = [columns, ("---",) * len(columns)]
    for name, criterion in CRITERIA.items():
        score, scopes = criterion.means.replace("|", "\\|"), ", ".join(criterion.scopes)
        rows.append((f"`{name}`", score, scopes, criterion.needs))
    return ["\n", *(f"| {' | '.join(row)} |\n" for row in rows)]


def _row(name: str, about: pydantic.fields.FieldInfo) -> str:
    default = "required"
    if not about.is_required():
        value = pydantic.TypeAdapter(object).dump_python(about.get_default(), mode="json")
        is_section = isinstance(value, dict) or name == "models"
        default = "see below" if is_section else f"`{json.dumps(value)}`"
    meaning = " ".join((about.description or "").split()).replace("|", "\\|")
    return f"| `{name}` | {default} | {meaning} |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
