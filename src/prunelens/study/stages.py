"""Artifacts in, artifact out: the only place that knows both files and library functions.

Each function reads its parents' folders by role and writes its own files; the result depends on
the stage's config and its parents alone.
"""

from __future__ import annotations

import json
import logging
import math
import pathlib
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunelens.activations import (
    Activations,
    Statistics,
    capture,
    random_rotation,
    statistics,
    total_variance,
    usable_rows,
)
from prunelens.analyses.persistence import persistence, persistence_summary
from prunelens.analyses.stability import seed_stability
from prunelens.analyses.survival import (
    Dictionary,
    control_arms,
    corrected_survival,
    pruned_arms,
    survival,
)
from prunelens.config import ActivationConfig, PruningConfig, SaeConfig
from prunelens.corpus import TokenSplits, joined_stream, split_tokens, windows
from prunelens.errors import UserError
from prunelens.model import LanguageModel, load_model, load_tokenizer
from prunelens.perplexity import measure_perplexity
from prunelens.prune.apply import apply_masks, prune_model
from prunelens.prune.calibrate import input_norms
from prunelens.prune.masks import load_masks, save_masks
from prunelens.sae.quality import evaluate_sae
from prunelens.sae.topk import TopKSAE
from prunelens.sae.train import train_sae
from prunelens.study.store import Stage, Store

log = logging.getLogger(__name__)

ROTATION_SEED = 7919  # one fixed rotation for every floor_shared SAE


@dataclass(frozen=True)
class Work:
    """One stage about to be executed."""

    stage: Stage
    parents: Mapping[str, pathlib.Path]
    """Role -> verified artifact folder."""
    out: pathlib.Path
    """The folder to write to."""
    partial: Callable[[], pathlib.Path]
    """Makes a folder that survives a kill, for checkpoints."""
    device: str
    progress: Callable[[float], None]
    """Told the share of the stage that is done, 0 to 1."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The stage's config."""
        return self.stage.config

    def share(self, total: float, *, before: float = 0.0) -> Callable[[float], None]:
        """A callback for units done so far of `total`, where `before` were done earlier."""
        return lambda done: self.progress(min(1.0, (before + done) / total))


def make_stage(
    store: Store, stage: Stage, *, device: str, progress: Callable[[float], None]
) -> None:
    """Make the artifact of one stage whose parents are there and verified.

    The number of threads is the one that its config names.
    """
    torch.set_num_threads(stage.config["threads"])
    parents = {role: store.folder(parent) for role, parent in stage.parents.items()}
    with store.writing(stage, device=device) as out:
        work = Work(stage, parents, out, lambda: store.partial(stage), device, progress)
        STAGES[stage.name](work)


def failure_of(make: Callable[[], None], log_path: pathlib.Path) -> str | None:
    """Call `make`; None if it succeeds, else why it failed, in one line.

    The traceback of what is not the user's mistake goes to `log_path`.
    """
    try:
        make()
    except UserError as error:
        return str(error)
    except torch.OutOfMemoryError as error:
        return f"out of memory: {str(error).splitlines()[0]}"
    except Exception as error:  # one run's failure, of any kind, must not stop the others
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log_path.write_text(traceback.format_exc(), encoding="utf-8")
        first = (str(error).splitlines() or [""])[0][:200]
        return f"{type(error).__name__}: {first} (traceback in logs/{log_path.name})"
    return None


def _corpus(work: Work) -> None:
    assert work.stage.source and work.stage.source.corpus
    tokenizer = load_tokenizer(work.stage.source.model)
    splits = split_tokens(work.stage.source.corpus, tokenizer)
    _save_splits(work, splits)


def _text(work: Work) -> None:
    assert work.stage.source and work.stage.source.corpus
    stream, bos = joined_stream(work.stage.source.corpus, load_tokenizer(work.stage.source.model))
    save_file({"stream": stream.contiguous()}, work.out / "stream.safetensors")
    _write_json(work.out / "tokens.json", {"bos_token": bos})


def _calibration(work: Work) -> None:
    lm = _load(work)
    tokens = _windows(work, "calibration")
    norms = input_norms(lm, tokens, progress=work.share(len(tokens)))
    save_file(
        {name: norm.cpu().contiguous() for name, norm in norms.items()},
        work.out / "norms.safetensors",
    )


