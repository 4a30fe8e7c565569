"""The planted world in the place of a language model: everything from activations on is as ever."""

from __future__ import annotations

from prunelens import planted
from prunelens.config import ActivationConfig, Condition, ModelConfig, StudyConfig
from prunelens.errors import UserError
from prunelens.study.artifacts.store import Stage
from prunelens.study.model_plan import ModelPlan


class PlantedPlan(ModelPlan):
    """A ModelPlan without text and model; its prunings change the world's directions."""

    corpus: None  # type: ignore[assignment]

    def __init__(self, study: StudyConfig, model: ModelConfig) -> None:
        self.study, self.config = study, model
        self.corpus = None
        for pruning in study.conditions():
            if pruning.sparsity != planted.SHARE_DESTROYED:
                raise UserError(
                    f"prunings.sparsities: {pruning.sparsity} is not the share of directions that"
                    f" the planted world loses; give [{planted.SHARE_DESTROYED}]"
                )
        if set(model.layers) != {0}:
            raise UserError(f"models.layers: {list(model.layers)}; the planted world has only [0]")
        given, usual = study.activations, ActivationConfig()
        for field in ("skip_first", "storage"):
            if getattr(given, field) != getattr(usual, field):
                raise UserError(
                    f"activations.{field}: {getattr(given, field)!r} means nothing in the planted"
                    " world, which has no windows and stores float32; leave it out"
                )
        self._check_saes(self.shape)

    def prune(self, condition: Condition) -> Stage:
        """The world with its directions changed, and what became of each."""
        return self.stage("planted_world", {"choice": condition.scope}, {}, label=condition.label)

    def perplexity(self, _pruned: Stage | None, _label: str) -> None:
        """There is no text."""

    def labels(self) -> Stage:
        """Which planted directions fire."""
        return self.stage(
            "planted_labels",
            {"eval_tokens": self.study.corpus.eval_tokens},
            {},
            label=self.config.label,
        )

    def activations(self, layer: int, pruned: Stage | None, label: str) -> Stage:
        """Activations of the world; the corpus says how many."""
        config = {
            "train_tokens": self.study.corpus.train_tokens,
            "eval_tokens": self.study.corpus.eval_tokens,
            "site": self.config.site,
            "layer": layer,
        }
        return self.stage("planted_activations", config, {"prune": pruned}, label=label)
