"""What commands share: options, settings, a study from what was typed."""

from __future__ import annotations

import pathlib
from typing import Annotated, Any, NamedTuple

import typer

from prunelens.config import PruningConfig, StudyConfig, study_from_data
from prunelens.criteria import CRITERIA
from prunelens.errors import UserError
from prunelens.study_file import with_settings

Study = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped study.")]
Out = Annotated[
    pathlib.Path | None, typer.Option("--out", help="The study's folder; default runs/<name>.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Replace a field: sae.steps=500. Repeatable.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Processes side by side; default: as cores and memory allow."),
]
Artifacts = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Where artifacts are: a folder, s3://bucket/prefix, gs://…; default: in --out.",
    ),
]
Remembered = Annotated[
    str | None,
    typer.Option(
        "--artifacts",
        metavar="ADDRESS",
        help="Where the study's artifacts are; default: where the study says.",
    ),
]
Track = Annotated[
    str | None, typer.Option(help="Also show it in tensorboard, wandb or trackio; default: off.")
]
Executor = Annotated[
    str, typer.Option(help="local, or ray for the nodes of a cluster (needs prunelens\\[ray]).")
]
Address = Annotated[
    str | None,
    typer.Option(help="Of the Ray cluster, e.g. 10.0.0.1:6379; default: one on this machine."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no summary.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Folder = Annotated[pathlib.Path, typer.Argument(metavar="DIR", help="A study's folder.")]
Site = Annotated[str, typer.Option(help="resid_post, mlp_out or attn_out")]
CRITERIA_OF_MODELS = {c.name: c for c in CRITERIA.values() if c.score}
Criterion = Annotated[str, typer.Option(help=" or ".join(CRITERIA_OF_MODELS))]
Scope = Annotated[str | None, typer.Option(help="global, matrix or row")]
Pattern = Annotated[str, typer.Option(help="unstructured, 2:4 or 4:8")]
RandomSeed = Annotated[int | None, typer.Option(min=0, help="of criterion random; default 0")]
Sparsity = Annotated[float, typer.Option(help="share of the weights to zero, 0 to 1")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16")]


class SingleStep(NamedTuple):
    """What a command outside a study is to do."""

    study: StudyConfig
    """Model, text and sizes."""
    pruning: PruningConfig
    """The one pruning."""


def single_step(
    model: str,
    dtype: str | None,
    criterion: str,
    scope: str | None,
    sparsity: float,
    calibration: str | None,
    settings: list[str] | None,
    layer: int | None = None,
    site: str = "resid_post",
    corpus: dict[str, Any] | None = None,
    pattern: str = "unstructured",
    random_seed: int | None = None,
    lm_head: bool = False,
) -> SingleStep:
    """One model and one pruning, checked as those of a study are."""
    if not 0 <= sparsity < 1:
        raise UserError(f"--sparsity: {sparsity} is outside [0, 1); give for example 0.5")
    if criterion not in CRITERIA_OF_MODELS:
        raise UserError(
            f"--criterion: {criterion!r} is none of {', '.join(CRITERIA_OF_MODELS)}; give one of"
            " them"
        )
    usual = CRITERIA_OF_MODELS[criterion].scopes[0] if pattern == "unstructured" else "row"
    layers = None if layer is None else [layer]
    models = {"name": model, "site": site, "dtype": dtype, "layers": layers}
    pruning = {
        "criterion": criterion,
        "scope": scope or usual,
        "pattern": pattern,
        "random_seed": random_seed,
        "lm_head": lm_head,
        "sparsities": [sparsity],
        "calibration": calibration,
    }
    data: dict[str, Any] = {
        name: [{field: value for field, value in given.items() if value is not None}]
        for name, given in (("models", models), ("prunings", pruning))
    } | {"corpus": dict(corpus or {})}
    study = study_from_data(with_settings(data, parsed(settings)))
    [pruned] = study.conditions()
    if not isinstance(pruned, PruningConfig):
        raise UserError("--set: prunings cannot name a checkpoint here; leave it out")
    return SingleStep(study, pruned)


def parsed(settings: list[str] | None) -> dict[str, str]:
    """`--set field=value` pairs."""
    pairs = {}
    for setting in settings or []:
        field, separator, value = setting.partition("=")
        if not separator or not field:
            raise UserError(f"--set: {setting!r} is not field=value, e.g. sae.steps=500")
        pairs[field] = value
    return pairs


def numbers(text: str | None) -> list[int] | None:
    """`3,17` as numbers."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--latents: {text!r} is no list of numbers; give for example 3,17,200"
        ) from None


def workers_to_simulate(text: str | None) -> list[int]:
    """`1,8,64` as numbers of workers; none where nothing is asked for."""
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) <= 10**6 for part in parts):
        raise UserError(f"--workers: {text!r} is no list of numbers of workers; give e.g. 1,8,64")
    return [int(part) for part in parts]
