"""Where latents fire, dense and pruned, and which tokens they promote.

Our SAE of the first seed is among the parents; an SAE of others is named by the stage's source.
A pruned run also reads the dense SAE, at the places that the dense run chose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunelens.activations import Activations, Statistics
from prunelens.analyses.evidence import (
    SparseEncoder,
    TokenPlaces,
    collect_contexts,
    read_contexts,
)
from prunelens.analyses.noise import fit_common_change
from prunelens.analyses.persistence import persistence
from prunelens.analyses.token_effects import token_effects, unembedding
from prunelens.config import CheckpointConfig
from prunelens.model import LanguageModel
from prunelens.sae.architectures import load_sae
from prunelens.sae.exchange.pretrained import load_given_sae
from prunelens.study.artifacts.store import Stage
from prunelens.study.cost import Cost, Costed, sae_size
from prunelens.study.kind import Question
from prunelens.study.model_stages import EVAL, load_stage_model, load_windows
from prunelens.study.questions.paired import paired_activations
from prunelens.study.work import Work

if TYPE_CHECKING:
    from prunelens.study.layer_plan import LayerPlan

SEED = 0  # of the samples over activation ranges, and of persistence's noise


def _evidence(work: Work) -> None:
    if work.config["pretrained"] is None:
        _of_ours(work)
    else:
        _of_others(work)


def _of_ours(work: Work) -> None:
    """The run's own SAE on its own activations; in a pruned run first the dense SAE on them."""
    reads = [role for role in ("dense_sae", "sae") if role in work.parents]
    for number, role in enumerate(reads):
        folder = work.parents[role]
        sae = load_sae(folder).to(work.device)
        normalisation = Statistics.load(folder / "normalisation.safetensors")
        rows = _rows(work, "activations", normalisation)
        progress = work.share(len(reads) * rows.num_tokens, before=number * rows.num_tokens)
        if role == "dense_sae":
            _read_where_dense_fires(work, sae, rows, progress)
        else:
            directions = sae.decoder_weight.detach() * normalisation.sigma.to(work.device)
            _collect(work, sae, directions, rows, progress)


def _of_others(work: Work) -> None:
    """An SAE of others, which reads raw activations, and what persists of it under pruning.

    Raw is also the space in which the common change is fitted.
    """
    assert work.stage.source and work.stage.source.pretrained
    given = load_given_sae(work.stage.source.pretrained, device=work.device)
    rows = _rows(work, "activations", None)
    if "dense" not in work.parents:
        _collect(work, given, given.directions(), rows, work.share(rows.num_tokens))
        return
    dense, _, first, tokens, groups = paired_activations(
        work, "dense_activations", "activations", raw=True
    )
    total = rows.num_tokens + len(tokens)
    _read_where_dense_fires(work, given, rows, work.share(total))
    table = persistence(
        given,
        dense,
        rows,
        tokens,
        change=fit_common_change(dense, rows, first, **work.config["common_change"]),
        groups=groups,
        seed=SEED,
        progress=work.share(total, before=rows.num_tokens),
    )
    table.to_parquet(work.out / "persistence.parquet")


def _collect(
    work: Work,
    sae: SparseEncoder,
    directions: Tensor,
    rows: Activations,
    progress: Callable[[float], None],
) -> None:
    """The run's own contexts, firing rates, promoted tokens, and the text of all of them."""
    windows = load_windows(work, *EVAL)
    found = collect_contexts(
        sae,
        rows,
        _places(work),
        top=work.config["top"],
        samples=work.config["samples"],
        either_side=work.config["either_side"],
        seed=SEED,
        progress=progress,
    )
    found.contexts.to_parquet(work.out / "contexts.parquet")
    found.latents.to_parquet(work.out / "latents.parquet")
    lm = load_stage_model(work)  # a pruned one is no parent: pruning leaves the unembedding alone
    effects = token_effects(directions, *unembedding(lm), count=work.config["effects"])
    save_file(
        {k: v.contiguous() for k, v in effects._asdict().items()}, work.out / "effects.safetensors"
    )
    seen = torch.cat([windows.flatten(), effects.promoted.flatten(), effects.suppressed.flatten()])
    _texts(lm, seen.unique().tolist()).to_parquet(work.out / "tokens.parquet")
    if "dense" not in work.parents:
        save_file({"ids": windows.int()}, work.out / "text.safetensors")


