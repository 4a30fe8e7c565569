"""What a study made, passed on: its SAEs and its pruned models, with what the study knows of them.

The facts are read from `study.yaml` and the artifacts, whose files are verified; what an SAE
outside a study does not say of itself is not known, and its card says so.
"""

from __future__ import annotations

import collections
import logging
import pathlib
import re
from typing import NamedTuple

import pandas as pd

from prunelens.cards import Sharing
from prunelens.checkpoint import model_folder, stored_dtype
from prunelens.config import CheckpointConfig, ModelConfig, PruningConfig, SaeConfig
from prunelens.errors import UserError
from prunelens.model import load_model
from prunelens.prune.apply import MatrixSparsity
from prunelens.prune.checkpoint import check_target, save_checkpoint
from prunelens.prune.masks import load_masks, masks_sha256
from prunelens.prune.record import (
    ModelRecord,
    PerplexityRecord,
    PruningRecord,
    TextRecord,
)
from prunelens.prune.stored import MASKS, apply_pruning
from prunelens.sae.exchange.hub_folder import HubFolder, SaeSource, write_hub_folder
from prunelens.sae.exchange.record import TrainingRecord
from prunelens.study.artifacts.store import Stage
from prunelens.study.folder import open_study
from prunelens.study.matrix import Run
from prunelens.study.parents import Sae

log = logging.getLogger(__name__)

_NOT_JUDGED = "only a condition's own SAEs are judged"


class ExportedCheckpoint(NamedTuple):
    """What `export_checkpoint` wrote."""

    folder: pathlib.Path
    """Where it is."""
    condition: str
    """Model and pruning, e.g. `gemma-3-1b/wanda-row-0.50`."""
    record: PruningRecord
    """How it was pruned."""


def export_hub(
    source: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    sharing: Sharing | None = None,
    artifacts: str | None = None,
) -> HubFolder:
    """Write one SAE, or all of a study's own ones, as a folder for the Hugging Face hub.

    Args:
        source: the folder of an SAE (`folder` in `tables/sae_training.csv`, or one outside a
            study), or of a study: then every condition's own SAEs, not the controls.
        out: a new folder; see `write_hub_folder`.
        sharing: license, repository and what the user says of the model.
        artifacts: of a study: where they are, as `open_store` takes it; None: where it says.
    Raises: UserError where `source` is neither, an SAE is missing, damaged or of the planted
        world, the study cannot be opened, or as `check_target`.
    """
    source = pathlib.Path(source).expanduser().absolute()
    sharing = sharing or Sharing()
    check_target(pathlib.Path(out))
    if (source / "study.yaml").is_file():
        sources = _own_saes(_Facts(source, artifacts), sharing)
    elif not (source / "sae.json").is_file():
        raise UserError(
            f"SAE: {str(source)!r} holds neither sae.json (an SAE of ours) nor study.yaml (a"
            " study); give such a folder"
        )
    elif study := _study_of(source):
        sources = {"": _Facts(study, artifacts).source_at(source)}
    else:
        sources = {"": SaeSource(source, None)}
    return write_hub_folder(sources, out, sharing=sharing)


def export_checkpoint(
    study: str | pathlib.Path,
    condition: str,
    out: str | pathlib.Path,
    *,
    sharing: Sharing | None = None,
    artifacts: str | None = None,
) -> ExportedCheckpoint:
    """Write a study's pruned model as a Hugging Face checkpoint, made again from its artifact.

    It is what the study's SAEs were trained on; the dense model's files are the same as then, or
    the study's plan has no such artifact. The files have the dense ones' dtype, or the study's
    where that would change a number (SparseGPT's).

    Args:
        study: a study's folder.
        condition: e.g. `wanda-row-0.50`; with several models `MODEL/wanda-row-0.50`.
        out: a new folder; see `save_checkpoint`.
        sharing: license, repository and what the user says of the model.
        artifacts: where they are, as `open_store` takes it; None: where the study says.
    Raises: UserError where the study cannot be opened, has no such condition or has not pruned it
        yet, its masks are damaged, the model is out of reach, or as `check_target`.
    """
    facts = _Facts(pathlib.Path(study), artifacts)
    out = pathlib.Path(out).expanduser().absolute()
    check_target(out)
    run = facts.pruned_run(condition)
    if isinstance(run.pruning, CheckpointConfig):
        raise UserError(
            f"--condition: {condition!r} is the checkpoint {run.pruning.checkpoint!r} itself; pass"
            " that on"
        )
    record = facts.pruning(run)
    assert record
    folder = facts.artifact(run.stages["prune"], run)
    config = facts.model_config(run)
    lm = load_model(config)
    masks = apply_pruning(lm, folder)
    dtype = stored_dtype(model_folder(config))
    save_checkpoint(lm, out, record=record, masks=masks, sharing=sharing, dtype=dtype)
    return ExportedCheckpoint(out, _condition(run), record)


