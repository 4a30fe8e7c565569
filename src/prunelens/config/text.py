"""Which text, and how the model is scored on it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from prunelens.config.frozen import Frozen
from prunelens.config.names import Place

SOURCES = {"stdlib": "", "files": "paths", "tokens": "paths", "hub": "dataset"}
"""By source, the field that it needs; `prunelens.text.READERS` says how each is read."""


def _known(source: str) -> str:
    if source not in SOURCES:
        raise ValueError(f"{source[:80]!r} is no source of text; there are {', '.join(SOURCES)}")
    return source


class CorpusConfig(Frozen):
    """Text, and how it becomes token windows (methods §1)."""

    source: Annotated[str, AfterValidator(_known)] = "stdlib"
    """The Python standard library, local files, ready-made token ids, or a hub data set."""
    paths: tuple[Place, ...] = ()
    """For `files` (.txt, .jsonl, also with .gz, .parquet; globs allowed) and `tokens` (one
    .safetensors)."""
    document: Literal["file", "line", "blank_line", "heading"] = "file"
    """What one document of a text file is."""
    text_field: str = Field("text", max_length=1000)
    """The field that holds the text in JSONL, Parquet and hub rows, e.g. `text`, `meta.text`."""
    dataset: Place | None = None
    """For `hub`: the data set's id, e.g. HuggingFaceFW/fineweb-edu."""
    subset: Place | None = None
    """For `hub`: the data set's configuration, e.g. sample-10BT."""
    split: Place = "train"
    """For `hub`: the data set's split."""
    revision: Place | None = None
    """For `hub`: a commit, branch or tag of the data set."""
    context_tokens: int = Field(256, ge=2)
    """Tokens per window, the BOS included."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Whether every window opens with the tokenizer's BOS; auto: where the model has one."""
    train_tokens: int = Field(1_500_000, gt=0)
    """Tokens (in whole windows, BOS included) for training SAEs."""
    eval_tokens: int = Field(300_000, gt=0)
    """Tokens for every measurement; of a document at most a 16th of either half."""
    calibration_tokens: int = Field(300_000, gt=0)
    """Tokens for the pruning criteria that need activations; of a document at most a 16th."""

    @model_validator(mode="after")
    def _fields_fit_the_source(self) -> Self:
        needed = SOURCES[self.source]
        if needed and not getattr(self, needed):
            what = {"paths": "at least one path", "dataset": "a data set id"}.get(needed, "it")
            raise ValueError(f"{needed}: source {self.source!r} needs {what}")
        return self


class PerplexityConfig(Frozen):
    """Perplexity of every condition (methods §2)."""

    corpus: CorpusConfig | None = None
    """Text to score, whole and joined with blank lines; null: the study's own eval split."""
    context_tokens: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (256, 2048), min_length=1, max_length=100
    )
    """Window lengths; one above the model's maximum is cut to it."""
    max_tokens: int | None = Field(None, gt=0)
    """Score at most so many tokens, in windows drawn evenly over the text; null: all."""
