"""What a pruning was, for those who get its result: model, recipe, text, masks, perplexity."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from prunelens.checkpoint import is_local
from prunelens.config import CorpusConfig, ModelConfig, PruningConfig
from prunelens.prune.apply import MatrixSparsity
from prunelens.prune.matrices import kind_of
from prunelens.text import reader_of


@dataclasses.dataclass(frozen=True)
class ModelRecord:
    """A model, named so that it tells nothing of the machine that it lay on."""

    name: str
    """The hub id, else what tables call it."""
    origin: Literal["hub", "shipped", "folder"]
    """`shipped`: it comes with prunelens."""
    content: str
    """The hub's commit, or a SHA-256 over the files."""
    dtype: str
    """The precision that it ran in."""

    @classmethod
    def of(cls, model: ModelConfig, content: str) -> ModelRecord:
        """From the study's field and what `model_fingerprint` gives."""
        if not is_local(model.name):
            return cls(model.name, "hub", content, model.dtype)
        origin: Literal["shipped", "folder"] = "shipped" if model.name == "bundled" else "folder"
        return cls(model.label, origin, content, model.dtype)

    @property
    def title(self) -> str:
        """As headings name it."""
        return "prunelens' bundled model" if self.origin == "shipped" else self.name


@dataclasses.dataclass(frozen=True)
class TextRecord:
    """A text, and how it became tokens."""

    corpus: CorpusConfig
    """As in the study."""
    content: str
    """What `text.fingerprint` gives: a hub data set's commit, else a SHA-256."""

    @property
    def dataset(self) -> str | None:
        """The hub's data set; None for other texts, a folder of one's own too."""
        name = self.corpus.dataset if self.corpus.source == "hub" else None
        return None if name is None or is_local(name) else name

    @property
    def means(self) -> str:
        """Its source, in words."""
        return reader_of(self.corpus).means

    def as_json(self) -> dict[str, Any]:
        """Without the paths, which are the machine's own."""
        corpus = self.corpus.model_dump(mode="json", exclude={"paths"})
        return {**corpus, "dataset": self.dataset, "content": self.content}


class PerplexityRecord(NamedTuple):
    """Perplexity before and after."""

    text: str
    """The corpus as tables name it."""
    context_tokens: int
    """Tokens per window."""
    dense: float
    """Of the dense model."""
    pruned: float
    """Of the pruned one."""


@dataclasses.dataclass(frozen=True)
class PruningRecord:
    """What was done to a model, and what came of it."""

    model: ModelRecord
    """The dense model."""
    pruning: PruningConfig
    """Criterion, scope, pattern, sparsity asked for."""
    matrices: tuple[MatrixSparsity, ...]
    """What became of every matrix."""
    masks_sha256: str
    """What `masks_sha256` gives."""
    calibration: TextRecord | None = None
    """The text that inputs were measured on; None where the criterion reads none."""
    perplexity: tuple[PerplexityRecord, ...] = ()
    """Empty where it was not measured."""

    @property
    def label(self) -> str:
        """Model and pruning, e.g. `google/gemma-3-1b-pt wanda-row-0.50`."""
        return f"{self.model.name} {self.pruning.label}"

    @property
    def reference(self) -> dict[str, str]:
        """What tells it from others, for those that refer to it in `prunelens.json`."""
        return {"label": self.label, "masks_sha256": self.masks_sha256}

    @property
    def achieved_sparsity(self) -> float:
        """Share of all prunable weights that was zeroed."""
        return _achieved(self.matrices)

    def by_kind(self) -> dict[str, float]:
        """Achieved sparsity by kind of matrix: its name below the block, e.g. `mlp.down_proj`."""
        kinds: dict[str, list[MatrixSparsity]] = {}
        for matrix in self.matrices:
            kinds.setdefault(kind_of(matrix.name), []).append(matrix)
        return {kind: _achieved(found) for kind, found in kinds.items()}

    def as_json(self) -> dict[str, Any]:
        """All of it, for `prunelens.json`."""
        return {
            "label": self.label,
            "model": dataclasses.asdict(self.model),
            "pruning": self.pruning.model_dump(mode="json", exclude_none=True),
            "achieved_sparsity": self.achieved_sparsity,
            "achieved_sparsity_by_kind": self.by_kind(),
            "matrices": [matrix._asdict() for matrix in self.matrices],
            "masks_sha256": self.masks_sha256,
            "calibration": self.calibration and self.calibration.as_json(),
            "perplexity": [row._asdict() for row in self.perplexity],
        }


def _achieved(matrices: Iterable[MatrixSparsity]) -> float:
    found = list(matrices)
    return sum(m.num_zeroed for m in found) / sum(m.num_weights for m in found)
