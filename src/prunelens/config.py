"""The description of a study: frozen data, checked on reading, no torch.

Unknown keys are refused with the nearest valid name; every message names the field, its value and
the fix.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Literal, Self

import pydantic
from pydantic import Field, field_validator, model_validator

from prunelens.errors import UserError

Site = Literal["resid_post", "mlp_out", "attn_out"]
Question = Literal["stability", "survival", "persistence"]


def study_from_data(data: Any) -> StudyConfig:
    """A study from plain data (what YAML or JSON gives). Raises UserError with one line."""
    if not isinstance(data, dict):
        raise UserError(f"study: must be a mapping of fields, got {type(data).__name__}")
    try:
        return StudyConfig.model_validate(data)
    except pydantic.ValidationError as error:
        raise UserError(_one_line(error)) from None


class _Frozen(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class ModelConfig(_Frozen):
    """A Hugging Face causal language model and where to look at it."""

    name: str = "bundled"
    """`bundled` (the small model that ships with prunelens), a hub id, or a local folder."""
    revision: str | None = None
    """A hub commit, branch or tag; null means the default branch."""
    layers: tuple[int, ...] = Field((3,), min_length=1)
    """Decoder blocks to look at, counted from 0."""
    site: Site = "resid_post"
    """Where in the block: its output, its MLP's output or its attention's output."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The precision that the model runs in."""
    device_map: Literal["auto"] | None = None
    """`auto` spreads a model over devices through accelerate; null puts it on one."""

    @property
    def label(self) -> str:
        """The last part of the name, as in run names and tables."""
        return self.name.rstrip("/").split("/")[-1]


class CorpusConfig(_Frozen):
    """Text, and how it becomes token windows (methods §1)."""

    source: Literal["stdlib", "files", "tokens", "hub"] = "stdlib"
    """The Python standard library, local files, ready-made token ids, or a hub data set."""
    paths: tuple[str, ...] = ()
    """For `files` (.txt, .jsonl, .parquet; globs allowed) and `tokens` (one .safetensors)."""
    document: Literal["file", "line", "blank_line", "heading"] = "file"
    """What one document of a text file is."""
    text_field: str = "text"
    """The field that holds the text in JSONL, Parquet and hub rows."""
    dataset: str | None = None
    """For `hub`: the data set's id, e.g. HuggingFaceFW/fineweb-edu."""
    subset: str | None = None
    """For `hub`: the data set's configuration, e.g. sample-10BT."""
    split: str = "train"
    """For `hub`: the data set's split."""
    revision: str | None = None
    """For `hub`: a commit, branch or tag of the data set."""
    context_tokens: int = Field(256, ge=2)
    """Tokens per window, the BOS included."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Whether every window opens with the tokenizer's BOS; auto: where the model has one."""
    train_tokens: int = Field(1_500_000, gt=0)
    """Tokens (in whole windows, BOS included) for training SAEs."""
    eval_tokens: int = Field(300_000, gt=0)
    """Tokens for every measurement."""
    calibration_tokens: int = Field(300_000, gt=0)
    """Tokens for the pruning criteria that need activations."""

    @model_validator(mode="after")
    def _fields_fit_the_source(self) -> Self:
        if self.source in ("files", "tokens") and not self.paths:
            raise ValueError(f"paths: source {self.source!r} needs at least one path")
        if self.source == "hub" and not self.dataset:
            raise ValueError("dataset: source 'hub' needs a data set id")
        return self


class PerplexityConfig(_Frozen):
    """Perplexity of every condition (methods §2)."""

    corpus: CorpusConfig | None = None
    """Text to score, whole and joined with blank lines; null: the study's own eval split."""
    context_tokens: tuple[int, ...] = Field((256, 2048), min_length=1)
    """Window lengths; one above the model's maximum is cut to it."""
    max_tokens: int | None = Field(None, gt=0)
    """Score at most so many tokens; null: all."""


