"""What the paper published (data/paper), to stand beside a user's numbers; its models' shapes."""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

FOLDER = pathlib.Path(__file__).parent / "data" / "paper"


def published(table: str) -> pd.DataFrame:
    """A table of the paper by the name of the study's table that it belongs beside.

    `model`, `method` and `sparsity` are what a study's own tables hold for the same condition when
    its models carry the paper's short names, as in the shipped studies `paper-*`. Magnitude pruning
    is of scope `global` there, Wanda of scope `row`. See data/paper/README.md.

    Args:
        table: perplexity, sae_quality, stability, survival, transfer, fragility, predictor, causal,
            or matrix (the runs of Table A.1).
    """
    import pandas as pd

    path = FOLDER / f"{table}.csv"
    assert path.is_file(), f"{table!r} is none of {sorted(p.stem for p in FOLDER.glob('*.csv'))}"
    return pd.read_csv(path)


def shipped_shape(name: str) -> dict[str, Any] | None:
    """The fields of a hub model's config that fix its shape, as transformers names them.

    For the paper's three models, so that their studies can be planned without a hub; None for
    every other name.
    """
    return json.loads((FOLDER / "shapes.json").read_text(encoding="utf-8")).get(name)
