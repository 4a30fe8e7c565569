"""The stages of one model at one layer under one condition: SAEs and questions."""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from prunelens.config import CheckpointConfig, Condition
from prunelens.study.artifacts.store import Stage
from prunelens.study.matrix import Run
from prunelens.study.model_plan import ModelPlan
from prunelens.study.parents import Of, Sae, Training, sae_role

FATES_FROM = ("survival", "persistence", "activation_matching", "scaling", "subspace")
NOT_OF_ONE_SAE = {"seeds", "control_seeds", "checkpoint_every", "resample_every", "warm_steps"}


class LayerPlan:
    """The stages of one model at one layer under one condition."""

    def __init__(
        self,
        model: ModelPlan,
        layer: int,
        pruning: Condition | None,
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
                self._largest_norm(),
                {"activations": self.activations},
            )
        self.statistics = self._stage(
            "statistics",
            {"statistics_tokens": model.study.activations.statistics_tokens},
            {"activations": self.activations, "screening": self._dense.screening},
        )
        if dense is not None:
            self.common_change = self._stage(
                "common_change", self._kind_of_change(), self._both_activations()
            )
        self.saes: dict[Sae, Stage] = {}
        for sae in self._wanted_saes():
            self.saes[sae] = self._sae(sae)

    def run(self) -> Run:
        """The run with all its targets."""
        questions = self._model.study.questions
        stages: dict[str, Stage] = {}
        if self.prune:
            stages["prune"] = self.prune
        condition = self._pruning.label if self._pruning else "dense"
        stages["statistics"] = self.statistics
        stages["sinks"] = self._sinks()
        if text := self._model.perplexity(self.prune, f"{self._model.label}/{condition}"):
            stages["perplexity"] = text
        if "stability" in questions:
            stages["stability"] = self._stage("stability", self._taus(), self._readers())
        if "survival" in questions:
            stages |= self._survival()
        if self._pruning and {"persistence", "identity", "transfer"} & set(questions):
            stages["common_change"] = self.common_change
        if "persistence" in questions and self._pruning:
            stages["persistence"] = self._stage("persistence", {}, self._paired())
        if "identity" in questions:
            stages |= self._identity()
        if "sufficiency" in questions:
            stages["sufficiency"] = self._sufficiency()
        if "transfer" in questions:
            stages |= self._transfer()
        if "evidence" in questions:
            stages |= self._evidence()
        stages |= self._about_fates(stages)
        if self._pruning:
            stages |= self._model.grades(stages, self._name)
        return Run(
            self._name, self._model.label, self._layer, self._pruning, stages, dict(self.saes)
        )

    def _sinks(self) -> Stage:
        """Tokens whose norm is large in this condition alone, and its own SAEs without them."""
        parents = {
            "activations": self.activations,
            "dense": self._dense.activations,
            "screening": self._dense.screening,
            "statistics": self.statistics,
        }
        return self._stage("sinks", self._largest_norm(), parents | self._readers())

    def _survival(self) -> dict[str, Stage]:
        """RQ2's arms; the dense run holds the controls, a pruned run also the corrected rates."""
        rates = self._stage("survival", self._taus(), self._compared())
        if self._pruning is None:
            return {"survival": rates}
        controls = self._dense._survival()["survival"]
        corrected = self._stage("corrected", {}, {"survival": rates, "controls": controls})
        return {"survival": rates, "corrected": corrected}

    def _compared(self, *, rotated: bool = True) -> dict[str, Stage]:
        """The SAEs of RQ2's arms: dense and pruned ones, or those of the control arms."""
        own: Of = "dense" if self._pruning is None else "pruned"
        parents = {
            sae_role(own, sae): stage
            for sae, stage in self.saes.items()
            if sae.training != "doubled" and (rotated or not sae.rotated)
        }
        return parents if self._pruning is None else parents | self._dense_saes("dense")

    def _both_activations(self) -> dict[str, Stage]:
        """Dense and pruned activations of the same tokens, and what normalises them."""
        return {
            "dense": self._dense.activations,
            "pruned": self.activations,
            "screening": self._dense.screening,
            "statistics": self._dense.statistics,
        }

    def _largest_norm(self) -> dict[str, Any]:
        """Of the tokens that count, by the dense median."""
        return {"max_norm_multiple": self._model.study.activations.max_norm_multiple}

    def _kind_of_change(self) -> dict[str, Any]:
        """Of the map that is common to all tokens, and the seed of the noise around it."""
        kind = self._model.study.activations.common_change
        return {"kind": kind, "seed": zlib.crc32(self._name.encode())}

    def _paired(self) -> dict[str, Stage]:
        """Both, what they differ by in common, and the dense SAEs that read them."""
        readers = self._readers(self._dense)
        return {**self._both_activations(), "common_change": self.common_change, **readers}

    def _identity(self) -> dict[str, Stage]:
        """Is it the same feature? Asked of activations, directions, and the span around them.

        Rotated SAEs have no part in `activation_matching`: the same tokens make the same features
        fire in a rotated space. A pruned run's SAEs also read the null.
        """
        stages = {"subspace": self._stage("subspace", {}, self._compared())}
        reading = self._compared(rotated=False)
        reading |= {"dense": self._dense.activations, "screening": self._dense.screening}
        if self._pruning:
            reading |= {**self._both_activations(), "common_change": self.common_change}
        stages["activation_matching"] = self._stage("activation_matching", self._taus(), reading)
        if self._pruning:
            stages["scaling"] = self._stage("scaling", {}, self._paired())
        return stages

    def _sufficiency(self) -> Stage:
        """Were the run's SAEs trained enough? The followed ones also show survival by step."""
        parents = {
            sae_role("own", sae): stage
            for sae, stage in self.saes.items()
            if sae.is_plain or sae.training == "doubled"
        }
        if self._pruning and self._is_followed():
            parents |= self._dense_saes("dense")
        return self._stage("sufficiency", self._taus(), parents)

    def _transfer(self) -> dict[str, Stage]:
        """RQ3: one stage for our own dense SAEs, one for each SAE of others."""
        dense = {} if self._dense is self else self._dense._transfer()
        shared = {"prune": self.prune, "statistics": self._dense.statistics}
        if dense:
            shared["common_change"] = self.common_change
            shared["dense_activations"] = self._dense.activations
            shared["pruned_activations"] = self.activations
        own = self._dense._readers()
        stages = {}
        for given in (None, *self._model.pretrained(self._layer)):
            role = f"transfer {given.label}" if given else "transfer"
            parents = {**shared, "dense": dense.get(role), **({} if given else own)}
            label = f"{self._name} {given.label}" if given else self._name
            stages[role] = self._model.transfer(self._layer, given, parents, label)
        return stages

    def _evidence(self) -> dict[str, Stage]:
        """Where the latents of the first seed's SAE fire, and where those of others' SAEs do."""
        dense = {} if self._dense is self else self._dense._evidence()
        first = self._dense._seeds()[0]
        read = {"activations": self.activations, "screening": self._dense.screening}
        if isinstance(self._pruning, CheckpointConfig) and self.prune:
            read["prune"] = self.prune  # it may have an unembedding of its own
        stages = {}
        for given in (None, *self._model.pretrained(self._layer)):
            role = f"evidence {given.label}" if given else "evidence"
            parents = {**read, "dense": dense.get(role)}
            if given is None:
                parents["sae"] = self.saes.get(first)
            if dense:
                which = self._dense.activations if given else self._dense.saes[first]
                parents["dense_activations" if given else "dense_sae"] = which
            label = f"{self._name} {given.label}" if given else self._name
            change = self._kind_of_change() if given and dense else None
            stages[role] = self._model.evidence(given, parents, label, change=change)
        return stages

    def _about_fates(self, answers: Mapping[str, Stage]) -> dict[str, Stage]:
        """RQ4 and RQ5; of the dense run only what its control arms say by firing rate."""
        asked = set(self._model.study.questions) & {"fragility", "predictor", "causal"}
        if self._pruning is None:
            asked &= {"fragility"}
        if not asked:
            return {}
        parents = {name: answers[name] for name in FATES_FROM if name in answers}
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
        """With the SAEs of every seed of the condition, each beside the dense one of that seed."""
        pruned = {sae_role("pruned", sae): self.saes[sae] for sae in self._seeds()}
        parents = {"prune": self.prune, "fates": fates} | self._dense_saes("dense") | pruned
        return self._model.causal(self._layer, parents, self._name)

    def _dense_saes(self, of: Of) -> dict[str, Stage]:
        """The dense SAEs of this condition's seeds."""
        return {sae_role(of, sae): self._dense.saes[sae] for sae in self._seeds()}

    def _readers(self, condition: LayerPlan | None = None) -> dict[str, Stage]:
        """The plain SAEs of this condition's seeds, its own or those of another condition."""
        saes = (condition or self).saes
        return {sae_role("sae", sae, plain=True): saes[sae] for sae in self._seeds()}

    def _sae(self, sae: Sae) -> Stage:
        """One SAE. One that starts from a dense SAE keeps that one's coordinates."""
        study, warm = self._model.study, sae.training == "warm"
        own = study.activations.normalisation == "own" and not warm
        start = self._dense.saes[Sae(sae.init_seed, sae.init_seed)] if warm else None
        statistics = self.statistics if own else self._dense.statistics
        batches = [self.activations.identity, self._dense.screening.identity, statistics.identity]
        batches += [str(sae.rotated), str(sae.data_seed), str(study.sae.batch_tokens)]
        return self._stage(
            "sae",
            {
                **study.sae.model_dump(mode="json", exclude=NOT_OF_ONE_SAE),
                **self._lengths(sae),
                "init_seed": sae.init_seed,
                "data_seed": sae.data_seed,
                "rotated": sae.rotated,
            },
            {
                "activations": self.activations,
                "screening": self._dense.screening,
                "statistics": statistics,
                "dense_statistics": self._dense.statistics,
                "start": start,
            },
            suffix=str(sae),
            together=" ".join(batches),
        )

    def _lengths(self, sae: Sae) -> dict[str, Any]:
        """Steps, and at which of them something happens.

        A doubled training restarts latents as often as the own one, counted in steps.
        """
        study = self._model.study
        own = study.sae.steps
        steps = {"own": own, "warm": study.sae.resolved_warm_steps, "doubled": 2 * own}
        checkpoints: tuple[int, ...] = ()
        if "sufficiency" in study.questions and self._is_followed():
            if sae.is_plain:
                checkpoints = study.sufficiency.steps_at(own)
            elif sae.training == "doubled":
                checkpoints = (own,)
        interval = study.sae.resample_interval
        if sae.training == "warm":
            interval = max(1, interval * steps["warm"] // own)
        return {
            "steps": steps[sae.training],
            "resample_every": interval,
            "checkpoints": list(checkpoints),
        }

    def _is_followed(self) -> bool:
        """Its SAEs are judged while they are trained."""
        return self._pruning in (None, self._model.study.followed())

    def _wanted_saes(self) -> Iterator[Sae]:
        """Own ones first: others start from them."""
        questions, dense = self._model.study.questions, self._pruning is None
        yield from self._seeds()
        if "survival" in questions:
            trainings: list[Training] = ["own"]
            if "warm_start" in questions:
                trainings.append("warm")
            for (init_seed, data_seed), training in itertools.product(self._controls(), trainings):
                yield Sae(init_seed, data_seed, training=training)
                if dense:
                    yield Sae(init_seed, data_seed, rotated=True, training=training)
        if "sufficiency" in questions and self._is_followed():
            first = self._seeds()[0]
            yield dataclasses.replace(first, training="doubled")

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
        parents: Mapping[str, Stage | None],
        *,
        suffix: str = "",
        together: str = "",
    ) -> Stage:
        label = f"{self._name} {suffix}".strip()
        return self._model.stage(name, config, parents, label=label, together=together)
