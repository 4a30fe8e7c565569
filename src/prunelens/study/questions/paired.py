"""What several questions read: dense and pruned activations of the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor

from prunelens.activations import Activations, Statistics
from prunelens.analyses.noise import CommonChange
from prunelens.sae.architectures import load_sae
from prunelens.spread import document_groups
from prunelens.study.work import Work, read_json


class Paired(NamedTuple):
    """Dense and pruned activations of the same tokens, normalised with the same statistics."""

    dense: Activations
    pruned: Activations
    first: Tensor
    """Rows of the first half of the eval documents."""
    second: Tensor
    """Rows of the second half, on which everything is measured."""
    groups: Tensor
    """Of every row of `second` its group of documents."""


def paired_activations(
    work: Work, dense: str = "dense", pruned: str = "pruned", *, raw: bool = False
) -> Paired:
    """The activations of eval of two parents, with the dense statistics or raw."""
    kept, documents = load_documents(work, dense)
    known = None if raw else work.parents["statistics"] / "statistics.safetensors"
    statistics = Statistics.load(known) if known else None
    x, y = eval_rows(work, (dense, pruned), kept, statistics)
    second = second_half(work, kept, store=dense)
    first = torch.arange(len(kept) - len(second))
    return Paired(x, y, first, second, document_groups(documents[second]))


def load_documents(work: Work, store: str = "dense") -> tuple[Tensor, Tensor]:
    """Which rows of eval count, and the document of each of them."""
    kept = load_file(work.parents["screening"] / "kept.safetensors")["eval"]
    documents = load_file(work.parents[store] / "eval_documents.safetensors")["documents"]
    return kept, documents[kept]


def eval_rows(
    work: Work, roles: Sequence[str], kept: Tensor, statistics: Statistics | None
) -> list[Activations]:
    """The same rows of eval of several parents."""
    paths = [work.parents[role] / "eval.safetensors" for role in roles]
    return [Activations(p, kept=kept, statistics=statistics, device=work.device) for p in paths]


def load_common_change(work: Work) -> CommonChange:
    """What the parents say is common to all tokens."""
    return CommonChange.load(work.parents["common_change"] / "change.safetensors")


def by_dense_sae(
    work: Work,
    measure: Callable[..., pd.DataFrame],
    summarise: Callable[[pd.DataFrame], pd.DataFrame],
    file: str,
) -> None:
    """What each dense SAE reads in dense and pruned activations of the second half of eval."""
    dense, pruned, _, tokens, groups = paired_activations(work)
    change = load_common_change(work)
    folders = {sae.init_seed: folder for sae, folder in work.saes("sae").items()}
    total = len(tokens) * len(folders)
    latents, summaries = [], []
    for number, (seed, folder) in enumerate(folders.items()):
        sae = load_sae(folder).to(work.device)
        progress = work.share(total, before=number * len(tokens))
        table = measure(
            sae, dense, pruned, tokens, change=change, groups=groups, seed=seed, progress=progress
        )
        latents.append(table.assign(seed=seed))
        summaries.append(summarise(table).assign(seed=seed))
    pd.concat(latents, ignore_index=True).to_parquet(work.out / "latents.parquet")
    pd.concat(summaries, ignore_index=True).to_parquet(work.out / file)


def second_half(work: Work, kept: Tensor, *, store: str = "dense") -> Tensor:
    """Which of the rows that count are of the second half of the eval documents."""
    first_half = read_json(work.parents[store] / "rows.json")["eval_first_rows"]
    return (kept >= first_half).nonzero().squeeze(1)
