"""The stage that trains and judges one SAE."""

from __future__ import annotations

import logging
import math
import pathlib
from typing import Any

import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load_file

from prunelens.activations import Activations, Statistics, random_rotation
from prunelens.config import SaeConfig
from prunelens.sae.formats import PLACE_FILE
from prunelens.sae.quality import SaeQuality, evaluate_sae
from prunelens.sae.topk import TopKSAE
from prunelens.sae.train import TrainedSae, train_sae
from prunelens.study.work import Work, read_json, write_json

log = logging.getLogger(__name__)

ROTATION_SEED = 7919  # one fixed rotation for every floor_shared SAE


def make_sae(work: Work) -> None:
    """Train one SAE, going on from a checkpoint if there is one, and measure it."""
    config = work.config
    fields = {name: value for name, value in config.items() if name in SaeConfig.model_fields}
    assert work.stage.source
    training = SaeConfig(**fields, checkpoint_every=work.stage.source.checkpoint_every)
    train, evaluation = _sae_data(work, "train"), _sae_data(work, "eval")
    variance = read_json(work.parents["dense_statistics"] / "variance.json")["eval_total_variance"]
    early = work.partial() / "three_quarters.json"
    checkpoint = work.partial() / "checkpoint.safetensors"
    _drop_if_damaged(checkpoint, early)

    def at_three_quarters(_step: int, sae: TopKSAE) -> None:
        write_json(early, {"fvu": evaluate_sae(sae, evaluation, dense_variance=variance).fvu})

    trained = train_sae(
        train,
        training,
        init_seed=config["init_seed"],
        data_seed=config["data_seed"],
        checkpoint=checkpoint,
        observe={max(1, 3 * training.steps // 4): at_three_quarters},
        progress=lambda step: work.progress(step / training.steps),
    )
    quality = evaluate_sae(trained.sae, evaluation, dense_variance=variance)
    first_half = _sae_data(work, "eval", first_half=True)
    rate_first_half = evaluate_sae(trained.sae, first_half, dense_variance=variance).firing_rate
    trained.sae.save(work.out)
    Statistics(evaluation.mean.cpu(), evaluation.sigma.cpu()).save(
        work.out / "normalisation.safetensors"
    )
    place = {name: work.stage.parents["activations"].config[name] for name in ("site", "layer")}
    write_json(work.out / PLACE_FILE, place)
    pd.DataFrame(trained.log).to_parquet(work.out / "log.parquet")
    latents = {
        "latent": range(trained.sae.num_latents),
        "firing_rate": quality.firing_rate.cpu().numpy(),
        "firing_rate_first_half": rate_first_half.cpu().numpy(),
        "mean_activation": quality.mean_activation.cpu().numpy(),
        "init_retention": trained.init_retention.cpu().numpy(),
        "resampled": trained.resampled.cpu().numpy(),
    }
    pd.DataFrame(latents).to_parquet(work.out / "latents.parquet")
    numbers = _quality_numbers(trained, quality, rotated=config["rotated"])
    write_json(
        work.out / "quality.json", numbers | {"fvu_at_three_quarters": read_json(early)["fvu"]}
    )


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


def _sae_data(work: Work, split: str, *, first_half: bool = False) -> Activations:
    """The rows that an SAE is trained or judged on, normalised (and rotated for `floor_shared`).

    The first half of the eval documents is what latents may be sorted by: persistence is measured
    on the second.
    """
    found = Statistics.load(work.parents["statistics"] / "statistics.safetensors")
    kept = load_file(work.parents["screening"] / "kept.safetensors")[split]
    if first_half:
        kept = kept[kept < read_json(work.parents["activations"] / "rows.json")["eval_first_rows"]]
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


def _drop_if_damaged(checkpoint: pathlib.Path, early: pathlib.Path) -> None:
    """Forget what an earlier attempt left if any of it cannot be read: training starts again."""
    try:
        if checkpoint.exists():
            load_file(checkpoint)
        if early.exists():
            read_json(early)
    except (SafetensorError, ValueError):
        log.warning("damaged checkpoint %s: training starts again", checkpoint)
        checkpoint.unlink(missing_ok=True)
        early.unlink(missing_ok=True)