def _prune(work: Work) -> None:
    pruning = PruningConfig.model_validate(work.config["pruning"])
    lm = _load(work)
    norms, tokens = None, None
    if "calibration" in work.parents:
        norms = load_file(work.parents["calibration"] / "norms.safetensors")
    if "corpus" in work.parents:
        tokens = _windows(work, "calibration")
    pruned = prune_model(lm, pruning, calibration=tokens, input_norms=norms)
    save_masks(pruned.masks, work.out / "masks.safetensors")
    pd.DataFrame(pruned.report).to_parquet(work.out / "matrices.parquet")
    _write_json(work.out / "prune.json", {"achieved_sparsity": pruned.achieved_sparsity})


def _perplexity(work: Work) -> None:
    lm = _load(work)
    folder = work.parents["text"]
    bos = _read_json(folder / "tokens.json")["bos_token"]
    if (folder / "stream.safetensors").exists():
        stream = load_file(folder / "stream.safetensors")["stream"]
    else:
        splits = _load_splits(folder)
        stream = torch.cat([splits.eval_first, splits.eval_second])
    rows: dict[int, dict[str, Any]] = {}
    limit = work.config["max_tokens"]
    tokens_each = min(len(stream), limit or len(stream))
    total = tokens_each * len(work.config["context_tokens"])
    for context in work.config["context_tokens"]:
        context = min(context, lm.max_context_tokens or context)
        if context not in rows:
            result = measure_perplexity(
                lm,
                stream,
                context_tokens=context,
                bos_token=bos,
                max_tokens=limit,
                progress=work.share(total, before=tokens_each * len(rows)),
            )
            rows[context] = {**result._asdict(), "bos": bos is not None}
    pd.DataFrame(rows.values()).to_parquet(work.out / "perplexity.parquet")


def _activations(work: Work) -> None:
    lm = _load(work)
    config = ActivationConfig(skip_first=work.config["skip_first"], storage=work.config["storage"])
    splits = _load_splits(work.parents["corpus"])
    context = _read_json(work.parents["corpus"] / "tokens.json")["context_tokens"]
    parts = {"train": [splits.train], "eval": [splits.eval_first, splits.eval_second]}
    batches = {
        name: torch.cat([windows(s, context, splits.bos_token) for s in streams])
        for name, streams in parts.items()
    }
    total, before = sum(batch.numel() for batch in batches.values()), 0
    for name, batch in batches.items():
        norms = capture(
            lm,
            batch,
            work.out / f"{name}.safetensors",
            site=work.config["site"],
            layer=work.config["layer"],
            config=config,
            progress=work.share(total, before=before),
        )
        before += batch.numel()
        save_file({"norms": norms}, work.out / f"{name}_norms.safetensors")
    per_window = context - config.skip_first
    first_half = len(windows(splits.eval_first, context, splits.bos_token)) * per_window
    _write_json(work.out / "rows.json", {"eval_first_rows": first_half})


def _screening(work: Work) -> None:
    """Which rows count, from the dense model's norms; the same rows serve every condition."""
    folder = work.parents["activations"]
    norms = {
        name: load_file(folder / f"{name}_norms.safetensors")["norms"] for name in ("train", "eval")
    }
    median = float(norms["train"].median())
    kept = {
        name: usable_rows(part, median=median, multiple=work.config["max_norm_multiple"])
        for name, part in norms.items()
    }
    save_file(kept, work.out / "kept.safetensors")
    counts = {f"{name}_left_out": len(norms[name]) - len(kept[name]) for name in kept}
    _write_json(work.out / "screening.json", {"dense_median_norm": median, **counts})


def _statistics(work: Work) -> None:
    """Mean and deviation of the training rows; the variance that FVU is measured against."""
    kept = load_file(work.parents["screening"] / "kept.safetensors")
    folder = work.parents["activations"]
    train = Activations(folder / "train.safetensors", kept=kept["train"])
    evaluation = Activations(folder / "eval.safetensors", kept=kept["eval"])
    found = statistics(train, num_tokens=work.config["statistics_tokens"])
    found.save(work.out / "statistics.safetensors")
    _write_json(work.out / "variance.json", {"eval_total_variance": total_variance(evaluation)})