def _own_saes(facts: _Facts, sharing: Sharing) -> dict[str, SaeSource]:
    """Every condition's own SAEs that are there, by folder."""
    plan, store = facts.plan, facts.store
    wanted = [(run, sae) for run in plan.runs for sae in run.saes if sae.is_plain]
    there = [(run, sae) for run, sae in wanted if store.has(run.saes[sae])]
    if not there:
        raise UserError("STUDY: none of its SAEs is there yet; run the study first")
    if len(there) < len(wanted):
        log.warning(
            "%d of the study's %d SAEs are not there yet and are left out",
            *(len(wanted) - len(there), len(wanted)),
        )
    if sharing.base_model and len({run.model for run, _ in there}) > 1:
        raise UserError(
            f"--model: {sharing.base_model!r}, but the study has several models; leave it out, or"
            " export one SAE at a time"
        )
    paths = [f"{_path(run.name)}/seed-{sae.init_seed}" for run, sae in there]
    doubled, times = collections.Counter(paths).most_common(1)[0]
    if times > 1:
        raise UserError(
            f"models: two of them would share the folder {doubled!r}; give them a short_name"
        )
    sources = [facts.source(run, sae) for run, sae in there]
    return dict(zip(paths, sources, strict=True))


def _path(name: str) -> str:
    """A run's name as folders that any file system and the hub take."""
    parts = (re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip(".-") for part in name.split("/"))
    return "/".join(part or "model" for part in parts)


def _study_of(sae: pathlib.Path) -> pathlib.Path | None:
    """The study among whose artifacts an SAE's folder lies."""
    stage, artifacts, study = sae.parent, sae.parent.parent, sae.parent.parent.parent
    inside = (stage.name, artifacts.name) == ("sae", "artifacts")
    return study if inside and (study / "study.yaml").is_file() else None


def _condition(run: Run) -> str:
    assert run.pruning
    return f"{run.model}/{run.pruning.label}"


