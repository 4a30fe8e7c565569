"""Results of a study -> the CSV tables and `latents.parquet` (the output contract).

Columns are stable; docs/tables.md says what each means.
"""

from __future__ import annotations

import pathlib

import pandas as pd

from prunelens.csv_table import as_csv
from prunelens.study.kind import CONDITION
from prunelens.study.results import table_columns
from prunelens.temporary import replacing


def write_tables(results: dict[str, pd.DataFrame], out: pathlib.Path) -> dict[str, pd.DataFrame]:
    """Write `tables/*.csv` and `latents.parquet`; returns the tables as written, by name.

    A table without results is not written, and one from an earlier run is removed.
    """
    (out / "tables").mkdir(parents=True, exist_ok=True)
    tables = {}
    for name, columns in table_columns().items():
        path = out / "tables" / f"{name}.csv"
        if name in results:
            tables[name] = results[name].reindex(columns=columns)
            write_if_changed(path, as_csv(tables[name]).encode())
        else:
            path.unlink(missing_ok=True)
    if "latents" in results:
        leading = [*CONDITION, "scope", "pattern"]
        rest = [name for name in results["latents"] if name not in leading]
        with replacing(out / "latents.parquet") as file:
            results["latents"][[*leading, *rest]].to_parquet(file, index=False)
    return tables


def write_if_changed(path: pathlib.Path, content: bytes) -> None:
    """Replace a file whole; one that has that content is not touched, so its time is its age."""
    if path.is_file() and path.read_bytes() == content:
        return
    with replacing(path) as file:
        file.write_bytes(content)
