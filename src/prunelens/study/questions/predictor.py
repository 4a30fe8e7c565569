"""Can the fate of a latent be told before pruning? Asked of all runs at once."""

from __future__ import annotations

import pandas as pd

from prunelens.analyses.predictor import fit_predictor
from prunelens.study.kind import StageKind
from prunelens.study.work import Work, write_json


def _predictor(work: Work) -> None:
    parts = []
    for name, folder in work.parents.items():
        facts = work.config["runs"][name]
        rows = pd.read_parquet(folder / "fates.parquet")
        rows = rows[rows["alive"]]
        parts.append(rows.assign(**facts, condition=name))
    found = fit_predictor(pd.concat(parts, ignore_index=True), work.config["taus"])
    found.table.to_parquet(work.out / "predictor.parquet")
    found.calibration.to_parquet(work.out / "calibration.parquet")
    write_json(work.out / "models.json", found.models)


PREDICTOR = StageKind("predictor", 2, _predictor)