def _read_where_dense_fires(
    work: Work, sae: SparseEncoder, rows: Activations, progress: Callable[[float], None]
) -> None:
    """The dense run's contexts under this condition."""
    contexts = pd.read_parquet(work.parents["dense"] / "contexts.parquet")
    read = read_contexts(
        sae,
        rows,
        _places(work),
        contexts,
        either_side=work.config["either_side"],
        progress=progress,
    )
    save_file({"activations": torch.from_numpy(read)}, work.out / "under_pruning.safetensors")


def _rows(work: Work, role: str, normalisation: Statistics | None) -> Activations:
    """All usable rows of eval, normalised or raw."""
    path = work.parents[role] / "eval.safetensors"
    return Activations(path, kept=_kept(work), statistics=normalisation, device=work.device)


def _kept(work: Work) -> Tensor:
    return load_file(work.parents["screening"] / "kept.safetensors")["eval"]


def _places(work: Work) -> TokenPlaces:
    context_tokens = load_windows(work, *EVAL).shape[1]
    skip = work.config["skip_first"]
    return TokenPlaces.of(_kept(work), context_tokens=context_tokens, skip_first=skip)


def _texts(lm: LanguageModel, ids: list[int]) -> pd.DataFrame:
    """Each token as it stands within a text, leading space included.

    Many tokenizers drop the space of a text's first token, so every token is decoded behind
    another. Without a tokenizer a token is its number.
    """
    if lm.tokenizer is None:
        return pd.DataFrame({"token_id": ids, "text": [f"<{i}>" for i in ids]})
    anchor = lm.tokenizer.encode("a", add_special_tokens=False)[-1:]
    before: str = lm.tokenizer.decode(anchor)
    texts = []
    for i in ids:
        text: str = lm.tokenizer.decode([*anchor, i])
        alone: str = lm.tokenizer.decode([i])
        texts.append(text.removeprefix(before) if text.startswith(before) else alone)
    return pd.DataFrame({"token_id": ids, "text": texts})


def _evidence_cost(costed: Costed) -> Cost:
    """Every SAE reads the eval split; each of its directions is held against the vocabulary."""
    d_model, num_latents, _ = sae_size(costed.shape, costed.study)
    effects = 2.0 * num_latents * d_model * costed.shape.vocabulary_size
    return Cost(costed.encoding(costed.eval_tokens * (1 + ("dense" in costed.parents))) + effects)


def _plan(run: LayerPlan) -> Mapping[str, Stage]:
    """Our SAE of the first seed, and each of others; what persists of the latter is measured under
    a common change of its own.
    """
    first = run.dense.seeds()[0]
    read = {"activations": run.activations, "screening": run.dense.screening}
    if isinstance(run.pruning, CheckpointConfig) and run.prune:
        read["prune"] = run.prune  # it may have an unembedding of its own
    stages = {}
    for given in (None, *run.model.pretrained(run.layer)):
        role = f"evidence {given.label}" if given else "evidence"
        parents = {**read, "dense": run.dense.answers[role] if run.pruning else None}
        if given is None:
            parents["sae"] = run.saes.get(first)
        if run.pruning:
            which = run.dense.activations if given else run.dense.saes[first]
            parents["dense_activations" if given else "dense_sae"] = which
        config = {
            "skip_first": run.study.activations.skip_first,
            **run.study.evidence.model_dump(mode="json"),
            "pretrained": run.model.content(given),
            "common_change": run.kind_of_change() if given and run.pruning else None,
        }
        stages[role] = run.with_model("evidence", config, parents, given)
    return stages


EVIDENCE = Question(
    "evidence",
    2,
    _evidence,
    cost=_evidence_cost,
    work_kind="SAE encoding",
    asked=("evidence",),
    plan=_plan,
)