class _Facts:
    """What a study's plan and artifacts say of its SAEs and prunings."""

    def __init__(self, study: pathlib.Path, artifacts: str | None) -> None:
        self.plan, self.store = open_study(study.expanduser(), artifacts)
        self._prunings: dict[str, PruningRecord] = {}
        if any(model.is_planted for model in self.plan.study.models):
            raise UserError(
                "STUDY: the planted world of the self-test is no language model; there is nothing"
                " to pass on"
            )

    def source_at(self, folder: pathlib.Path) -> SaeSource:
        """The SAE whose artifact is at `folder`."""
        for run in self.plan.runs:
            for sae, stage in run.saes.items():
                if stage.identity == folder.name:
                    return self.source(run, sae)
        raise UserError(
            f"SAE: {str(folder)!r} is none of those that its study.yaml asks for now; run the"
            " study again, or copy the folder elsewhere to export it with what its files say"
        )

    def source(self, run: Run, sae: Sae) -> SaeSource:
        """One SAE, its files verified, and all that is known of it."""
        stage, study = run.saes[sae], self.plan.study
        folder = self.artifact(stage, run)
        fields = {k: v for k, v in stage.config.items() if k in SaeConfig.model_fields}
        enough, reason = self._sufficiency(run) if sae.is_plain else (None, _NOT_JUDGED)
        kept = study.activations
        if sae.training == "warm":  # it keeps the coordinates of the SAE that it started from
            kept = kept.model_copy(update={"normalisation": "dense"})
        training = TrainingRecord(
            run=run.name,
            model=self._model(run),
            pruning=self.pruning(run),
            text=self._text(stage.parents["activations"].parents["corpus"]),
            training=SaeConfig(**fields),
            init_seed=sae.init_seed,
            data_seed=sae.data_seed,
            start=sae.training,
            activations=kept,
            enough=enough,
            enough_reason=reason,
            libraries=self.store.meta(stage)["libraries"],
        )
        return SaeSource(folder, training)

    def pruning(self, run: Run) -> PruningRecord | None:
        """How the run's model was pruned; None for the dense one and for a checkpoint of others."""
        if not isinstance(run.pruning, PruningConfig):
            return None
        name = _condition(run)  # the same whichever layer is looked at
        if name not in self._prunings:
            self._prunings[name] = self._pruning(run, run.pruning)
        return self._prunings[name]

    def pruned_run(self, condition: str) -> Run:
        """A run of a pruned condition, named with or without its model."""
        runs = {_condition(run): run for run in self.plan.runs if run.pruning}
        named = [name for name in runs if condition in (name, name.split("/", 1)[1])]
        if len(named) == 1:
            return runs[named[0]]
        which = "is several, one per model" if named else "is none of the study's prunings"
        options = ", ".join(named or runs) or "there are none"
        raise UserError(f"--condition: {condition!r} {which}; give one of: {options}")

    def model_config(self, run: Run) -> ModelConfig:
        """The run's model as `study.yaml` names it."""
        return next(model for model in self.plan.study.models if model.label == run.model)

    def artifact(self, stage: Stage, run: Run) -> pathlib.Path:
        """A verified folder. Raises UserError where it is not there."""
        return self.store.needed(stage, f"the {stage.name} of {run.name}")

    def _pruning(self, run: Run, pruning: PruningConfig) -> PruningRecord:
        stage = run.stages["prune"]
        folder = self.artifact(stage, run)
        rows = pd.read_parquet(folder / "matrices.parquet").to_dict("records")
        text = stage.parents.get("corpus")
        if "calibration" in stage.parents:
            text = stage.parents["calibration"].parents["corpus"]
        return PruningRecord(
            model=self._model(run),
            pruning=pruning,
            matrices=tuple(MatrixSparsity(**row) for row in rows),
            masks_sha256=masks_sha256(load_masks(folder / MASKS)),
            calibration=self._text(text) if text else None,
            perplexity=self._perplexity(run),
        )

    def _perplexity(self, run: Run) -> tuple[PerplexityRecord, ...]:
        """At every window length, where both models' were measured."""
        dense = next(r for r in self.plan.runs if r.model == run.model and r.pruning is None)
        found = []
        for one in (dense, run):
            folder = self.store.found(one.stages.get("perplexity"))
            if folder is None:
                return ()
            table = pd.read_parquet(folder / "perplexity.parquet")
            found.append(table.set_index("context_tokens")["perplexity"])
        before, after = found
        scored = self.plan.study.perplexity.corpus
        text = f"{self.plan.study.corpus.source} eval"
        if scored is not None:
            kind = "files" if scored.source == "hub" else scored.source
            text = TextRecord(scored, "").dataset or kind
        return tuple(
            PerplexityRecord(text, int(width), float(before[width]), float(after[width]))
            for width in before.index.intersection(after.index)
        )

    def _model(self, run: Run) -> ModelRecord:
        sae = next(iter(run.saes.values()))
        activations = sae.parents["activations"]
        if isinstance(run.pruning, CheckpointConfig):
            prune = activations.parents["prune"]
            assert prune.source and prune.source.checkpoint
            return ModelRecord.of(prune.source.checkpoint, prune.config["checkpoint"])
        return ModelRecord.of(self.model_config(run), activations.config["weights"])

    def _text(self, stage: Stage) -> TextRecord:
        return TextRecord(self.plan.study.corpus, stage.config["text"])

    def _sufficiency(self, run: Run) -> tuple[bool | None, str]:
        """Whether the run's SAEs were trained enough, where that was asked, and why."""
        folder = self.store.found(run.stages.get("sufficiency"))
        if folder is None:
            return None, "the question `sufficiency` was not asked"
        verdict = pd.read_parquet(folder / "verdict.parquet").iloc[0]
        enough = verdict["trained_enough"]
        return None if pd.isna(enough) else bool(enough), verdict["reason"]
