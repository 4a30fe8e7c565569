"""The stages that train and judge SAEs."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import pandas as pd
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunelens.activations import Activations, Statistics, random_rotation
from prunelens.config import SaeConfig
from prunelens.sae.architectures import load_sae
from prunelens.sae.autoencoder import SparseAutoencoder
from prunelens.sae.checked import load_checked, save_checked
from prunelens.sae.exchange.own_folder import PLACE_FILE
from prunelens.sae.quality import SaeQuality, evaluate_sae
from prunelens.sae.state import StepLog
from prunelens.sae.train import SaeRequest, TrainedSae, train_saes
from prunelens.study.cost import Cost, Costed, sae_size, training_flops
from prunelens.study.kind import StageKind
from prunelens.study.tracking import Tracker
from prunelens.study.work import Work, read_json, write_json

log = logging.getLogger(__name__)

CHECKPOINTS_FILE = "checkpoints.safetensors"  # decoders by step
EVALUATIONS = 1.5  # passes over the eval split per SAE: at the end, and over its first half
ROTATION_SEED = 7919  # one fixed rotation for every floor_shared SAE


def _make_saes(works: Sequence[Work]) -> None:
    """Train SAEs on the same activations in turn, each from its checkpoint if there is one.

    What they share is read once: see `train_saes`.
    """
    evaluation = _sae_data(works[0], "eval")  # they share it too
    seen = [_Seen(work, evaluation) for work in works]
    with contextlib.ExitStack() as stack:
        trackers = [stack.enter_context(contextlib.closing(work.track())) for work in works]
        parts = list(zip(works, seen, trackers, strict=True))
        trained = train_saes(_sae_data(works[0], "train"), [_request(*part) for part in parts])
        for part, found in zip(parts, trained, strict=True):
            _write(*part, found)


def _request(work: Work, seen: _Seen, tracker: Tracker) -> SaeRequest:
    config = work.config
    fields = {name: value for name, value in config.items() if name in SaeConfig.model_fields}
    assert work.stage.source
    training = SaeConfig(**fields, checkpoint_every=work.stage.source.checkpoint_every)
    return SaeRequest(
        training,
        config["init_seed"],
        config["data_seed"],
        start=load_sae(work.parents["start"]) if "start" in work.parents else None,
        checkpoint=seen.checkpoint,
        observe=dict.fromkeys(config["checkpoints"], seen.look),
        progress=lambda step: work.progress(step / training.steps),
        logged=lambda entry, sae: tracker.log(entry.step, _tracked(entry, sae.num_latents)),
    )


def _tracked(entry: StepLog, num_latents: int) -> dict[str, float]:
    """A point of the training curve as trackers show it."""
    return {
        "train/loss": entry.loss,
        "train/fvu": entry.fvu,
        "train/learning_rate": entry.learning_rate,
        "train/dead_share": entry.num_dead / num_latents,
        "train/mean_init_retention": entry.mean_init_retention,
    }


def _write(work: Work, seen: _Seen, tracker: Tracker, trained: TrainedSae) -> None:
    """Measure a trained SAE and write its artifact."""
    work.facts["engine"] = trained.engine
    quality = seen.quality(trained.sae)
    trained.sae.save(work.out)
    evaluation = seen.evaluation
    Statistics(evaluation.mean.cpu(), evaluation.sigma.cpu()).save(
        work.out / "normalisation.safetensors"
    )
    place = {name: work.stage.parents["activations"].config[name] for name in ("site", "layer")}
    write_json(work.out / PLACE_FILE, place)
    pd.DataFrame(trained.log).to_parquet(work.out / "log.parquet")
    seen.keep(trained, quality.fvu)
    latents = {
        "latent": range(trained.sae.num_latents),
        "firing_rate": quality.firing_rate.numpy(),
        "firing_rate_first_half": quality.firing_rate_first.numpy(),
        "mean_activation": quality.mean_activation.numpy(),
        "init_retention": trained.init_retention.cpu().numpy(),
        "resampled": trained.resampled.cpu().numpy(),
    }
    pd.DataFrame(latents).to_parquet(work.out / "latents.parquet")
    numbers = _quality_numbers(trained, quality, rotated=work.config["rotated"])
    write_json(work.out / "quality.json", numbers)
    tracker.log(trained.log[-1].step, {f"quality/{name}": n for name, n in numbers.items()})


def decoders_by_step(folder: pathlib.Path) -> dict[int, Tensor]:
    """Decoders of an SAE's artifact at its checkpoints and at its end."""
    end = int(pd.read_parquet(folder / "curve.parquet")["step"].max())
    path = folder / CHECKPOINTS_FILE
    early = {int(step): rows for step, rows in load_file(path).items()} if path.exists() else {}
    return {**early, end: load_sae(folder).decoder_weight.detach()}


