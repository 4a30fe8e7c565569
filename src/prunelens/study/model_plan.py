"""The stages of one model: text, masks, perplexity, activations."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from prunelens.checkpoint import files_fingerprint
from prunelens.config import (
    CheckpointConfig,
    Condition,
    CorpusConfig,
    ModelConfig,
    PretrainedSaeConfig,
    StudyConfig,
)
from prunelens.errors import UserError
from prunelens.model import ModelShape, model_fingerprint, model_shape
from prunelens.study.artifacts.store import Source, Stage
from prunelens.study.cost import Costed
from prunelens.study.stages import STAGES
from prunelens.text import fingerprint, reader_of


class Sources:
    """What stands for models, texts and SAEs in identities: their content, or just their names."""

    def __init__(self, resolve: bool) -> None:
        self._resolve = resolve
        self._texts: dict[CorpusConfig, str] = {}

    def weights(self, model: ModelConfig, *, field: str = "models.name") -> str:
        """A model's files; `field` names it in errors."""
        if not self._resolve:
            return _unresolved(model.name, model)
        return model_fingerprint(model, field=field)

    def text(self, corpus: CorpusConfig) -> str:
        """A corpus."""
        if not self._resolve:
            return _unresolved(corpus.dataset or corpus.source, corpus)
        if corpus not in self._texts:
            self._texts[corpus] = fingerprint(corpus)
        return self._texts[corpus]

    def sae(self, sae: PretrainedSaeConfig) -> str:
        """An SAE of others: a folder's content, or its place in SAELens' registry."""
        if sae.folder is None:
            return f"{sae.release}/{sae.sae_id}"
        if not self._resolve:
            return f"unresolved {sae.folder}"
        folder = pathlib.Path(sae.folder).expanduser()
        if not folder.is_dir():
            raise UserError(
                f"models.pretrained: {sae.folder!r} is no folder; give the folder of an SAE"
            )
        return files_fingerprint(sorted(path for path in folder.iterdir() if path.is_file()))


def _unresolved(name: str, source: ModelConfig | CorpusConfig) -> str:
    return f"unresolved {name}@{source.revision}"


def checkpoint_model(model: ModelConfig, condition: CheckpointConfig) -> ModelConfig:
    """The checkpoint of a condition as it is loaded in the model's place."""
    return model.model_copy(
        update={
            "name": condition.checkpoint,
            "revision": condition.revision,
            "short_name": condition.label,
        }
    )


