"""A whole study, and how a mistake in it is told."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Self, TypeVar

import pydantic
from pydantic import Field, field_validator, model_validator

from prunelens.config.features import (
    ActivationConfig,
    CausalConfig,
    EvidenceConfig,
    ProbesConfig,
    SaeConfig,
    SufficiencyConfig,
    TransferConfig,
)
from prunelens.config.frozen import Frozen
from prunelens.config.model import PLANTED, ModelConfig
from prunelens.config.pruning import CHECKPOINT, ENTRIES, Condition, PruningEntry
from prunelens.config.text import CorpusConfig, PerplexityConfig
from prunelens.errors import UserError, one_line

NEEDS: dict[str, tuple[str, ...]] = {  # question -> the ones whose answers it is made from
    "stability": (),
    "survival": (),
    "persistence": (),
    "identity": ("survival",),
    "warm_start": ("survival",),
    "sufficiency": ("survival",),
    "transfer": (),
    "fragility": ("survival", "persistence"),
    "predictor": ("survival", "persistence"),
    "causal": ("survival", "persistence"),
    "evidence": (),
    "probes": (),
}


def _known(question: str) -> str:
    if question not in NEEDS:
        raise ValueError(f"{question[:80]!r} is no question; there are {', '.join(NEEDS)}")
    return question


Question = Annotated[str, pydantic.AfterValidator(_known)]


Part = TypeVar("Part", bound=pydantic.BaseModel)

MOST_RUNS = 2000  # models x layers x conditions; the paper has 24
LARGEST = 2**63 - 1  # what tensors and files can count
MOST_CHARACTERS = 400  # of a message


def study_from_data(data: Any) -> StudyConfig:
    """A study from plain data (what YAML or JSON gives). Raises UserError with one line."""
    if not isinstance(data, dict):
        raise UserError(f"study: must be a mapping of fields, got {type(data).__name__}")
    _refuse_huge_numbers(data, "study")
    study = part_from_data(StudyConfig, data)
    _refuse_huge_numbers(study.model_dump(), "study")  # what was text may be a number by now
    return study


def part_from_data(part: type[Part], data: dict[str, Any]) -> Part:
    """A part of a study from its fields. Raises UserError with one line."""
    try:
        return part.model_validate(data)
    except pydantic.ValidationError as error:
        raise UserError(_one_line(error)) from None


class StudyConfig(Frozen):
    """A matrix of runs and the questions asked of it."""

    name: str = Field("study", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Names the output folder, `runs/<name>`, by default."""
    models: tuple[ModelConfig, ...] = Field((ModelConfig(),), min_length=1)
    """The models; each is run dense and under every pruning."""
    corpus: CorpusConfig = CorpusConfig()
    """The text of the study."""
    perplexity: PerplexityConfig = PerplexityConfig()
    """How perplexity is measured."""
    prunings: tuple[PruningEntry, ...] = ()
    """The pruned conditions; the dense one is always there."""
    activations: ActivationConfig = ActivationConfig()
    """Which activations the SAEs see."""
    sae: SaeConfig = SaeConfig()
    """The SAEs."""
    taus: tuple[float, ...] = Field((0.5, 0.6, 0.7, 0.8, 0.9), max_length=100)
    """Match thresholds."""
    sufficiency: SufficiencyConfig = SufficiencyConfig()
    """When SAEs in training are judged."""
    transfer: TransferConfig = TransferConfig()
    """RQ3's sizes."""
    causal: CausalConfig = CausalConfig()
    """RQ5's sizes."""
    evidence: EvidenceConfig = EvidenceConfig()
    """What the explorer shows of each latent."""
    probes: ProbesConfig = ProbesConfig()
    """Which concepts are probed."""
    questions: tuple[Question, ...] = tuple(NEEDS)
    """What is asked: RQ1, RQ2, same-dictionary persistence, other measures of identity, SAEs that
    start from the dense ones, whether all were trained enough, RQ3, RQ4, its predictor, RQ5, the
    text on which each latent fires, and probes of concepts where there are labels."""
    threads_per_stage: int = Field(2, ge=1)
    """CPU threads of each stage; part of every identity, because reductions depend on it."""
    keep_activations: bool = False
    """Keep activation stores when nothing that remains needs them."""

    @field_validator("taus")
    @classmethod
    def _taus_in_range(cls, taus: tuple[float, ...]) -> tuple[float, ...]:
        if not taus or sorted(set(taus)) != list(taus) or taus[0] <= 0 or taus[-1] >= 1:
            raise ValueError(f"{list(taus)} must rise and lie strictly between 0 and 1")
        return taus

    @model_validator(mode="after")
    def _questions_have_what_they_need(self) -> Self:
        asked = set(self.questions)
        if len(self.sae.seeds) < 2 and {"stability", "survival"} & asked:
            raise ValueError(
                f"sae.seeds: {list(self.sae.seeds)} is one seed; stability and survival compare"
                " seeds, so give at least two, or ask only 'persistence'"
            )
        if self.sae.control_seeds > len(self.sae.seeds):
            raise ValueError(
                f"sae.control_seeds: {self.sae.control_seeds} is more than the"
                f" {len(self.sae.seeds)} sae.seeds; make it at most that"
            )
        for question in self.questions:
            missing = [need for need in NEEDS.get(question, ()) if need not in self.questions]
            if missing:
                raise ValueError(
                    f"questions: {question!r} is answered from {missing[0]!r}; ask that as well"
                )
        labels = [p.label for p in self.conditions()]
        named = [("causal.conditions", label) for label in self.causal.conditions or ()]
        if self.sufficiency.condition is not None:
            named.append(("sufficiency.condition", self.sufficiency.condition))
        for field, label in named:
            if label not in labels:
                raise ValueError(
                    f"{field}: {label!r} is none of the prunings"
                    f" ({', '.join(labels) or 'there are none'})"
                )
        doubled = sorted(label for label, count in Counter(labels).items() if count > 1)
        if doubled:
            raise ValueError(f"prunings: {doubled[0]} is listed twice; remove one")
        num_runs = sum(len(model.layers) for model in self.models) * (1 + len(labels))
        if num_runs > MOST_RUNS:
            raise ValueError(
                f"prunings: models x layers x conditions are {num_runs} runs, and a study has"
                f" {MOST_RUNS} at most; make several studies"
            )
        for grid in self.prunings:
            if other := set(grid.seeds or ()) - set(self.sae.seeds):
                raise ValueError(
                    f"prunings.seeds: {min(other)} is none of sae.seeds {list(self.sae.seeds)};"
                    " every pruned SAE needs the dense one of its seed"
                )
            if grid.seeds and len(grid.seeds) < 2 and {"stability", "survival"} & asked:
                raise ValueError(
                    f"prunings.seeds: {list(grid.seeds)} is one seed; stability and survival"
                    " compare seeds, so give at least two"
                )
        names = [m.label for m in self.models]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise ValueError(
                    f"models.{number}.short_name: {name!r} is what models.{names.index(name)} is"
                    " called as well, and run names would clash; give it another"
                )
        if len(names) > 1 and any(entry.criterion == CHECKPOINT for entry in self.prunings):
            raise ValueError(
                f"prunings.checkpoint: it takes the place of one model, and the study has"
                f" {len(names)}; make a study of each model"
            )
        return self

    @model_validator(mode="after")
    def _the_planted_world_stands_alone(self) -> Self:
        planted = [model.is_planted for model in self.models]
        planted += [pruning.criterion == PLANTED for pruning in self.prunings]
        if any(planted) and not all(planted):
            raise ValueError(
                "models: the planted world has prunings of criterion 'planted' alone, and no"
                " language model has those; put them in a study of their own"
            )
        asked = [name for name in ("transfer", "causal", "evidence") if name in self.questions]
        if any(planted) and asked:
            raise ValueError(
                f"questions: {asked[0]!r} needs a language model, and the planted world is none;"
                " leave it out"
            )
        return self

    @property
    def concepts(self) -> str | None:
        """What labels the text, as `probes.concepts`; None: nothing does."""
        text = self.probes.corpus or self.corpus
        return self.probes.concepts or ("python" if text.source == "stdlib" else None)

    @property
    def labelled_text(self) -> CorpusConfig | None:
        """The text that probes get their labels from; None where there are none to ask."""
        asked = self.concepts is not None and "probes" in self.questions
        return (self.probes.corpus or self.corpus) if asked else None

    def followed(self) -> Condition | None:
        """The pruned condition whose SAEs are followed while they are trained."""
        wanted = self.sufficiency.condition
        return next((p for p in self.conditions() if wanted in (None, p.label)), None)

    def conditions(self) -> list[Condition]:
        """The pruned conditions, in the order of the file."""
        return [pruning for grid in self.prunings for pruning in grid.prunings()]

    def seeds_of(self, pruning: Condition | None) -> tuple[int, ...]:
        """The SAE seeds of a condition; None is the dense one."""
        for grid in self.prunings:
            if grid.seeds is not None and pruning in list(grid.prunings()):
                return grid.seeds
        return self.sae.seeds


