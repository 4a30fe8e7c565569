"""The planted world in the place of a language model: everything from activations on is as ever."""

from __future__ import annotations

from collections.abc import Mapping

from prunelens import planted
from prunelens.config import ActivationConfig, Condition, ModelConfig, StudyConfig
from prunelens.errors import UserError
from prunelens.model import model_shape
from prunelens.study.arm_stages import CONDITIONS
from prunelens.study.artifacts.store import Stage
from prunelens.study.model_plan import ModelPlan
from prunelens.study.parents import sae_role, saes_among

SIMULATED = {"independent": "synthetic", "none": "none", "by_rate": "by_rate"}  # by scope
TOKENS_PER_SET = {"synthetic": 100, "none": 1000, "by_rate": 1000}  # of eval: 1,000 and 100 sets


class PlantedPlan(ModelPlan):
    """A ModelPlan without text and model; its prunings change the world's directions."""

    corpus: None  # type: ignore[assignment]

    def __init__(self, study: StudyConfig, model: ModelConfig) -> None:
        self._study, self._model, self._shape = study, model, model_shape(model)
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
        self._check_saes(self._shape)

    def prune(self, condition: Condition) -> Stage:
        """The world with its directions changed, and what became of each."""
        return self.stage("planted_world", {"choice": condition.scope}, {}, label=condition.label)

    def perplexity(self, _pruned: Stage | None, _label: str) -> None:
        """There is no text."""

    def activations(self, layer: int, pruned: Stage | None, label: str) -> Stage:
        """Activations of the world; the corpus says how many."""
        config = {
            "train_tokens": self._study.corpus.train_tokens,
            "eval_tokens": self._study.corpus.eval_tokens,
            "site": self._model.site,
            "layer": layer,
        }
        return self.stage("planted_activations", config, {"prune": pruned}, label=label)

    def grades(self, answers: Mapping[str, Stage], label: str) -> dict[str, Stage]:
        """Every measure of the run held against the truth, and intervals by simulation."""
        if "fates" not in answers:
            return {}
        fates = answers["fates"]
        saes = {
            sae_role(of, which, plain=True): sae
            for of in CONDITIONS
            for which, sae in saes_among(answers["survival"].parents, of).items()
            if which.is_plain
        }
        parents = {"world": answers["prune"], "fates": fates, **saes}
        world = SIMULATED[answers["prune"].config["choice"]]
        sets = self._study.corpus.eval_tokens // TOKENS_PER_SET[world]
        return {
            "grades": self.stage("grades", {"seeds": fates.config["seeds"]}, parents, label=label),
            "coverage": self.stage("coverage", {"world": world, "sets": sets}, {}, label=label),
        }