def _sae(work: Work) -> None:
    config = work.config
    fields = {name: value for name, value in config.items() if name in SaeConfig.model_fields}
    assert work.stage.source
    training = SaeConfig(**fields, checkpoint_every=work.stage.source.checkpoint_every)
    train, evaluation = _sae_data(work, "train"), _sae_data(work, "eval")
    variance = _read_json(work.parents["dense_statistics"] / "variance.json")["eval_total_variance"]
    early = work.partial() / "three_quarters.json"
    checkpoint = work.partial() / "checkpoint.safetensors"
    _drop_if_damaged(checkpoint, early)

    def at_three_quarters(_step: int, sae: TopKSAE) -> None:
        _write_json(early, {"fvu": evaluate_sae(sae, evaluation, dense_variance=variance).fvu})

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
    pd.DataFrame(trained.log).to_parquet(work.out / "log.parquet")
    latents = pd.DataFrame(
        {
            "latent": range(trained.sae.num_latents),
            "firing_rate": quality.firing_rate.numpy(),
            "firing_rate_first_half": rate_first_half.numpy(),
            "mean_activation": quality.mean_activation.numpy(),
            "init_retention": trained.init_retention.numpy(),
            "resampled": trained.resampled.numpy(),
        }
    )
    latents.to_parquet(work.out / "latents.parquet")
    numbers = {
        "fvu": quality.fvu,
        # raw axes mean nothing in a rotated space
        "fvu_raw": math.nan if config["rotated"] else quality.fvu_raw,
        "fvu_dense_var": math.nan if config["rotated"] else quality.fvu_dense_var,
        "l0": quality.l0,
        "alive": quality.alive,
        "num_latents": trained.sae.num_latents,
        "fvu_at_three_quarters": _read_json(early)["fvu"],
        "mean_init_retention": float(trained.init_retention.mean()),
    }
    _write_json(work.out / "quality.json", numbers)


def _stability(work: Work) -> None:
    decoders = {
        int(role.removeprefix("sae-")): TopKSAE.load(folder).decoder_weight.detach()
        for role, folder in work.parents.items()
    }
    seed_stability(decoders, work.config["taus"]).to_parquet(work.out / "stability.parquet")


def _survival(work: Work) -> None:
    by_kind: dict[str, list[Dictionary]] = {}
    for role, folder in work.parents.items():
        condition, init_seed, data_seed, *rotated = role.split("-")
        kind = rotated[0] if rotated else "same" if init_seed == data_seed else "reordered"
        by_kind.setdefault(f"{condition}-{kind}", []).append(
            _dictionary(folder, int(init_seed), int(data_seed))
        )
    dense = by_kind["dense-same"]
    if "pruned-same" in by_kind:
        comparisons = pruned_arms(dense, by_kind["pruned-same"], by_kind["pruned-reordered"])
    else:
        comparisons = control_arms(
            dense,
            by_kind["dense-reordered"],
            by_kind["dense-rotated"],
            [_untrained(dictionary) for dictionary in dense],
        )
    result = survival(comparisons, work.config["taus"])
    result.rates.to_parquet(work.out / "survival.parquet")
    result.latents.to_parquet(work.out / "latents.parquet")


def _corrected(work: Work) -> None:
    tables = [
        pd.read_parquet(work.parents[role] / "survival.parquet")
        for role in ("survival", "controls")
    ]
    corrected_survival(*tables).to_parquet(work.out / "corrected.parquet")


