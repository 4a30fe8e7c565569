"""The stages of one model: text, masks, perplexity, activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunelens.config import CorpusConfig, ModelConfig, PruningConfig, StudyConfig
from prunelens.corpus import fingerprint
from prunelens.errors import UserError
from prunelens.model import ModelShape, model_fingerprint, model_shape
from prunelens.study.store import Source, Stage

VERSIONS = {  # raise one when the same config would give other numbers
    "corpus": 1,
    "text": 1,
    "calibration": 1,
    "prune": 1,
    "perplexity": 1,
    "activations": 1,
    "screening": 1,
    "statistics": 1,
    "sae": 1,
    "stability": 1,
    "survival": 1,
    "corrected": 1,
    "persistence": 1,
}


class ModelPlan:
    """The stages of one model."""

    def __init__(self, study: StudyConfig, model: ModelConfig, text: str) -> None:
        self._study, self._model = study, model
        self._shape = model_shape(model)
        self._check(self._shape)
        self._weights = {"weights": model_fingerprint(model), "dtype": model.dtype}
        blocks = 24 * self._shape.num_blocks * self._shape.d_model**2
        self._flops_per_token = blocks + 2 * self._shape.d_model * self._shape.vocabulary_size
        self.corpus = self._tokenised("corpus", study.corpus, text)

    def stage(
        self,
        name: str,
        config: Mapping[str, Any],
        parents: Mapping[str, Stage | None],
        *,
        label: str,
        cost: float = 1e7,
        corpus: CorpusConfig | None = None,
    ) -> Stage:
        """A stage of this model; parents that are None are left out."""
        return Stage(
            name,
            VERSIONS[name],
            {**config, "threads": self._study.threads_per_stage},
            {role: parent for role, parent in parents.items() if parent is not None},
            label=f"{name} {label}",
            source=Source(self._model, corpus, self._study.sae.checkpoint_every),
            cost=cost,
        )

    def prune(self, pruning: PruningConfig) -> Stage:
        """Masks of one condition; Wanda's norms of the dense model are measured once for all."""
        wanda = pruning.criterion == "wanda"
        tokens = self._study.corpus.calibration_tokens
        cost = self._flops_per_token * tokens
        sequential = wanda and pruning.calibration == "sequential"
        norms = None
        if wanda and not sequential:
            norms = self.stage(
                "calibration",
                self._weights,
                {"corpus": self.corpus},
                label=self._model.label,
                cost=cost,
            )
        return self.stage(
            "prune",
            {**self._weights, "pruning": pruning.model_dump(mode="json")},
            {"calibration": norms, "corpus": self.corpus if sequential else None},
            label=f"{self._model.label} {pruning.label}",
            cost=2 * cost if sequential else 1e8,
        )

    def perplexity(self, pruned: Stage | None, label: str) -> Stage:
        """Perplexity of one condition."""
        config = self._study.perplexity
        text = self.corpus
        if config.corpus:
            text = self._tokenised("text", config.corpus, fingerprint(config.corpus))
        tokens = config.max_tokens or self._study.corpus.eval_tokens
        return self.stage(
            "perplexity",
            {
                **self._weights,
                "context_tokens": config.context_tokens,
                "max_tokens": config.max_tokens,
            },
            {"text": text, "prune": pruned},
            label=label,
            cost=self._flops_per_token * tokens * len(config.context_tokens),
        )

    def activations(self, layer: int, pruned: Stage | None, label: str) -> Stage:
        """The store of one condition at one layer."""
        config = self._study.activations
        tokens = self._study.corpus.train_tokens + self._study.corpus.eval_tokens
        return self.stage(
            "activations",
            {
                **self._weights,
                "site": self._model.site,
                "layer": layer,
                "skip_first": config.skip_first,
                "storage": config.storage,
            },
            {"corpus": self.corpus, "prune": pruned},
            label=label,
            cost=self._flops_per_token * tokens,
        )

    @property
    def study(self) -> StudyConfig:
        """The study that this is part of."""
        return self._study

    @property
    def label(self) -> str:
        """The model's short name."""
        return self._model.label

    @property
    def shape(self) -> ModelShape:
        """Width, depth and vocabulary."""
        return self._shape

    def _tokenised(self, name: str, corpus: CorpusConfig, text: str) -> Stage:
        content = corpus.model_dump(mode="json", exclude={"paths"})
        return self.stage(
            name,
            {"corpus": content, "text": text, "tokenizer": self._weights["weights"]},
            {},
            label=f"{corpus.source} for {self._model.label}",
            cost=3e3 * corpus.train_tokens,
            corpus=corpus,
        )

    def _check(self, shape: ModelShape) -> None:
        for layer in self._model.layers:
            if not 0 <= layer < shape.num_blocks:
                raise UserError(
                    f"models.layers: layer {layer} is not in {self._model.label}, which has"
                    f" {shape.num_blocks} blocks; use 0 to {shape.num_blocks - 1}"
                )
        corpus, skip = self._study.corpus, self._study.activations.skip_first
        if skip >= corpus.context_tokens:
            raise UserError(
                f"activations.skip_first: {skip} leaves nothing of a window of"
                f" {corpus.context_tokens} tokens; make it smaller"
            )
        longest = shape.max_context_tokens
        if longest is not None and corpus.context_tokens > longest:
            raise UserError(
                f"corpus.context_tokens: {corpus.context_tokens} is more than the {longest} that"
                f" {self._model.label} was built for; make it at most {longest}"
            )
        sae = self._study.sae
        if sae.k > sae.expansion * shape.d_model:
            raise UserError(
                f"sae.k: {sae.k} is more than the {sae.expansion * shape.d_model} latents of"
                f" sae.expansion {sae.expansion} x d_model {shape.d_model}; make k smaller"
            )
        if sae.batch_tokens > self._study.corpus.train_tokens:
            raise UserError(
                f"sae.batch_tokens: {sae.batch_tokens} is more than corpus.train_tokens"
                f" {self._study.corpus.train_tokens}; make the batch smaller"
            )
