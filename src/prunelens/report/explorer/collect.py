"""A finished study's artifacts -> what the explorer shows.

One view per model, layer and dictionary: our dense SAE of the first seed, and every SAE of others.
Nothing is measured here. What is missing is left out, and a warning says so.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import numpy as np
import pandas as pd

from prunelens.analyses.predictor import PERSISTENT
from prunelens.errors import UserError
from prunelens.match import TAU
from prunelens.report.explorer.columns import ARMS, columns_of, indices, numbers, told_columns
from prunelens.report.explorer.content import (
    DENSE,
    Condition,
    Contexts,
    Explorer,
    OwnLatents,
    View,
)
from prunelens.report.explorer.evidence_files import (
    Words,
    activations_under_pruning,
    contexts_of,
)
from prunelens.report.explorer.source import Source, sources
from prunelens.sae.exchange.neuronpedia import neuronpedia_id
from prunelens.study.artifacts.store import Store
from prunelens.study.matrix import Plan, Run
from prunelens.study.results import sparsity_of

log = logging.getLogger(__name__)

OWN_COLUMNS = ("firing_rate", "mean_activation", "init_retention", "causal_effect")
CONDITION_COLUMNS = (  # these first, in this order
    *("persistence", "relative_shuffled", "persistence_jaccard", "silenced", "scaling"),
    *(f"{name}_{arm}" for arm in ARMS for name in ("mutual", "cosine")),
    *("activation_correlation_shared_init", "activation_match_shared_init"),
    "causal_effect_pruned",
)
KEPT_MEANS = {
    "persistence": f"persistence above {PERSISTENT}; lost: at most that; neither where the"
    " latent fires too seldom to say.",
    "survival": "mutual nearest neighbour in the pruned SAE of the same start, at a cosine of"
    f" at least {TAU}; lost: not so; neither where the latent never fires.",
    "nothing": "nothing can be said, for the study asks neither persistence nor survival.",
}


def study_explorer(
    plan: Plan, store: Store, *, tell: Callable[[str], None] = lambda _: None
) -> Explorer:
    """Everything that the explorer shows of a study.

    Args:
        plan, store: as `study.folder.open_study` gives them.
        tell: told what is being read.
    Raises: UserError where the study did not ask for evidence, none of it is there, or an artifact
        is damaged.
    """
    if "evidence" not in plan.study.questions:
        raise UserError(
            "questions: 'evidence' is not among the study's, and the explorer is made from it; add"
            " it to questions and run the study again"
        )
    views: list[View] = []
    for source in sources(plan, store):
        if source.evidence(source.dense) is None:
            log.warning("%s: %s is missing; not shown", source.dense.name, source.role)
            continue
        tell(source.label)
        views.append(_view(source, f"v{len(views)}"))
    if not views:
        raise UserError(
            f"study {plan.study.name!r}: no run has evidence yet, and the explorer is made from it;"
            " run the study again (prunelens status says what is missing)"
        )
    return Explorer(plan.study.name, tuple(views))


def _view(source: Source, identifier: str) -> View:
    """One dictionary with every condition of which something is known."""
    folder = source.evidence(source.dense)
    assert folder is not None
    latents = source.latents(source.dense)
    readings = {f"c{number}": run for number, run in enumerate(source.pruned)}
    folders = [source.evidence(run) for run in source.pruned]
    words = Words.of([folder, *(each for each in folders if each)])
    contexts = contexts_of(folder, _either_side(source), DENSE)
    found = [_condition(source, run, c, latents, words) for c, run in readings.items()]
    for condition, run in readings.items():
        _add_activations(contexts, source, run, condition)
    if (effects := source.causal_effect()) is not None:
        latents["causal_effect"] = effects
    return View(
        identifier,
        source.label,
        source.dense.model,
        source.dense.layer,
        source.dictionary,
        num_latents=len(latents),
        tau=TAU,
        kept_means=KEPT_MEANS[source.kept_by],
        columns=columns_of(latents, OWN_COLUMNS),
        conditions=tuple(condition for condition in found if condition),
        contexts=contexts,
        effects=words.effects(folder),
        tokens=words.tokens(folder),
        neuronpedia=neuronpedia_id(source.given) if source.given else None,
    )


def _add_activations(contexts: Contexts, source: Source, run: Run, condition: str) -> None:
    """What the dense latents do in a pruned run, on the tokens where they fire in the dense one."""
    if (folder := source.evidence(run)) is None:
        log.warning("%s: %s is missing; no activations of it", run.name, source.role)
        return
    contexts.activations[condition] = activations_under_pruning(folder)
    assert len(contexts.activations[condition]) == len(contexts.latent)


def _condition(
    source: Source, run: Run, identifier: str, latents: pd.DataFrame, words: Words
) -> Condition | None:
    """A pruned run as it is seen from the view's dictionary; None where nothing is known of it."""
    fates = source.fates(run).reindex(latents.index)
    if source.evidence(run) is None and fates.shape[1] == 0:
        return None
    assert run.pruning
    own = _own(source, run, identifier, words)
    match = matched_back = None
    if own and "match_shared_init" in fates:
        match = indices(fates["match_shared_init"])
        matched_back = np.full(len(own.columns[0].values), -1, dtype=np.int32)
        matched = np.flatnonzero(_is_match(fates))
        matched_back[match[matched]] = matched
    return Condition(
        identifier,
        run.pruning.label,
        run.name,
        sparsity_of(run, source.store),
        columns=columns_of(fates, dict.fromkeys((*CONDITION_COLUMNS, *_others(fates)))),
        kept=_kept(source, fates, latents),
        match=match,
        matched_back=matched_back,
        own=own,
    )


def _others(fates: pd.DataFrame) -> list[str]:
    """What questions tell of latents beside CONDITION_COLUMNS; of those of an arm, any arm."""
    of_arm = rf"_({'|'.join(ARMS)})$"
    built_in = {re.sub(of_arm, "", name) for name in CONDITION_COLUMNS}
    told = set(told_columns()) - built_in
    return [key for key in fates if re.sub(of_arm, "", key) in told]


def _kept(source: Source, fates: pd.DataFrame, latents: pd.DataFrame) -> np.ndarray:
    if source.kept_by == "persistence" and "persistence" in fates:
        kept, known = fates["persistence"] > PERSISTENT, fates["persistence"].notna()
    elif source.kept_by == "survival" and "mutual_shared_init" in fates:
        kept, known = _is_match(fates), latents["firing_rate"] > 0
    else:
        return np.full(len(fates), np.nan, dtype=np.float32)
    return numbers(kept.astype(float).where(known))


def _is_match(fates: pd.DataFrame) -> pd.Series:
    return fates["mutual_shared_init"].eq(True) & (fates["cosine_shared_init"] >= TAU)


def _own(source: Source, run: Run, identifier: str, words: Words) -> OwnLatents | None:
    """The run's own dictionary, where it has one and its evidence is there."""
    folder = source.evidence(run)
    if folder is None or not (folder / "contexts.parquet").is_file():
        return None
    return OwnLatents(
        columns_of(source.latents(run), OWN_COLUMNS),
        contexts_of(folder, _either_side(source), identifier),
        words.effects(folder),
    )


def _either_side(source: Source) -> int:
    return source.plan.study.evidence.either_side
