"""The stages of one model at one layer under one condition: SAEs and questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prunelens.config import PruningConfig
from prunelens.study.matrix import Run, Sae
from prunelens.study.model_plan import ModelPlan
from prunelens.study.store import Stage


class LayerPlan:
    """The stages of one model at one layer under one condition."""

    def __init__(
        self,
        model: ModelPlan,
        layer: int,
        pruning: PruningConfig | None,
        dense: LayerPlan | None,
    ) -> None:
        self._model, self._layer, self._pruning = model, layer, pruning
        self._name = f"{model.label}/L{layer}/{pruning.label if pruning else 'dense'}"
        self._dense = dense or self
        self.prune = model.prune(pruning) if pruning else None
        self.activations = model.activations(layer, self.prune, self._name)
        if dense is None:
            self.screening = self._stage(
                "screening",
                {"max_norm_multiple": model.study.activations.max_norm_multiple},
                {"activations": self.activations},
            )
        self.statistics = self._stage(
            "statistics",
            {"statistics_tokens": model.study.activations.statistics_tokens},
            {"activations": self.activations, "screening": self._dense.screening},
        )
        self.saes = {sae: self._sae(sae) for sae in self._wanted_saes()}

    def run(self) -> Run:
        """The run with all its targets."""
        questions = self._model.study.questions
        stages: dict[str, Stage] = {}
        if self.prune:
            stages["prune"] = self.prune
        condition = self._pruning.label if self._pruning else "dense"
        stages["statistics"] = self.statistics
        stages["perplexity"] = self._model.perplexity(
            self.prune, f"{self._model.label}/{condition}"
        )
        if "stability" in questions:
            seeds = {f"sae-{s.init_seed}": self.saes[s] for s in self._seeds()}
            stages["stability"] = self._stage("stability", self._taus(), seeds)
        if "survival" in questions:
            stages |= self._survival()
        if "persistence" in questions and self._pruning:
            stages["persistence"] = self._persistence()
        if "transfer" in questions:
            stages |= self._transfer()
        stages |= self._about_fates(stages)
        return Run(
            self._name, self._model.label, self._layer, self._pruning, stages, dict(self.saes)
        )

    def _survival(self) -> dict[str, Stage]:
        """RQ2's arms; the dense run holds the controls, a pruned run also the corrected rates."""
        parents = {_role("dense", sae): stage for sae, stage in self._dense.saes.items()}
        if self._pruning is None:
            return {"survival": self._stage("survival", self._taus(), parents)}
        parents = self._dense_saes("dense")
        parents |= {_role("pruned", sae): stage for sae, stage in self.saes.items()}
        rates = self._stage("survival", self._taus(), parents)
        controls = self._dense._survival()["survival"]
        corrected = self._stage("corrected", {}, {"survival": rates, "controls": controls})
        return {"survival": rates, "corrected": corrected}

    def _persistence(self) -> Stage:
        parents: dict[str, Stage] = {
            "corpus": self._model.corpus,
            "dense": self._dense.activations,
            "pruned": self.activations,
            "screening": self._dense.screening,
            "statistics": self._dense.statistics,
        }
        parents |= {f"sae-{s.init_seed}": self._dense.saes[s] for s in self._seeds()}
        return self._stage("persistence", {}, parents)

    def _transfer(self) -> dict[str, Stage]:
        """RQ3: one stage for our own dense SAEs, one for each SAE of others."""
        dense = {} if self._dense is self else self._dense._transfer()
        shared = {"prune": self.prune, "statistics": self._dense.statistics}
        own = {f"sae-{s.init_seed}": self._dense.saes[s] for s in self._dense._seeds()}
        stages = {}
        for given in (None, *self._model.pretrained(self._layer)):
            role = f"transfer {given.label}" if given else "transfer"
            parents = {**shared, "dense": dense.get(role), **({} if given else own)}
            label = f"{self._name} {given.label}" if given else self._name
            stages[role] = self._model.transfer(self._layer, given, parents, label)
        return stages

    def _about_fates(self, answers: Mapping[str, Stage]) -> dict[str, Stage]:
        """RQ4 and RQ5; of the dense run only what its control arms say by firing rate."""
        asked = set(self._model.study.questions) & {"fragility", "predictor", "causal"}
        if self._pruning is None:
            asked &= {"fragility"}
        if not asked:
            return {}
        parents = {name: answers[name] for name in ("survival", "persistence") if name in answers}
        seeds = [sae.init_seed for sae in self._seeds()]
        fates = self._stage("fates", {"seeds": seeds}, parents | self._dense_saes("sae"))
        stages = {"fates": fates}
        if "fragility" in asked:
            stages["fragility"] = self._stage("fragility", self._taus(), {"fates": fates})
        if "causal" in asked and self._is_ablated():
            stages["causal"] = self._causal(fates)
        return stages

    def _is_ablated(self) -> bool:
        wanted = self._model.study.causal.conditions
        return self._pruning is not None and (wanted is None or self._pruning.label in wanted)

    def _causal(self, fates: Stage) -> Stage:
        """With the SAEs of the first seed, the paper's reference for all comparisons."""
        first = self._seeds()[0]
        parents = {
            "prune": self.prune,
            "fates": fates,
            "dense_sae": self._dense.saes[first],
            "pruned_sae": self.saes[first],
        }
        return self._model.causal(self._layer, parents, self._name)

    def _dense_saes(self, role: str) -> dict[str, Stage]:
        """The dense SAEs of this condition's seeds."""
        return {_role(role, sae): self._dense.saes[sae] for sae in self._seeds()}

    def _sae(self, sae: Sae) -> Stage:
        study = self._model.study
        config = study.sae.model_dump(
            mode="json", exclude={"seeds", "control_seeds", "checkpoint_every", "resample_every"}
        )
        own = study.activations.normalisation == "own"
        return self._stage(
            "sae",
            {
                **config,
                "resample_every": study.sae.resample_interval,
                "init_seed": sae.init_seed,
                "data_seed": sae.data_seed,
                "rotated": sae.rotated,
            },
            {
                "corpus": self._model.corpus,
                "activations": self.activations,
                "screening": self._dense.screening,
                "statistics": self.statistics if own else self._dense.statistics,
                "dense_statistics": self._dense.statistics,
            },
            suffix=_role("", sae),
        )

    def _wanted_saes(self) -> Iterator[Sae]:
        yield from self._seeds()
        if "survival" in self._model.study.questions:
            for init_seed, data_seed in self._controls():
                yield Sae(init_seed, data_seed)
                if self._pruning is None:
                    yield Sae(init_seed, data_seed, rotated=True)

    def _seeds(self) -> list[Sae]:
        return [Sae(seed, seed) for seed in self._model.study.seeds_of(self._pruning)]

    def _controls(self) -> Iterator[tuple[int, int]]:
        """(s, t) for the first `control_seeds` seeds s, t being the next seed in the list.

        The dense condition has them for the first seeds of every condition, which need its
        ceiling and floor.
        """
        study = self._model.study
        seeds = study.seeds_of(self._pruning)
        starts = seeds[: study.sae.control_seeds]
        if self._pruning is None:
            for pruning in study.conditions():
                starts += study.seeds_of(pruning)[: study.sae.control_seeds]
        for start in dict.fromkeys(starts):
            yield start, seeds[(seeds.index(start) + 1) % len(seeds)]

    def _taus(self) -> dict[str, Any]:
        return {"taus": list(self._model.study.taus)}

    def _stage(
        self,
        name: str,
        config: Mapping[str, Any],
        parents: Mapping[str, Stage],
        *,
        suffix: str = "",
    ) -> Stage:
        label = f"{self._name} {suffix}".strip()
        return self._model.stage(name, config, parents, label=label)


def _role(condition: str, sae: Sae) -> str:
    """A parent's role, e.g. `dense-0-1-rotated`."""
    tail = "-rotated" if sae.rotated else ""
    return f"{condition}-{sae.init_seed}-{sae.data_seed}{tail}".lstrip("-")
