"""A finished study's folder as people hold it: DataFrames, and SAEs by condition and seed.

What takes seconds to import is imported by those who need it.
"""

from __future__ import annotations

import difflib
import os
import pathlib

import pandas as pd

from prunelens.activations import Statistics
from prunelens.config import StudyConfig
from prunelens.csv_table import as_written
from prunelens.errors import UserError
from prunelens.match import MatchRates, match_dictionaries, match_rates
from prunelens.sae.architectures import load_sae
from prunelens.sae.autoencoder import SparseAutoencoder

SaeName = str | os.PathLike[str]


class Study:
    """What a study has found; reads its folder alone, and only what is asked for.

    `prunelens.column_meanings()` says what the columns of its tables mean.
    Raises: UserError where the folder holds no study.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = pathlib.Path(folder)
        if not (self.folder / "study.yaml").is_file():
            raise UserError(f"study: {str(folder)!r} holds no study (no study.yaml); run one there")

    @property
    def runs(self) -> pd.DataFrame:
        """One row per model x layer x condition: whether it is done, and if not, why."""
        from prunelens.study.folder import read_runs

        return read_runs(self.folder)

    @property
    def answers(self) -> pd.DataFrame:
        """One row per pruned run: what became of model, features and dense SAE, in sentences."""
        return self.table("answers")

    @property
    def latents(self) -> pd.DataFrame:
        """One row per run, seed and latent: the values behind every summary."""
        path = self.folder / "latents.parquet"
        if not path.is_file():
            raise UserError(f"study: {str(self.folder)!r} has no latents.parquet; run the study")
        return pd.read_parquet(path)

    def table(self, name: str) -> pd.DataFrame:
        """`tables/<name>.csv`; empty cells are NaN, and the word null stays a word.

        Raises: UserError where there is none of that name.
        """
        path = self.folder / "tables" / f"{name}.csv"
        names = sorted(found.stem for found in path.parent.glob("*.csv"))
        if name not in names:
            raise UserError(f"table: {name!r} {_no_such(name, names)}")
        return pd.read_csv(path, keep_default_na=False, na_values=[""]).map(as_written)

    def saes(self) -> dict[str, pathlib.Path]:
        """Folders of the SAEs of all conditions, controls left out, by `CONDITION:SEED`.

        Where the study has several models or layers, a condition is its run's whole name.
        """
        table = self.table("sae_training")
        own = (table["training"] == "own") & ~table["rotated"].astype(bool)
        table = table[own & (table["init_seed"] == table["data_seed"])]
        several = table["run"].str.rpartition("/")[0].nunique() > 1
        names = table["run"] if several else table["run"].str.rpartition("/")[2]
        keys = names + ":" + table["init_seed"].astype(str)
        return {
            key: self.folder / folder for key, folder in zip(keys, table["folder"], strict=True)
        }

    def sae_folder(self, condition: str, seed: int | str = 0) -> pathlib.Path:
        """Where the SAE of a condition is.

        Raises: UserError where the study has none of that name, or its artifacts are elsewhere.
        """
        saes, name = self.saes(), f"{condition}:{seed}"
        if name not in saes:
            raise UserError(f"sae: {str(self.folder)!r}: {name!r} {_no_such(name, list(saes))}")
        if not saes[name].is_dir():
            raise UserError(f"sae: {str(saes[name])!r} is not there; give its folder, or run again")
        return saes[name]

    def sae(self, condition: str, seed: int = 0) -> SparseAutoencoder:
        """The SAE of a condition: `dense`, `wanda-row-0.50`, …; in normalised coordinates."""
        return load_sae(self.sae_folder(condition, seed))


def sae_place(name: SaeName) -> pathlib.Path:
    """The folder of an SAE, named by itself or as FOLDER:CONDITION:SEED (`runs/demo:dense:0`).

    Raises: UserError as `Study.sae_folder`.
    """
    folder, _, sae = str(name).partition(":")
    if pathlib.Path(name).is_dir() or not (pathlib.Path(folder) / "study.yaml").is_file():
        return pathlib.Path(name)
    condition, _, seed = sae.rpartition(":")
    return Study(folder).sae_folder(condition, seed)


def match_saes(sae_a: SaeName, sae_b: SaeName) -> list[MatchRates]:
    """Match rates of two SAEs at the default taus, in raw coordinates where both say theirs.

    Args:
        sae_a, sae_b: folders, or names as `sae_place` takes them.
    Raises: UserError where there is no SAE or the widths differ.
    """
    decoders = []
    for folder in map(sae_place, (sae_a, sae_b)):
        decoder = load_sae(folder).decoder_weight.detach()
        path = folder / "normalisation.safetensors"
        decoders.append(decoder * Statistics.load(path).sigma if path.exists() else decoder)
    a, b = decoders
    if a.shape[1] != b.shape[1]:
        raise UserError(
            f"SAE_B: {str(sae_b)!r} has d_model {b.shape[1]}, SAE_A has {a.shape[1]};"
            " match SAEs of the same width"
        )
    taus = StudyConfig().taus
    matches = match_dictionaries(a, b, lowest_tau=taus[0])
    return [match_rates(matches, tau) for tau in taus]


def _no_such(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return f"is none of the {len(known)} that are there{meant}"