class ModelPlan:
    """The stages of one model."""

    def __init__(
        self, study: StudyConfig, model: ModelConfig, sources: Sources, *, check: bool
    ) -> None:
        self.study, self.config, self._sources = study, model, sources
        if check:
            self._check(self.shape)
        self.weights = {"weights": sources.weights(model), "dtype": model.dtype}
        self.corpus = self._tokenised("corpus", study.corpus)

    @functools.cached_property
    def shape(self) -> ModelShape:
        """Takes the seconds in which transformers imports the model's code."""
        return model_shape(self.config)

    def stage(
        self,
        name: str,
        config: Mapping[str, Any],
        parents: Mapping[str, Stage | None],
        *,
        label: str,
        corpus: CorpusConfig | None = None,
        given: PretrainedSaeConfig | None = None,
        checkpoint: ModelConfig | None = None,
        together: str = "",
    ) -> Stage:
        """A stage of this model; parents that are None are left out."""
        present = {role: parent for role, parent in parents.items() if parent is not None}
        kind = STAGES[name]
        return Stage(
            name,
            kind.version,
            {**config, "threads": self.study.threads_per_stage},
            present,
            label=f"{name} {label}",
            source=Source(self.config, corpus, self.study.sae.checkpoint_every, given, checkpoint),
            estimate=lambda: kind.progress_cost(
                kind.cost(Costed(config, present, self.shape, self.study))
            ),
            together=together,
        )

    def prune(self, condition: Condition) -> Stage:
        """What one condition is made from; the dense model's norms are measured once for all."""
        if isinstance(condition, CheckpointConfig):
            checkpoint = checkpoint_model(self.config, condition)
            content = self._sources.weights(checkpoint, field="prunings.checkpoint")
            return self.stage(
                "prune",
                {**self.weights, "checkpoint": content},
                {},
                label=f"{self.config.label} {condition.label}",
                checkpoint=checkpoint,
            )
        sequential = condition.calibration == "sequential"
        norms = None
        if condition.is_calibrated and not sequential:
            norms = self.stage(
                "calibration",
                self.weights,
                {"corpus": self.corpus},
                label=self.config.label,
            )
        version = condition.entry.version
        raised = {"criterion_version": version} if version > 1 else {}
        pruning = condition.model_dump(mode="json", exclude_none=True)
        return self.stage(
            "prune",
            {**self.weights, "pruning": pruning, **raised},
            {"calibration": norms, "corpus": self.corpus if sequential else None},
            label=f"{self.config.label} {condition.label}",
        )

    def perplexity(self, pruned: Stage | None, label: str) -> Stage | None:
        """Perplexity of one condition; None where there is no language model."""
        config = self.study.perplexity
        text = self.corpus
        if config.corpus:
            text = self._tokenised("text", config.corpus)
        return self.stage(
            "perplexity",
            {
                **self.weights,
                "context_tokens": config.context_tokens,
                "max_tokens": config.max_tokens,
            },
            {"text": text, "prune": pruned},
            label=label,
        )

    def activations(self, layer: int, pruned: Stage | None, label: str) -> Stage:
        """The store of one condition at one layer; one pass serves all layers of a condition."""
        config = self.study.activations
        shared = {
            **self.weights,
            "skip_first": config.skip_first,
            "storage": config.storage,
        }
        read = [self.corpus.identity, pruned.identity if pruned else ""]
        return self.stage(
            "activations",
            {**shared, "site": self.config.site, "layer": layer},
            {"corpus": self.corpus, "prune": pruned},
            label=label,
            together=json.dumps([shared, read], sort_keys=True),
        )

    def labels(self) -> Stage | None:
        """Which tokens of eval have which concepts; None where nobody says."""
        text = self.study.labelled_text
        if text is None:
            return None
        skip = self.study.activations.skip_first
        config = {"concepts": self.study.concepts, "skip_first": skip}
        if reader_of(text).rows:
            raise UserError(
                f"probes.concepts: {self.study.concepts!r}, but corpus.source {text.source!r} is no"
                " text; give the text with its labels as probes.corpus, or leave it out"
            )
        return self._tokenised("labels", text, config, self.corpus)

    @property
    def label(self) -> str:
        """The model's short name."""
        return self.config.label

    def pretrained(self, layer: int) -> list[PretrainedSaeConfig]:
        """The SAEs of others for this layer."""
        return [sae for sae in self.config.pretrained if sae.layer == layer]

    def content(self, given: PretrainedSaeConfig | None) -> dict[str, Any] | None:
        """What an SAE of others is in identities."""
        if given is None:
            return None
        content = given.model_dump(mode="json", include={"release", "sae_id", "nominal_l0"})
        return {**content, "content": self._sources.sae(given)}

    def _tokenised(
        self,
        name: str,
        corpus: CorpusConfig,
        config: Mapping[str, Any] | None = None,
        tokens: Stage | None = None,
    ) -> Stage:
        """A stage that reads text; `tokens`: the windows that it is about."""
        # `text` says which commit it is, also where the study names none.
        content = corpus.model_copy(update={"revision": None}).model_dump(
            mode="json", exclude={"paths"}
        )
        return self.stage(
            name,
            {
                "corpus": content,
                "text": self._sources.text(corpus),
                "tokenizer": self.weights["weights"],
                **(config or {}),
            },
            {"corpus": tokens},
            label=f"{corpus.source} for {self.config.label}",
            corpus=corpus,
        )

    def _check(self, shape: ModelShape) -> None:
        for layer in self.config.layers:
            if not 0 <= layer < shape.num_blocks:
                raise UserError(
                    f"models.layers: layer {layer} is not in {self.config.label}, which has"
                    f" {shape.num_blocks} blocks; use 0 to {shape.num_blocks - 1}"
                )
        corpus, skip = self.study.corpus, self.study.activations.skip_first
        if skip >= corpus.context_tokens:
            raise UserError(
                f"activations.skip_first: {skip} leaves nothing of a window of"
                f" {corpus.context_tokens} tokens; make it smaller"
            )
        longest = shape.max_context_tokens
        if longest is not None and corpus.context_tokens > longest:
            raise UserError(
                f"corpus.context_tokens: {corpus.context_tokens} is more than the {longest} that"
                f" {self.config.label} was built for; make it at most {longest}"
            )
        self._check_saes(shape)

    def _check_saes(self, shape: ModelShape) -> None:
        sae = self.study.sae
        if sae.k > sae.expansion * shape.d_model:
            raise UserError(
                f"sae.k: {sae.k} is more than the {sae.expansion * shape.d_model} latents of"
                f" sae.expansion {sae.expansion} x d_model {shape.d_model}; make k smaller"
            )
        if sae.batch_tokens > self.study.corpus.train_tokens:
            raise UserError(
                f"sae.batch_tokens: {sae.batch_tokens} is more than corpus.train_tokens"
                f" {self.study.corpus.train_tokens}; make the batch smaller"
            )