def _refuse_huge_numbers(data: Any, where: str) -> None:
    """Raises UserError for integers that nothing can count and Python does not even print."""
    if isinstance(data, int) and abs(data) > LARGEST:
        raise UserError(f"{where}: a number beyond {LARGEST}; give a smaller one")
    inner: Any = ()
    if isinstance(data, dict):
        inner = data.items()
    elif isinstance(data, list | tuple):
        inner = enumerate(data)
    for name, value in inner:
        _refuse_huge_numbers(name, "study")
        _refuse_huge_numbers(value, str(name) if where == "study" else f"{where}.{name}")


def _one_line(error: pydantic.ValidationError) -> str:
    """The first problem as `field: what (got value); fix`, and where the others are.

    What the file holds may be long, and is shown cut short.
    """
    first, *others = error.errors(include_url=False)
    where = _place(first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"unknown key{_nearest(first['loc'])}"
    elif first["type"] != "value_error" and first["type"] != "missing":
        message = f"{message} (got {str(first['input'])[:80]!r})"
    if first["type"] == "literal_error":
        names = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        message += _did_you_mean(str(first["input"]), names)
    also = ", ".join(_place(other["loc"]) for other in others)
    text = f"{where}: {message}" + (f" (also wrong: {also})" if also else "")
    text = one_line(text)
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"


def _place(location: tuple[int | str, ...]) -> str:
    """The field as the file has it."""
    return ".".join(str(part) for part in location if part not in ENTRIES) or "study"


def _nearest(location: tuple[int | str, ...]) -> str:
    """`; did you mean 'x'?` for the closest field of the model that the key was put in."""
    model: Any = StudyConfig
    for part in location[:-1]:
        if part in ENTRIES:
            model = ENTRIES[str(part)]
        elif isinstance(part, str) and part in getattr(model, "model_fields", {}):
            model = _inner_model(model.model_fields[part].annotation) or model
    fields = list(getattr(model, "model_fields", {}))
    return _did_you_mean(str(location[-1]), fields) or f"; valid keys: {', '.join(fields)}"


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name[:80], known, n=1, cutoff=0.65)
    return f"; did you mean {close[0]!r}?" if close else ""


def _inner_model(annotation: Any) -> type[pydantic.BaseModel] | None:
    """The pydantic model inside `X`, `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if found := _inner_model(inner):
            return found
    return None
