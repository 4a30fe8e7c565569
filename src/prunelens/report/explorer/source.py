"""Where one view of the explorer comes from: the artifacts of a dense run and of its pruned ones.

What is not there (a question that is not asked, a run that failed) is None or has no columns.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

import pandas as pd

from prunelens.analyses.fates import persistence_by_latent
from prunelens.config import PretrainedSaeConfig
from prunelens.study.artifacts.store import Store
from prunelens.study.matrix import Plan, Run
from prunelens.study.parents import Sae
from prunelens.study.questions import QUESTIONS

EVIDENCE = "evidence"


def sources(plan: Plan, store: Store) -> Iterator[Source]:
    """One for each model, layer and dictionary that the study asks evidence of."""
    for dense in plan.runs:
        if dense.pruning is None:
            place = (dense.model, dense.layer)
            pruned = [r for r in plan.runs if r.pruning and (r.model, r.layer) == place]
            for role, stage in dense.stages.items():
                if stage.name == EVIDENCE:
                    yield Source(plan, store, dense, pruned, role)


class Source(NamedTuple):
    """Where one view comes from."""

    plan: Plan
    store: Store
    dense: Run
    pruned: list[Run]
    role: str
    """Of the stage: `evidence`, or `evidence <label>` for an SAE of others."""

    @property
    def dictionary(self) -> str:
        """`seed 0`, or the label of an SAE of others."""
        return self.given.label if self.given else f"seed {self.seed}"

    @property
    def label(self) -> str:
        """Model, layer and dictionary."""
        return f"{self.dense.model}, layer {self.dense.layer}, {self.dictionary}"

    @property
    def seed(self) -> int:
        """The first seed, whose SAEs are shown."""
        return self.plan.study.sae.seeds[0]

    @property
    def given(self) -> PretrainedSaeConfig | None:
        """The SAE of others that the view shows; None: one of ours."""
        source = self.dense.stages[self.role].source
        assert source
        return source.pretrained

    @property
    def kept_by(self) -> Literal["persistence", "survival", "nothing"]:
        """The question that tells kept latents from lost ones."""
        asked = self.plan.study.questions
        if self.given or "persistence" in asked:  # comes with the evidence of an SAE of others
            return "persistence"
        return "survival" if "survival" in asked else "nothing"

    def evidence(self, run: Run) -> pathlib.Path | None:
        """The folder of the run's evidence; None where it is not there."""
        return self._folder(run, self.role)

    def latents(self, run: Run) -> pd.DataFrame:
        """The run's own dictionary by latent, as in the study's latents.parquet."""
        sae = run.saes.get(Sae(self.seed, self.seed))
        folder = self.store.read(sae) if sae and not self.given else self.evidence(run)
        assert folder is not None
        return pd.read_parquet(folder / "latents.parquet").set_index("latent").sort_index()

    def fates(self, run: Run) -> pd.DataFrame:
        """What became of each latent of the dense dictionary, by latent.

        The columns of the study's latents.parquet, with causal_effect_pruned, of its match.
        """
        if self.given:
            table = self._table(run, self.role, "persistence.parquet")
            if table is None:
                return pd.DataFrame()
            return persistence_by_latent(table.assign(seed=self.seed), self.seed)
        seeds = self.plan.study.seeds_of(run.pruning)
        if self.seed not in seeds:  # this condition has SAEs of other seeds alone
            return pd.DataFrame()
        parts = [
            question.by_latent(table, self.seed, seeds)
            for question in QUESTIONS
            if question.by_latent and question.told
            if (table := self._table(run, question.name)) is not None
        ]
        fates = pd.concat(parts, axis=1) if parts else pd.DataFrame()
        effects = _mean_kl(self._table(run, "causal", f"kl_pruned_{self.seed}.parquet"))
        if effects is not None and "match_shared_init" in fates:
            of_match = effects.reindex(fates["match_shared_init"]).to_numpy()
            fates["causal_effect_pruned"] = of_match
        return fates

    def causal_effect(self) -> pd.Series | None:
        """Of each latent that some condition had ablated in the dense model, by latent.

        The places where a latent is ablated do not depend on the condition that asked for it.
        """
        file, runs = f"kl_dense_{self.seed}.parquet", () if self.given else self.pruned
        found = (_mean_kl(self._table(run, "causal", file)) for run in runs)
        known = [kl for kl in found if kl is not None]
        if not known:
            return None
        every = pd.concat(known)
        return every[~every.index.duplicated()]

    def _table(self, run: Run, role: str, file: str = "latents.parquet") -> pd.DataFrame | None:
        folder = self._folder(run, role)
        there = folder is not None and (folder / file).is_file()
        return pd.read_parquet(folder / file) if folder and there else None

    def _folder(self, run: Run, role: str) -> pathlib.Path | None:
        """The folder of one of the run's artifacts, once verified."""
        return self.store.found(run.stages.get(role))


def _mean_kl(kl: pd.DataFrame | None) -> pd.Series | None:
    """Mean over the places where a latent was ablated alone, by latent."""
    if kl is None:
        return None
    is_alone = (kl["kind"] == "latent") & (kl["protocol"] == "isolated")
    return kl[is_alone & (kl["contexts"] == "firing")].groupby("latent")["kl"].mean()
