"""Tokens whose norm is large in one condition alone, and SAEs without them."""

from __future__ import annotations

import pandas as pd
from safetensors.torch import load_file
from torch import Tensor

from prunelens.activations import Statistics
from prunelens.analyses.sinks import MOVED, NORM_MULTIPLE, only_compressed, quality_on
from prunelens.sae.architectures import load_sae
from prunelens.study.kind import Question, Table
from prunelens.study.questions.paired import eval_rows
from prunelens.study.work import Work, read_json


def _sinks(work: Work) -> None:
    """Tokens whose norm passes the limit after compression alone, and what they do to an SAE."""
    screening = read_json(work.parents["screening"] / "screening.json")
    median = screening["dense_median_norm"]
    limit = median * (work.config["max_norm_multiple"] or NORM_MULTIPLE)
    rows = []
    for split in ("train", "eval"):
        norms, dense = (
            load_file(work.parents[role] / f"{split}_norms.safetensors")["norms"]
            for role in ("activations", "dense")
        )
        kept = load_file(work.parents["screening"] / "kept.safetensors")[split]
        sinks = only_compressed(dense, norms, limit)[kept]
        row = {
            "split": split,
            "num_tokens": len(norms),
            "num_left_out": screening[f"{split}_left_out"],
            "num_sinks": int(sinks.sum()),
            "largest_norm": float(norms[kept].max()) / median,
        }
        rows.append(row if split == "train" else row | _with_and_without(work, kept[~sinks]))
    pd.DataFrame(rows).to_parquet(work.out / "sinks.parquet")


def _with_and_without(work: Work, others: Tensor) -> dict[str, float]:
    """MOVED on eval, and `…_without`: on its rows `others` alone."""
    folders = work.saes("sae").values()
    known = pd.DataFrame([read_json(folder / "quality.json") for folder in folders])
    spread = read_json(work.parents["statistics"] / "variance.json")
    found = {name: spread.get(name, known.get(name, pd.Series()).mean()) for name in MOVED}
    kept = load_file(work.parents["screening"] / "kept.safetensors")["eval"]
    if len(others) < len(kept):
        normal = Statistics.load(work.parents["statistics"] / "statistics.safetensors")
        dense, condition = eval_rows(work, ("dense", "activations"), others, normal)
        saes = [load_sae(folder).to(work.device) for folder in folders]
        without = quality_on(saes, dense, condition)
    else:
        without = found
    return {**found, **{f"{name}_without": value for name, value in without.items()}}


SINKS = Question(
    "sinks",
    1,
    _sinks,
    config=lambda run: run.largest_norm(),
    parents=lambda run: {
        "activations": run.activations,
        "dense": run.dense.activations,
        "screening": run.dense.screening,
        "statistics": run.statistics,
        **run.readers(),
    },
    tables=(
        Table(
            "sinks",
            "run, split",
            "tokens that no condition counts, and sinks of one condition alone",
            "sinks.parquet",
            """
            split: `train` or `eval`.
            num_tokens: Tokens of the split.
            num_left_out: Those beyond the limit in the **dense** model, left out everywhere.
            num_sinks: Of the others, those that pass the same limit in this condition alone.
            largest_norm: Of the others, the largest norm in this condition, in dense medians.
            participation_ratio: As in `sae_quality.csv`; in rows `eval` alone.
            participation_ratio_without: `participation_ratio` without those sinks.
            fvu: As in `sae_quality.csv`, mean over the run's own SAEs; in rows `eval` alone.
            fvu_without: `fvu` without those sinks.
            fvu_dense_var: As `fvu`, raw error over the *dense* variance.
            fvu_dense_var_without: `fvu_dense_var` without those sinks.""",
        ),
    ),
)
