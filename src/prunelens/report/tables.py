"""Results of a study -> the CSV tables and `latents.parquet` (the output contract).

Columns are stable; docs/tables.md says what each means.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

import pandas as pd

from prunelens.csv_table import as_csv
from prunelens.study.kind import CONDITION
from prunelens.study.results import table_columns
from prunelens.temporary import replacing


def write_tables(results: dict[str, pd.DataFrame], out: pathlib.Path) -> dict[str, pd.DataFrame]:
    """Write `tables/*.csv` and `latents.parquet`; returns the tables as written, by name.

    A table without results is not written, and one from an earlier run is removed.
    """
    wanted = table_columns()
    tables = {n: results[n].reindex(columns=wanted[n]) for n in wanted if n in results}
    write_csvs(tables, wanted, out)
    if "latents" in results:
        leading = [*CONDITION, "scope", "pattern"]
        rest = [name for name in results["latents"] if name not in leading]
        with replacing(out / "latents.parquet") as file:
            results["latents"][[*leading, *rest]].to_parquet(file, index=False)
    return tables


def write_csvs(tables: dict[str, pd.DataFrame], names: Iterable[str], out: pathlib.Path) -> None:
    """Write `tables/<name>.csv` of each name that has a table; of the others remove it.

    A file is replaced whole; one that has that content is not touched, so its time is its age.
    """
    (out / "tables").mkdir(parents=True, exist_ok=True)
    for name in names:
        path = out / "tables" / f"{name}.csv"
        if name not in tables:
            path.unlink(missing_ok=True)
            continue
        content = as_csv(tables[name]).encode()
        if not path.is_file() or path.read_bytes() != content:
            with replacing(path) as file:
                file.write_bytes(content)