def _persistence(work: Work) -> None:
    kept = load_file(work.parents["screening"] / "kept.safetensors")["eval"]
    dense_statistics = Statistics.load(work.parents["statistics"] / "statistics.safetensors")
    dense, pruned = (
        Activations(
            work.parents[role] / "eval.safetensors",
            kept=kept,
            statistics=dense_statistics,
            device=work.device,
        )
        for role in ("dense", "pruned")
    )
    first_half = _read_json(work.parents["dense"] / "rows.json")["eval_first_rows"]
    tokens = (kept >= first_half).nonzero().squeeze(1)
    seeds = {
        role: int(role.removeprefix("sae-")) for role in work.parents if role.startswith("sae-")
    }
    total = len(tokens) * len(seeds)
    latents, summaries = [], []
    for number, (role, seed) in enumerate(seeds.items()):
        sae = TopKSAE.load(work.parents[role]).to(work.device)
        progress = work.share(total, before=number * len(tokens))
        table = persistence(sae, dense, pruned, tokens, seed=seed, progress=progress)
        latents.append(table.assign(seed=seed))
        summaries.append(persistence_summary(table).assign(seed=seed))
    pd.concat(latents, ignore_index=True).to_parquet(work.out / "latents.parquet")
    pd.concat(summaries, ignore_index=True).to_parquet(work.out / "persistence.parquet")


STAGES: dict[str, Callable[[Work], None]] = {
    "corpus": _corpus,
    "text": _text,
    "calibration": _calibration,
    "prune": _prune,
    "perplexity": _perplexity,
    "activations": _activations,
    "screening": _screening,
    "statistics": _statistics,
    "sae": _sae,
    "stability": _stability,
    "survival": _survival,
    "corrected": _corrected,
    "persistence": _persistence,
}


# --- reading parents ----------------------------------------------------------------------------


def _load(work: Work) -> LanguageModel:
    """The stage's model on its device, pruned if the stage has masks for a parent."""
    assert work.stage.source
    lm = load_model(work.stage.source.model, device=work.device)
    if "prune" in work.parents:
        apply_masks(lm, load_masks(work.parents["prune"] / "masks.safetensors"))
    return lm


def _save_splits(work: Work, splits: TokenSplits) -> None:
    parts = splits._asdict()
    tensors = {name: part.contiguous() for name, part in parts.items() if isinstance(part, Tensor)}
    save_file(tensors, work.out / "splits.safetensors")
    context = work.config["corpus"]["context_tokens"]
    facts = {"bos_token": splits.bos_token, "context_tokens": context}
    _write_json(work.out / "tokens.json", facts)


def _load_splits(folder: pathlib.Path) -> TokenSplits:
    bos = _read_json(folder / "tokens.json")["bos_token"]
    return TokenSplits(**load_file(folder / "splits.safetensors"), bos_token=bos)


def _windows(work: Work, split: str) -> Tensor:
    splits = _load_splits(work.parents["corpus"])
    context = _read_json(work.parents["corpus"] / "tokens.json")["context_tokens"]
    return windows(getattr(splits, split), context, splits.bos_token)


def _sae_data(work: Work, split: str, *, first_half: bool = False) -> Activations:
    """The rows that an SAE is trained or judged on, normalised (and rotated for `floor_shared`).

    The first half of the eval documents is what latents may be sorted by: persistence is measured
    on the second.
    """
    found = Statistics.load(work.parents["statistics"] / "statistics.safetensors")
    kept = load_file(work.parents["screening"] / "kept.safetensors")[split]
    if first_half:
        kept = kept[kept < _read_json(work.parents["activations"] / "rows.json")["eval_first_rows"]]
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


def _dictionary(folder: pathlib.Path, init_seed: int, data_seed: int) -> Dictionary:
    decoder = TopKSAE.load(folder).decoder_weight.detach()
    sigma = Statistics.load(folder / "normalisation.safetensors").sigma
    return Dictionary(decoder, sigma, init_seed, data_seed)


def _untrained(trained: Dictionary) -> Dictionary:
    """The dictionary that this one was at step 0."""
    num_latents, d_model = trained.decoder.shape
    sae = TopKSAE.initialise(d_model, num_latents, 1, init_seed=trained.init_seed)
    return trained._replace(decoder=sae.decoder_weight.detach())


def _drop_if_damaged(checkpoint: pathlib.Path, early: pathlib.Path) -> None:
    """Forget what an earlier attempt left if any of it cannot be read: training starts again."""
    try:
        if checkpoint.exists():
            load_file(checkpoint)
        if early.exists():
            _read_json(early)
    except (SafetensorError, ValueError):
        log.warning("damaged checkpoint %s: training starts again", checkpoint)
        checkpoint.unlink(missing_ok=True)
        early.unlink(missing_ok=True)


def _read_json(path: pathlib.Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: pathlib.Path, content: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(path)
