"""A study's description -> its runs and the stages that they need. Nothing is executed here.

A run is model x layer x condition. Stages are shared wherever their identities are equal: one
corpus, one calibration, one dense SAE serve every run that needs them.

    corpus -> calibration -> prune -> activations -> statistics -> sae -> stability
                     |          \\-> perplexity   (screening: dense only)  |-> survival -> corrected
                     |                                                    \\-> persistence
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Sae:
    """Which SAE of a condition: its start, its data order, and whether its space is rotated."""

    init_seed: int
    data_seed: int
    rotated: bool = False


@dataclass(frozen=True)
class Run:
    """Model x layer x condition."""

    name: str
    """For example `gemma-3-1b/L12/wanda-row-0.30`."""
    model: str
    layer: int
    pruning: PruningConfig | None
    """None: the dense condition."""
    stages: dict[str, Stage] = field(default_factory=dict)
    """Role -> stage whose artifact holds a result of this run: perplexity, prune, stability, …"""
    saes: dict[Sae, Stage] = field(default_factory=dict)
    """The run's SAEs."""

    def targets(self) -> Iterator[Stage]:
        """The stages that must be there for this run to be done."""
        yield from self.stages.values()
        yield from self.saes.values()

    def temporary(self) -> Iterator[Stage]:
        """The activation stores that the run reads: large, and easily made again."""
        stores = {
            parent.identity: parent
            for stage in self.targets()
            for parent in stage.parents.values()
            if parent.name == "activations"
        }
        yield from stores.values()


@dataclass(frozen=True)
class Plan:
    """All runs of a study; dense runs come before the pruned ones that refer to them."""

    study: StudyConfig
    runs: list[Run]

    def targets(self) -> dict[str, Stage]:
        """Every run's targets by identity, in the order in which they should be made."""
        return {stage.identity: stage for run in self.runs for stage in run.targets()}


def plan_study(study: StudyConfig) -> Plan:
    """Lay out the matrix; reads fingerprints of models and text, and checks what can be checked.

    Raises: UserError for a missing model or text, an unknown layer, too large a k.
    """
    text = fingerprint(study.corpus)
    runs: list[Run] = []
    for model in study.models:
        runs += _ModelPlan(study, model, text).runs()
    return Plan(study, runs)


class _ModelPlan:
    """The stages of one model."""

    def __init__(self, study: StudyConfig, model: ModelConfig, text: str) -> None:
        self._study, self._model = study, model
        self._shape = model_shape(model)
        self._check(self._shape)
        self._weights = {"weights": model_fingerprint(model), "dtype": model.dtype}
        blocks = 24 * self._shape.num_blocks * self._shape.d_model**2
        self._flops_per_token = blocks + 2 * self._shape.d_model * self._shape.vocabulary_size
        self._corpus = self._tokenised("corpus", study.corpus, text)

    def runs(self) -> list[Run]:
        """Dense runs of every layer first, then one run per layer and pruned condition."""
        dense = {
            layer: _LayerPlan(self, layer, None, None)
            for layer in dict.fromkeys(self._model.layers)
        }
        runs = [layer.run() for layer in dense.values()]
        for pruning in self._study.conditions():
            runs += [
                _LayerPlan(self, layer, pruning, reference).run()
                for layer, reference in dense.items()
            ]
        return runs

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
                {"corpus": self._corpus},
                label=self._model.label,
                cost=cost,
            )
        return self.stage(
            "prune",
            {**self._weights, "pruning": pruning.model_dump(mode="json")},
            {"calibration": norms, "corpus": self._corpus if sequential else None},
            label=f"{self._model.label} {pruning.label}",
            cost=2 * cost if sequential else 1e8,
        )

    def perplexity(self, pruned: Stage | None, label: str) -> Stage:
        """Perplexity of one condition."""
        config = self._study.perplexity
        text = self._corpus
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
            {"corpus": self._corpus, "prune": pruned},
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