class _Pruning(_Frozen):
    """Criterion x scope x pattern: a pruning but for its sparsity (methods §3)."""

    criterion: Literal["magnitude", "wanda"]
    """|W|, or |W_ij| * ||X_j||."""
    scope: Literal["global", "matrix", "row"]
    """Which weights compete: all, those of one matrix, those of one output row."""
    pattern: Literal["unstructured"] = "unstructured"
    """Which weights of a scope group may go."""
    calibration: Literal["dense", "sequential"] = "dense"
    """Wanda's norms: from the dense model, or block by block from the already pruned one."""

    @model_validator(mode="after")
    def _sequential_fits(self) -> Self:
        if self.calibration == "sequential" and self.criterion != "wanda":
            raise ValueError(f"calibration: 'sequential' is for wanda, not {self.criterion!r}")
        if self.calibration == "sequential" and self.scope == "global":
            raise ValueError(
                "calibration: 'sequential' needs scope 'matrix' or 'row', not 'global'"
            )
        return self


class PruningConfig(_Pruning):
    """One pruned condition."""

    sparsity: float = Field(ge=0, lt=1)
    """Share of the weights of every scope group that is zeroed, read as an exact decimal."""

    @property
    def fraction(self) -> Fraction:
        """The sparsity as the decimal that was written, so that floor(s * n) is exact."""
        return Fraction(str(self.sparsity))

    @property
    def label(self) -> str:
        """As in run names: `wanda-row-0.30`; sequential calibration is named."""
        decimals = max(2, len(str(self.sparsity).partition(".")[2]))
        tail = "-sequential" if self.calibration == "sequential" else ""
        return f"{self.criterion}-{self.scope}-{self.sparsity:.{decimals}f}{tail}"


