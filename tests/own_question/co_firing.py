"""Of the tokens on which a dense latent fires, the share on which it fires after pruning too."""

from __future__ import annotations

import pandas as pd
import torch

from prunelens.sae.topk import TopKSAE
from prunelens.study.cost import Cost, Costed
from prunelens.study.kind import Question, Table, Told
from prunelens.study.questions.paired import paired_activations
from prunelens.study.work import Work


def _co_firing(work: Work) -> None:
    both = paired_activations(work)
    found = []
    for which, folder in work.saes("sae").items():
        sae = TopKSAE.load(folder)
        before, after = (
            sae.dense_latents(sae.encode(rows.rows(both.second))) > 0
            for rows in (both.dense, both.pruned)
        )
        share = (before & after).sum(0) / before.sum(0)
        latents = {"seed": which.init_seed, "latent": torch.arange(len(share)), "share": share}
        found.append(pd.DataFrame(latents))
    table = pd.concat(found, ignore_index=True)
    table.to_parquet(work.out / "latents.parquet")
    means = table.groupby("seed")["share"].mean().rename("mean_share").reset_index()
    means.to_parquet(work.out / "means.parquet")


def _cost(costed: Costed) -> Cost:
    return Cost(costed.encoding(costed.eval_tokens * len(costed.saes("sae"))))


def _by_latent(table: pd.DataFrame, seed: int, _seeds: object) -> pd.DataFrame:
    own = table[table["seed"] == seed].set_index("latent")
    return own[["share"]].rename(columns={"share": "co_firing"})


CO_FIRING = Question(
    "co_firing",
    1,
    _co_firing,
    cost=_cost,
    work_kind="SAE encoding",
    asked=("co_firing",),
    of="pruned",
    parents=lambda run: run.paired(),
    tables=(
        Table(
            "co_firing",
            "pruned run, seed",
            "do latents fire where they fired",
            "means.parquet",
            """
            seed
            mean_share: Mean over latents of the share of its tokens on which each fires again.""",
        ),
    ),
    by_latent=_by_latent,
    told={"co_firing": Told("fires again", "Share of its dense tokens on which it still fires.")},
)
