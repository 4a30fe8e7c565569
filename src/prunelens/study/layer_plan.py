"""The stages of one model at one layer under one condition: SAEs and questions."""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from prunelens.config import Condition, PretrainedSaeConfig
from prunelens.study.artifacts.store import Stage
from prunelens.study.matrix import Run
from prunelens.study.model_plan import ModelPlan
from prunelens.study.parents import Of, Sae, Training, sae_role
from prunelens.study.questions import QUESTIONS

NOT_OF_ONE_SAE = {"seeds", "control_seeds", "checkpoint_every", "resample_every", "warm_steps"}


class LayerPlan:
    """The stages of one model at one layer under one condition, from which a question is planned.

    `pruning` is None and `dense` the plan itself for the dense condition; `prune` makes the
    condition.
    """

    dense: LayerPlan
    activations: Stage
    screening: Stage
    """Of the dense plan alone."""
    statistics: Stage
    saes: dict[Sae, Stage]
    answers: dict[str, Stage]
    """Role -> stage of what has been planned so far; of the dense plan all of it."""

    def __init__(
        self,
        model: ModelPlan,
        layer: int,
        pruning: Condition | None,
        dense: LayerPlan | None,
    ) -> None:
        self.model, self.layer, self.pruning, self.study = model, layer, pruning, model.study
        self.name = f"{model.label}/L{layer}/{pruning.label if pruning else 'dense'}"
        self.dense = dense or self
        self.prune = model.prune(pruning) if pruning else None
        self.activations = model.activations(layer, self.prune, self.name)
        if dense is None:
            self.screening = self.stage(
                "screening",
                self.largest_norm(),
                {"activations": self.activations},
            )
        self.statistics = self.stage(
            "statistics",
            {"statistics_tokens": self.study.activations.statistics_tokens},
            {"activations": self.activations, "screening": self.dense.screening},
        )
        self.saes = {}
        for sae in self._wanted_saes():
            self.saes[sae] = self._sae(sae)

    def run(self) -> Run:
        """The run with all its targets."""
        condition = self.pruning.label if self.pruning else "dense"
        text = self.model.perplexity(self.prune, f"{self.model.label}/{condition}")
        first = {"prune": self.prune, "statistics": self.statistics, "perplexity": text}
        self.answers = {role: stage for role, stage in first.items() if stage}
        for question in QUESTIONS:
            self.answers |= question.planned(self)
        return Run(
            self.name, self.model.label, self.layer, self.pruning, self.answers, dict(self.saes)
        )

    def answer(self, name: str) -> Stage:
        """Of another question of this run; planned now where the study does not ask for it."""
        if name not in self.answers:
            (found,) = [question for question in QUESTIONS if question.name == name]
            assert found.plan is None, f"{name} is planned for itself; look in `answers`"
            assert self.pruning or found.of == "every", f"{name} is not asked of the dense run"
            self.answers[name] = self.stage(name, found.config(self), found.parents(self))
        return self.answers[name]

    def compared(self, *, rotated: bool = True) -> dict[str, Stage]:
        """The SAEs of RQ2's arms: dense and pruned ones, or those of the control arms."""
        own: Of = "dense" if self.pruning is None else "pruned"
        parents = {
            sae_role(own, sae): stage
            for sae, stage in self.saes.items()
            if sae.training != "doubled" and (rotated or not sae.rotated)
        }
        return parents if self.pruning is None else parents | self.dense_saes("dense")

    def both_activations(self) -> dict[str, Stage]:
        """Dense and pruned activations of the same tokens, and what normalises them."""
        return {
            "dense": self.dense.activations,
            "pruned": self.activations,
            "screening": self.dense.screening,
            "statistics": self.dense.statistics,
        }

    def largest_norm(self) -> dict[str, Any]:
        """Of the tokens that count, by the dense median."""
        return {"max_norm_multiple": self.study.activations.max_norm_multiple}

    def kind_of_change(self) -> dict[str, Any]:
        """Of the map that is common to all tokens, and the seed of the noise around it."""
        kind = self.study.activations.common_change
        return {"kind": kind, "seed": zlib.crc32(self.name.encode())}

    def paired(self) -> dict[str, Stage]:
        """Both, what they differ by in common, and the dense SAEs that read them."""
        change = {"common_change": self.answer("common_change")}
        return self.both_activations() | change | self.readers(self.dense)

    def dense_saes(self, of: Of) -> dict[str, Stage]:
        """The dense SAEs of this condition's seeds."""
        return {sae_role(of, sae): self.dense.saes[sae] for sae in self.seeds()}

    def readers(self, condition: LayerPlan | None = None) -> dict[str, Stage]:
        """The plain SAEs of this condition's seeds, its own or those of another condition."""
        saes = (condition or self).saes
        return {sae_role("sae", sae, plain=True): saes[sae] for sae in self.seeds()}

    def _sae(self, sae: Sae) -> Stage:
        """One SAE. One that starts from a dense SAE keeps that one's coordinates."""
        study, warm = self.study, sae.training == "warm"
        own = study.activations.normalisation == "own" and not warm
        start = self.dense.saes[Sae(sae.init_seed, sae.init_seed)] if warm else None
        statistics = self.statistics if own else self.dense.statistics
        batches = [self.activations.identity, self.dense.screening.identity, statistics.identity]
        batches += [str(sae.rotated), str(sae.data_seed), str(study.sae.batch_tokens)]
        return self.stage(
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
                "screening": self.dense.screening,
                "statistics": statistics,
                "dense_statistics": self.dense.statistics,
                "start": start,
            },
            suffix=str(sae),
            together=" ".join(batches),
        )

    def _lengths(self, sae: Sae) -> dict[str, Any]:
        """Steps, and at which of them something happens.

        A doubled training restarts latents as often as the own one, counted in steps.
        """
        study = self.study
        own = study.sae.steps
        steps = {"own": own, "warm": study.sae.resolved_warm_steps, "doubled": 2 * own}
        checkpoints: tuple[int, ...] = ()
        if "sufficiency" in study.questions and self.is_followed():
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

    def is_followed(self) -> bool:
        """Its SAEs are judged while they are trained."""
        return self.pruning in (None, self.study.followed())

    def _wanted_saes(self) -> Iterator[Sae]:
        """Own ones first: others start from them."""
        questions, dense = self.study.questions, self.pruning is None
        yield from self.seeds()
        if "survival" in questions:
            trainings: list[Training] = ["own"]
            if "warm_start" in questions:
                trainings.append("warm")
            for (init_seed, data_seed), training in itertools.product(self._controls(), trainings):
                yield Sae(init_seed, data_seed, training=training)
                if dense:
                    yield Sae(init_seed, data_seed, rotated=True, training=training)
        if "sufficiency" in questions and self.is_followed():
            first = self.seeds()[0]
            yield dataclasses.replace(first, training="doubled")

    def seeds(self) -> list[Sae]:
        """The condition's plain SAEs."""
        return [Sae(seed, seed) for seed in self.study.seeds_of(self.pruning)]

    def _controls(self) -> Iterator[tuple[int, int]]:
        """(s, t) for the first `control_seeds` seeds s, t being the next seed in the list.

        The dense condition has them for the first seeds of every condition, which need its
        ceiling and floor.
        """
        study = self.study
        seeds = study.seeds_of(self.pruning)
        starts = seeds[: study.sae.control_seeds]
        if self.pruning is None:
            for pruning in study.conditions():
                starts += study.seeds_of(pruning)[: study.sae.control_seeds]
        for start in dict.fromkeys(starts):
            yield start, seeds[(seeds.index(start) + 1) % len(seeds)]

    def taus(self) -> dict[str, Any]:
        """The thresholds of matching."""
        return {"taus": list(self.study.taus)}

    def stage(
        self,
        name: str,
        config: Mapping[str, Any],
        parents: Mapping[str, Stage | None],
        *,
        suffix: str = "",
        together: str = "",
    ) -> Stage:
        """A stage of this run; parents that are None are left out."""
        label = f"{self.name} {suffix}".strip()
        return self.model.stage(name, config, parents, label=label, together=together)

    def with_model(
        self,
        name: str,
        config: Mapping[str, Any],
        parents: Mapping[str, Stage | None],
        given: PretrainedSaeConfig | None = None,
    ) -> Stage:
        """A stage that runs the language model on the corpus; with an SAE of others, if `given`."""
        return self.model.stage(
            name,
            {**self.model.weights, **config},
            {"corpus": self.model.corpus, **parents},
            label=f"{self.name} {given.label}" if given else self.name,
            given=given,
        )

    def place(self) -> dict[str, Any]:
        """Where the SAEs read."""
        return {"site": self.model.config.site, "layer": self.layer}