class PruningGrid(_Pruning):
    """A pruning at several sparsities."""

    sparsities: tuple[float, ...] = Field(min_length=1)
    """Each in (0, 1); the dense condition is always run."""

    @field_validator("sparsities")
    @classmethod
    def _in_range(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        for value in values:
            if not 0 < value < 1:
                raise ValueError(f"{value} is outside (0, 1); the dense condition is always run")
        return values

    def prunings(self) -> Iterator[PruningConfig]:
        """One PruningConfig per sparsity."""
        shared = self.model_dump(exclude={"sparsities"})
        for sparsity in self.sparsities:
            yield PruningConfig(**shared, sparsity=sparsity)


class ActivationConfig(_Frozen):
    """Which activations are kept, and how they are normalised (methods §1, §4)."""

    normalisation: Literal["own", "dense"] = "own"
    """Whose mean and deviation: each condition's own (paper), or the dense model's for all."""
    skip_first: int = Field(1, ge=0)
    """Positions at the start of each window that are left out (the attention sink)."""
    max_norm_multiple: float | None = Field(10.0, gt=1)
    """Tokens whose dense norm exceeds this multiple of its median are left out; null: none."""
    statistics_tokens: int = Field(50_000, ge=2)
    """Training tokens from which mean and deviation are computed, in float64."""
    storage: Literal["float32", "bfloat16", "float16"] = "float32"
    """The precision on disk."""


class SaeConfig(_Frozen):
    """TopK sparse autoencoders and their training (methods §5); the paper's values by default."""

    expansion: int = Field(8, ge=1)
    """num_latents / d_model."""
    k: int = Field(64, ge=1)
    """Latents kept per token."""
    steps: int = Field(20_000, ge=1)
    """Optimiser steps."""
    batch_tokens: int = Field(4096, ge=1)
    """Tokens per step."""
    learning_rate: float = Field(5e-5, gt=0)
    """Adam's rate at the start; cosine to 0, no warm-up."""
    resample_every: int | None = Field(None, ge=1)
    """Steps between restarts of dead latents; null: a tenth of the steps."""
    checkpoint_every: int = Field(1000, ge=1)
    """Steps between checkpoints from which a killed training goes on."""
    encoder_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the encoder's matrix product in training; sums and weights stay float32."""
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    """Seed s means init_seed = data_seed = s."""
    control_seeds: int = Field(1, ge=1)
    """For how many of the seeds the control SAEs (other order; rotated) are trained."""

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError(f"{list(seeds)} must be distinct and not negative")
        return seeds

    @property
    def resample_interval(self) -> int:
        """Steps between restarts of dead latents."""
        return self.resample_every or max(1, self.steps // 10)


class StudyConfig(_Frozen):
    """A matrix of runs and the questions asked of it."""

    name: str = Field("study", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the output folder runs/<name> by default."""
    models: tuple[ModelConfig, ...] = Field((ModelConfig(),), min_length=1)
    """The models; each is run dense and under every pruning."""
    corpus: CorpusConfig = CorpusConfig()
    """The text of the study."""
    perplexity: PerplexityConfig = PerplexityConfig()
    """How perplexity is measured."""
    prunings: tuple[PruningGrid, ...] = ()
    """The pruned conditions; the dense one is always there."""
    activations: ActivationConfig = ActivationConfig()
    """Which activations the SAEs see."""
    sae: SaeConfig = SaeConfig()
    """The SAEs."""
    taus: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    """Match thresholds."""
    questions: tuple[Question, ...] = ("stability", "survival", "persistence")
    """What is asked: RQ1, RQ2 and same-dictionary persistence."""
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
        if len(self.sae.seeds) < 2 and {"stability", "survival"} & set(self.questions):
            raise ValueError(
                f"sae.seeds: {list(self.sae.seeds)} is one seed; stability and survival compare"
                " seeds, so give at least two, or ask only 'persistence'"
            )
        if self.sae.control_seeds > len(self.sae.seeds):
            raise ValueError(
                f"sae.control_seeds: {self.sae.control_seeds} is more than the"
                f" {len(self.sae.seeds)} sae.seeds; make it at most that"
            )
        labels = [p.label for p in self.conditions()]
        doubled = sorted({label for label in labels if labels.count(label) > 1})
        if doubled:
            raise ValueError(f"prunings: {doubled[0]} is listed twice; remove one")
        names = [m.label for m in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"models: {names} share a name; run names would clash")
        return self

    def conditions(self) -> list[PruningConfig]:
        """The pruned conditions, in the order of the file."""
        return [pruning for grid in self.prunings for pruning in grid.prunings()]


def _one_line(error: pydantic.ValidationError) -> str:
    """The first problem as `field: what (got value); fix`, and where the others are."""
    first, *others = error.errors(include_url=False)
    where = ".".join(str(part) for part in first["loc"]) or "study"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"unknown key{_nearest(first['loc'])}"
    elif first["type"] != "value_error" and first["type"] != "missing":
        message = f"{message} (got {str(first['input'])[:80]!r})"
    also = ", ".join(".".join(map(str, other["loc"])) or "study" for other in others)
    text = f"{where}: {message}" + (f" (also wrong: {also})" if also else "")
    return " ".join(text.split())


def _nearest(location: tuple[int | str, ...]) -> str:
    """`; did you mean 'x'?` for the closest field of the model that the key was put in."""
    model: Any = StudyConfig
    for part in location[:-1]:
        if isinstance(part, str) and part in getattr(model, "model_fields", {}):
            model = _inner_model(model.model_fields[part].annotation) or model
    fields = list(getattr(model, "model_fields", {}))
    close = difflib.get_close_matches(str(location[-1]), fields, n=1, cutoff=0.65)
    return f"; did you mean {close[0]!r}?" if close else f"; valid keys: {', '.join(fields)}"


def _inner_model(annotation: Any) -> type[pydantic.BaseModel] | None:
    """The pydantic model inside `X`, `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if found := _inner_model(inner):
            return found
    return None