class _LayerPlan:
    """The stages of one model at one layer under one condition."""

    def __init__(
        self,
        model: _ModelPlan,
        layer: int,
        pruning: PruningConfig | None,
        dense: _LayerPlan | None,
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
        return Run(
            self._name, self._model.label, self._layer, self._pruning, stages, dict(self.saes)
        )

    def _survival(self) -> dict[str, Stage]:
        """RQ2's arms; the dense run holds the controls, a pruned run also the corrected rates."""
        parents = {_role("dense", sae): stage for sae, stage in self._dense.saes.items()}
        if self._pruning is None:
            return {"survival": self._stage("survival", self._taus(), parents)}
        parents = {_role("dense", sae): self._dense.saes[sae] for sae in self._seeds()}
        parents |= {_role("pruned", sae): stage for sae, stage in self.saes.items()}
        rates = self._stage("survival", self._taus(), parents)
        controls = self._dense._survival()["survival"]
        corrected = self._stage("corrected", {}, {"survival": rates, "controls": controls})
        return {"survival": rates, "corrected": corrected}

    def _persistence(self) -> Stage:
        parents: dict[str, Stage] = {
            "corpus": self._model._corpus,
            "dense": self._dense.activations,
            "pruned": self.activations,
            "screening": self._dense.screening,
            "statistics": self._dense.statistics,
        }
        parents |= {f"sae-{s.init_seed}": self._dense.saes[s] for s in self._seeds()}
        study = self._model.study
        width = self._model.shape.d_model**2 * study.sae.expansion
        cost = 60.0 * study.corpus.eval_tokens * width * len(study.sae.seeds)
        return self._stage("persistence", {}, parents, cost=cost)

    def _sae(self, sae: Sae) -> Stage:
        study = self._model.study
        config = study.sae.model_dump(
            mode="json", exclude={"seeds", "control_seeds", "checkpoint_every", "resample_every"}
        )
        own = study.activations.normalisation == "own"
        latents = self._model.shape.d_model * study.sae.expansion
        per_token = 30 * self._model.shape.d_model * latents
        tokens = study.sae.steps * study.sae.batch_tokens
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
                "corpus": self._model._corpus,
                "activations": self.activations,
                "screening": self._dense.screening,
                "statistics": self.statistics if own else self._dense.statistics,
                "dense_statistics": self._dense.statistics,
            },
            suffix=_role("", sae),
            cost=float(per_token * tokens),
        )

    def _wanted_saes(self) -> Iterator[Sae]:
        yield from self._seeds()
        if "survival" in self._model.study.questions:
            for init_seed, data_seed in self._controls():
                yield Sae(init_seed, data_seed)
                if self._pruning is None:
                    yield Sae(init_seed, data_seed, rotated=True)

    def _seeds(self) -> list[Sae]:
        return [Sae(seed, seed) for seed in self._model.study.sae.seeds]

    def _controls(self) -> Iterator[tuple[int, int]]:
        """(s, t) for the first `control_seeds` seeds s, t being the next seed in the list."""
        seeds = self._model.study.sae.seeds
        for number in range(self._model.study.sae.control_seeds):
            yield seeds[number], seeds[(number + 1) % len(seeds)]

    def _taus(self) -> dict[str, Any]:
        return {"taus": list(self._model.study.taus)}

    def _stage(
        self,
        name: str,
        config: Mapping[str, Any],
        parents: Mapping[str, Stage],
        *,
        suffix: str = "",
        cost: float = 1e8,
    ) -> Stage:
        label = f"{self._name} {suffix}".strip()
        return self._model.stage(name, config, parents, label=label, cost=cost)


def _role(condition: str, sae: Sae) -> str:
    """A parent's role, e.g. `dense-0-1-rotated`."""
    tail = "-rotated" if sae.rotated else ""
    return f"{condition}-{sae.init_seed}-{sae.data_seed}{tail}".lstrip("-")
