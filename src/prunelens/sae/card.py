"""The model card of one SAE or of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prunelens import cards
from prunelens.cards import UNKNOWN, Sharing, escaped
from prunelens.prune.card import (
    base_models,
    closing,
    data_sets,
    model_in_words,
    recipe_rows,
    text_in_words,
)
from prunelens.prune.record import PruningRecord
from prunelens.sae.architectures import ARCHITECTURES
from prunelens.sae.export import formats_of
from prunelens.sae.record import SaeRecord, TrainingRecord

OWN = "prunelens"  # folder of an SAE's own layout; the others are called after their format


def sae_card(saes: Mapping[str, SaeRecord], sharing: Sharing) -> str:
    """The README.md of a hub folder.

    Args:
        saes: by their folder within the repository; "" for the repository itself.
        sharing: license, repository and what the user says of the model.
    """
    records = list(saes.values())
    known = [record.training for record in records if record.training]
    prunings = prunings_of(saes)
    body = [
        f"# {_title(records, sharing)}",
        _summary(records),
        "## How to load",
        *_loading(*next(iter(saes.items())), sharing),
        f"## {'The SAE' if len(saes) == 1 else 'The SAEs'}",
        _sae_grid(saes),
        _HOW_TO_READ,
        "## How they were trained" if len(saes) > 1 else "## How it was trained",
        *_trainings(saes, sharing),
        "## Were they trained enough?" if len(saes) > 1 else "## Was it trained enough?",
        _verdicts(known),
        "## The pruned models" if len(prunings) > 1 else "## The pruning of the model",
        *_prunings(prunings, known),
        "## Normalisation",
        _normalisation(formats_of(records[0].architecture)),
        f"The numbers of this card are in `{cards.RECORD_FILE}` in full precision.",
        closing(sharing),
    ]
    texts = [training.text for training in known]
    calibration = [pruning.calibration for pruning in prunings]
    return cards.card(
        body,
        sharing=sharing,
        library="saelens",
        tags=["sparse-autoencoder", "interpretability", *formats_of(records[0].architecture)]
        + ["pruning"] * bool(prunings),
        base_models=base_models([training.model for training in known], sharing),
        datasets=data_sets(*texts, *calibration),
    )


def prunings_of(saes: Mapping[str, SaeRecord]) -> list[PruningRecord]:
    """The prunings of the models that SAEs were trained on, each once."""
    found = [record.training.pruning for record in saes.values() if record.training]
    return list({(p.label, p.masks_sha256): p for p in found if p}.values())


_HOW_TO_READ = (
    "FVU is the share of variance that the reconstruction misses on held-out tokens (0 is perfect),"
    " in normalised space; `raw`: in the model's own coordinates; `dense var`: raw error over the"
    " variance of the dense model's activations. L0 is the mean number of active latents per token;"
    " alive latents fire at least once on the held-out tokens."
)
_YES_OR_NO = {True: "yes", False: "no", None: UNKNOWN}
_STARTS = {
    "own": "random",
    "warm": "the dense model's SAE of that seed",
    "doubled": "random; trained twice as long as the study's others",
}


def _title(records: list[SaeRecord], sharing: Sharing) -> str:
    if len(records) > 1:
        return f"{len(records)} sparse autoencoders of {_models(records, sharing)}"
    (record,) = records
    place = f"layer {record.layer}, {record.site}" if record.layer is not None else "place unknown"
    condition = f", {_condition(record.training)}" if record.training else ""
    return f"Sparse autoencoder of {_models(records, sharing)}, {place}{condition}"


def _models(records: list[SaeRecord], sharing: Sharing) -> str:
    if sharing.base_model:
        return escaped(sharing.base_model)
    names = dict.fromkeys(r.training.model.title if r.training else "" for r in records)
    return ", ".join(escaped(name) if name else "a model that is not known" for name in names)


def _summary(records: list[SaeRecord]) -> str:
    kind = ARCHITECTURES[records[0].architecture].title  # a study has SAEs of one
    what = f"A {kind} sparse autoencoder" if len(records) == 1 else f"{kind} sparse autoencoders"
    return (
        f"{what} of a language model's activations, made by prunelens, which asks what pruning does"
        " to a model's features."
    )


def _loading(path: str, record: SaeRecord, sharing: Sharing) -> list[str]:
    """Three lines for each of the libraries; of several SAEs, for the first."""
    address, inside = sharing.address, f"{path}/" if path else ""
    where = f'snapshot_download("{address}") + "/{inside}{OWN}"'
    guess = "" if record.layer is not None else "  # layer: not known, put it here"
    lines = [
        "prunelens (raw activations in, latents and raw reconstructions out):",
        cards.code(
            "from huggingface_hub import snapshot_download",
            "from prunelens import PretrainedSaeConfig, load_given_sae",
            f"sae = load_given_sae(PretrainedSaeConfig(layer={record.layer or 0}, folder={where}))"
            + guess,
        ),
        "SAELens:",
        cards.code(
            "from sae_lens import SAE",
            f'sae = SAE.from_pretrained("{address}", "{inside}saelens")',
            "latents = sae.encode(activations)",
        ),
    ]
    if "sparsify" in formats_of(record.architecture):
        lines += [
            "sparsify:",
            cards.code(
                "from sparsify import Sae",
                f'sae = Sae.load_from_hub("{address}", hookpoint="{inside}sparsify")',
                "latents = sae.encode(activations)",
            ),
        ]
    return lines


def _normalisation(formats: Sequence[str]) -> str:
    folders = " and ".join(f"`{name}/`" for name in formats)
    return (
        "What is encoded is (x - mean) / deviation, per dimension, with a fixed mean and deviation"
        f" of activations that were trained on. `{OWN}/` keeps mean and deviation in"
        f" `normalisation.safetensors` and applies them itself; in {folders} they are folded into"
        f" the weights. {'All three' if len(formats) > 1 else 'Both'} take the model's raw"
        " activations and return raw reconstructions, and compute the same."
    )


def _sae_grid(saes: Mapping[str, SaeRecord]) -> str:
    columns = ["folder", "model", "layer", "site", "condition", "seed", "FVU", "FVU raw"]
    columns += ["FVU dense var", "L0", "alive", "latents", "k", "d_model", "steps"]
    columns += ["trained enough"]
    return cards.grid(columns, [_sae_row(path, record) for path, record in saes.items()])


def _sae_row(path: str, record: SaeRecord) -> list[str]:
    training, quality = record.training, record.quality
    alive = quality["alive"]
    return [
        path or ".",
        escaped(training.model.name) if training else UNKNOWN,
        UNKNOWN if record.layer is None else str(record.layer),
        record.site or UNKNOWN,
        _condition(training) if training else UNKNOWN,
        _seed(training) if training else UNKNOWN,
        *(cards.share(quality[name]) for name in ("fvu", "fvu_raw", "fvu_dense_var", "l0")),
        UNKNOWN if alive != alive else f"{alive:.0f}",
        str(record.num_latents),
        str(record.k),
        str(record.d_model),
        str(training.training.steps) if training else UNKNOWN,
        _YES_OR_NO[training.enough if training else None],
    ]


def _trainings(saes: Mapping[str, SaeRecord], sharing: Sharing) -> list[str]:
    """One table per way of training; where there are several, with the SAEs that it is of."""
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for path, record in saes.items():
        known = _training_rows(record.training, sharing) if record.training else {}
        groups.setdefault(tuple(known.items()), []).append(path or ".")
    parts = []
    for rows, paths in groups.items():
        if len(groups) > 1:
            parts.append(f"Of {', '.join(paths)}:")
        parts.append(cards.pairs(dict(rows)) if rows else _nothing_known(sharing.base_model))
    return parts


def _nothing_known(model: str | None) -> str:
    stated = f" Whoever exported it says that the model is {escaped(model)}." if model else ""
    return (
        "Not known: training text, precision, steps, seeds, pruning and masks. The SAE was exported"
        f" from outside the study that made it.{stated}"
    )


def _training_rows(training: TrainingRecord, sharing: Sharing) -> dict[str, str]:
    """What the SAEs of a study may have in common."""
    sae, corpus, kept = training.training, training.text.corpus, training.activations
    whose = {
        "own": "of the activations it was trained on",
        "dense": "of the dense model's activations",
    }
    screened = "no token is left out for its norm"
    if kept.max_norm_multiple is not None:
        screened = (
            "tokens whose norm in the dense model exceeds"
            f" {kept.max_norm_multiple:g} times its median are left out"
        )
    return {
        "dense model": model_in_words(training.model, sharing),
        "precision of the model": training.model.dtype,
        "training text": text_in_words(training.text),
        "tokens": f"{corpus.train_tokens} for training, {corpus.eval_tokens} held out, in windows"
        f" of {corpus.context_tokens} (BOS: {corpus.bos})",
        "tokens left out": f"the first {kept.skip_first} of each window; {screened}",
        "stored activations": kept.storage,
        "mean and deviation": f"{whose[kept.normalisation]}, from at most"
        f" {kept.statistics_tokens} training tokens",
        "steps": f"{sae.steps} of {sae.batch_tokens} tokens",
        "optimiser": f"Adam, rate {sae.learning_rate:g} falling to 0 as a cosine; products in"
        f" {sae.dtype}",
        "restarts of dead latents": f"every {sae.resample_interval} steps, not in the last quarter",
        "start": _STARTS[training.start],
        "libraries": escaped(", ".join(f"{k} {v}" for k, v in training.libraries.items())),
    }


def _verdicts(known: list[TrainingRecord]) -> str:
    """A run's SAEs are judged together."""
    if not known:
        return "Not known."
    runs = {training.run: training for training in known}
    rows = [
        [escaped(run), _YES_OR_NO[training.enough], escaped(training.enough_reason)]
        for run, training in runs.items()
    ]
    return cards.grid(["SAEs of the run", "trained enough", "why"], rows)


def _prunings(prunings: list[PruningRecord], known: list[TrainingRecord]) -> list[str]:
    if not known:
        return ["Not known."]
    if not prunings:
        return ["None: the model is the dense one."]
    parts = []
    for record in prunings:
        if len(prunings) > 1:
            parts.append(f"### {escaped(record.model.name)}, {record.pruning.label}")
        kinds = ", ".join(f"{escaped(kind)} {x:.4f}" for kind, x in record.by_kind().items())
        parts.append(
            cards.pairs({**recipe_rows(record), "sparsity achieved, by kind of matrix": kinds})
        )
    return parts


def _condition(training: TrainingRecord) -> str:
    return training.pruning.pruning.label if training.pruning else "dense"


def _seed(training: TrainingRecord) -> str:
    if training.init_seed == training.data_seed:
        return str(training.init_seed)
    return f"{training.init_seed} (data {training.data_seed})"