class _Seen:
    """What was seen of an SAE while it was trained; outlives a kill beside its checkpoint."""

    def __init__(self, work: Work, evaluation: Activations) -> None:
        self._folder, self._out = work.partial(), work.out
        self.evaluation, self._first_tokens = evaluation, _first_half(work)
        variance = read_json(work.parents["dense_statistics"] / "variance.json")
        self._dense_variance = float(variance["eval_total_variance"])
        self._kept_steps = work.config["checkpoints"]
        self.checkpoint = self._folder / "checkpoint.safetensors"
        self._forget_if_damaged()

    def look(self, step: int, sae: SparseAutoencoder) -> None:
        """Measure the SAE after a step, and keep its decoder."""
        note = json.dumps(self.quality(sae).fvu)
        save_checked({str(step): sae.decoder_weight}, self._path(step), note=note)

    def quality(self, sae: SparseAutoencoder) -> SaeQuality:
        """On all tokens of eval."""
        return evaluate_sae(
            sae,
            self.evaluation,
            dense_variance=self._dense_variance,
            first_tokens=self._first_tokens,
        )

    def keep(self, trained: TrainedSae, fvu: float) -> None:
        """Write the curve (`analyses.sufficiency`) and the early decoders into the artifact."""
        steps = [*self._kept_steps, trained.log[-1].step]
        early = [load_checked(self._path(step)) for step in self._kept_steps]
        retention = {entry.step: entry.mean_init_retention for entry in trained.log}
        curve = {
            "step": steps,
            "mean_init_retention": [retention[step] for step in steps],
            "fvu": [*(float(json.loads(part.note)) for part in early), fvu],
        }
        pd.DataFrame(curve).to_parquet(self._out / "curve.parquet")
        if early:
            save_file(
                {name: t for part in early for name, t in part.tensors.items()},
                self._out / CHECKPOINTS_FILE,
            )

    def _path(self, step: int) -> pathlib.Path:
        return self._folder / f"at_{step}.safetensors"

    def _forget_if_damaged(self) -> None:
        """If anything that an earlier attempt left is not as written, training starts again."""
        left = list(self._folder.glob("*.safetensors"))
        try:
            for path in left:
                load_checked(path)
        except ValueError:
            log.warning("damaged checkpoint %s: training starts again", path)
            for path in (self.checkpoint, *left):  # without it nobody goes on from the others
                path.unlink(missing_ok=True)


def _quality_numbers(trained: TrainedSae, quality: SaeQuality, *, rotated: bool) -> dict[str, Any]:
    """One SAE's numbers; raw axes mean nothing in a rotated space."""
    return {
        "fvu": quality.fvu,
        "fvu_raw": math.nan if rotated else quality.fvu_raw,
        "fvu_dense_var": math.nan if rotated else quality.fvu_dense_var,
        "l0": quality.l0,
        "alive": quality.alive,
        "num_latents": trained.sae.num_latents,
        "mean_init_retention": float(trained.init_retention.mean()),
    }


def _first_half(work: Work) -> int:
    """How many of the eval rows belong to the first half of the eval documents.

    Latents may be sorted by them: persistence is measured on the second half.
    """
    kept = load_file(work.parents["screening"] / "kept.safetensors")["eval"]
    rows = read_json(work.parents["activations"] / "rows.json")["eval_first_rows"]
    return int((kept < rows).sum())  # rows are in order


def _sae_data(work: Work, split: str) -> Activations:
    """The rows that an SAE is trained or judged on, normalised (and rotated for `floor_shared`)."""
    found = Statistics.load(work.parents["statistics"] / "statistics.safetensors")
    kept = load_file(work.parents["screening"] / "kept.safetensors")[split]
    rotation = None
    if work.config["rotated"]:
        rotation = random_rotation(len(found.mean), seed=ROTATION_SEED)
    return Activations(
        work.parents["activations"] / f"{split}.safetensors",
        statistics=found,
        kept=kept,
        rotation=rotation,
        device=work.device,
    )


def _sae_cost(costed: Costed) -> Cost:
    tokens = costed.config["steps"] * costed.config["batch_tokens"]
    judged = round((EVALUATIONS + len(costed.config["checkpoints"])) * costed.eval_tokens)
    training = training_flops(*sae_size(costed.shape, costed.study), tokens)
    return Cost(training + costed.encoding(judged), 0, tokens)


SAE_STAGES = (
    StageKind(
        "sae",
        4,
        make_together=_make_saes,
        one_each=True,
        cost=_sae_cost,
        work_kind="SAE training",
    ),
)
