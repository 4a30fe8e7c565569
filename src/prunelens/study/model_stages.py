"""Stages from text to activations: what is done with a language model and its tokens."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunelens.activations import (
    Activations,
    capture_sites,
    covariance,
    participation_ratio,
    statistics,
    usable_rows,
)
from prunelens.concepts import label_tokens, labelled_documents
from prunelens.config import ActivationConfig
from prunelens.corpus import TokenSplits, joined_stream, split_documents, split_tokens, windows
from prunelens.criteria import CRITERIA
from prunelens.finite import not_finite
from prunelens.model import LanguageModel, load_model, load_tokenizer
from prunelens.perplexity import measure_perplexity
from prunelens.prune.calibrate import input_norms
from prunelens.study.conditions import load_condition, make_condition
from prunelens.study.cost import Cost, Costed, forward_flops
from prunelens.study.kind import StageKind
from prunelens.study.work import Work, read_json, share_of_all, write_json

EVAL = ("eval_first", "eval_second")


def _corpus(work: Work) -> None:
    assert work.stage.source and work.stage.source.corpus
    tokenizer = load_tokenizer(work.stage.source.model)
    splits = split_tokens(work.stage.source.corpus, tokenizer)
    _save_splits(work, splits)


def _text(work: Work) -> None:
    assert work.stage.source and work.stage.source.corpus
    stream, bos = joined_stream(work.stage.source.corpus, load_tokenizer(work.stage.source.model))
    save_file({"stream": stream.contiguous()}, work.out / "stream.safetensors")
    write_json(work.out / "tokens.json", {"bos_token": bos})


def _labels(work: Work) -> None:
    """Of every row of an activation store of eval its concepts."""
    source, folder = work.stage.source, work.parents["corpus"]
    assert source and source.corpus
    splits, context = _load_splits(folder), read_json(folder / "tokens.json")["context_tokens"]
    stream = torch.cat([splits.eval_first, splits.eval_second])
    starts = [splits.eval_first_starts, splits.eval_second_starts + len(splits.eval_first)]
    labels = label_tokens(
        stream,
        torch.cat(starts),
        labelled_documents(source.corpus, work.config["concepts"]),
        load_tokenizer(source.model),
        bos_token=splits.bos_token,
    )
    has_bos = splits.bos_token is not None
    places = torch.arange(len(stream)).view(-1, context - has_bos)
    places = torch.nn.functional.pad(places, (int(has_bos), 0), value=-1)
    labels.at(places[:, work.config["skip_first"] :].flatten().numpy()).save(work.out)


def _calibration(work: Work) -> None:
    lm = load_stage_model(work)
    tokens = load_windows(work, "calibration")
    norms = input_norms(lm, tokens, progress=work.share(len(tokens)))
    save_file(
        {name: norm.cpu().contiguous() for name, norm in norms.items()},
        work.out / "norms.safetensors",
    )


def _prune(work: Work) -> None:
    make_condition(work, load_windows(work, "calibration") if "corpus" in work.parents else None)


def _perplexity(work: Work) -> None:
    lm = load_stage_model(work)
    folder = work.parents["text"]
    bos = read_json(folder / "tokens.json")["bos_token"]
    if (folder / "stream.safetensors").exists():
        stream = load_file(folder / "stream.safetensors")["stream"]
    else:
        splits = _load_splits(folder)
        stream = torch.cat([splits.eval_first, splits.eval_second])
    rows: dict[int, dict[str, Any]] = {}
    by_window = []
    limit = work.config["max_tokens"]
    tokens_each = min(len(stream), limit or len(stream))
    total = tokens_each * len(work.config["context_tokens"])
    for context in work.config["context_tokens"]:
        context = min(context, lm.max_context_tokens or context)
        if context not in rows:
            result = measure_perplexity(
                lm,
                stream,
                context_tokens=context,
                bos_token=bos,
                max_tokens=limit,
                progress=work.share(total, before=tokens_each * len(rows)),
            )
            if math.isnan(result.nll):  # no number to compare with, and a broken model
                broken = result.windows[result.window_nll.isnan()][:1]
                raise not_finite(lm, windows(stream, context, bos)[broken], "its logits")
            numbers = result._asdict()
            each = {"window": numbers.pop("windows"), "nll": numbers.pop("window_nll")}
            rows[context] = {**numbers, "bos": bos is not None}
            by_window.append(pd.DataFrame({"context_tokens": context, **each}))
    pd.DataFrame(rows.values()).to_parquet(work.out / "perplexity.parquet")
    pd.concat(by_window, ignore_index=True).to_parquet(work.out / "windows.parquet")


def _make_activations(works: Sequence[Work]) -> None:
    """The stores of several sites and layers, all else being equal, in one pass."""
    first = works[0]
    lm = load_stage_model(first)
    config = ActivationConfig(
        skip_first=first.config["skip_first"], storage=first.config["storage"]
    )
    splits = _load_splits(first.parents["corpus"])
    context = read_json(first.parents["corpus"] / "tokens.json")["context_tokens"]
    parts = {"train": [splits.train], "eval": [splits.eval_first, splits.eval_second]}
    batches = {
        name: torch.cat([windows(s, context, splits.bos_token) for s in streams])
        for name, streams in parts.items()
    }
    by_place = {(work.config["site"], work.config["layer"]): work for work in works}
    total, before = sum(batch.numel() for batch in batches.values()), 0
    for name, batch in batches.items():
        norms = capture_sites(
            lm,
            batch,
            {place: work.out / f"{name}.safetensors" for place, work in by_place.items()},
            config=config,
            progress=share_of_all(works, total, before=before),
        )
        before += batch.numel()
        for place, work in by_place.items():
            save_file({"norms": norms[place]}, work.out / f"{name}_norms.safetensors")
    per_window = context - config.skip_first
    first_half = len(windows(splits.eval_first, context, splits.bos_token)) * per_window
    documents = split_documents(splits, context, *EVAL).repeat_interleave(per_window).int()
    for work in works:
        write_json(work.out / "rows.json", {"eval_first_rows": first_half})
        save_file({"documents": documents}, work.out / "eval_documents.safetensors")


def _screening(work: Work) -> None:
    """Which rows count, from the dense model's norms; the same rows serve every condition."""
    folder = work.parents["activations"]
    norms = {
        name: load_file(folder / f"{name}_norms.safetensors")["norms"] for name in ("train", "eval")
    }
    median = float(norms["train"].median())
    kept = {
        name: usable_rows(part, median=median, multiple=work.config["max_norm_multiple"])
        for name, part in norms.items()
    }
    save_file(kept, work.out / "kept.safetensors")
    counts = {f"{name}_left_out": len(norms[name]) - len(kept[name]) for name in kept}
    write_json(work.out / "screening.json", {"dense_median_norm": median, **counts})


def _statistics(work: Work) -> None:
    """Mean and deviation of the training rows; the variance that FVU is measured against."""
    kept = load_file(work.parents["screening"] / "kept.safetensors")
    folder = work.parents["activations"]
    train = Activations(folder / "train.safetensors", kept=kept["train"])
    evaluation = Activations(folder / "eval.safetensors", kept=kept["eval"])
    found = statistics(train, num_tokens=work.config["statistics_tokens"])
    found.save(work.out / "statistics.safetensors")
    spread = covariance(evaluation)
    write_json(
        work.out / "variance.json",
        {
            "eval_total_variance": float(spread.trace()) * evaluation.num_tokens,
            "participation_ratio": participation_ratio(spread),
        },
    )


# --- what they cost -----------------------------------------------------------------------------


def _calibration_cost(costed: Costed) -> Cost:
    tokens = costed.study.corpus.calibration_tokens
    return Cost(costed.forward(tokens), tokens)


def _prune_cost(costed: Costed) -> Cost:
    """With sequential calibration every block runs twice: unpruned for its inputs, then pruned.

    Products of inputs take about as much as a pass: a matrix's inputs are about as many as its
    outputs, and it has products where they have weights.
    """
    pruning, shape = costed.config.get("pruning"), costed.shape
    criterion = CRITERIA[pruning["criterion"] if pruning else "magnitude"]  # or a comparison
    if pruning is None or pruning["calibration"] != "sequential":
        head = bool(pruning and pruning.get("lm_head")) * shape.d_model * shape.vocabulary_size
        return Cost(criterion.work * (shape.linear_weights + head))
    once = _calibration_cost(costed)
    products = once.flops if criterion.needs == "products" else 0.0
    return Cost(2 * once.flops + products, 2 * once.forward_tokens)


def _perplexity_cost(costed: Costed) -> Cost:
    """A text of its own is taken to be as long as the eval split."""
    tokens = costed.config["max_tokens"] or costed.eval_tokens
    longest = costed.shape.max_context_tokens
    contexts = {min(c, longest) if longest else c for c in costed.config["context_tokens"]}
    flops = sum(forward_flops(costed.shape, tokens, context_tokens=c, head=True) for c in contexts)
    return Cost(flops, tokens * len(contexts))


def _activations_cost(costed: Costed) -> Cost:
    tokens = costed.study.corpus.train_tokens + costed.eval_tokens
    return Cost(costed.forward(tokens, blocks=costed.config["layer"] + 1), tokens)


MODEL_STAGES = (
    StageKind("corpus", 2, _corpus),
    StageKind("text", 1, _text),
    StageKind("labels", 1, _labels),
    StageKind("calibration", 2, _calibration, cost=_calibration_cost, work_kind="language model"),
    StageKind("prune", 2, _prune, cost=_prune_cost, work_kind="language model"),
    StageKind(
        "perplexity",
        3,
        _perplexity,
        cost=_perplexity_cost,
        work_kind="language model",
        has_logits=True,
    ),
    StageKind(
        "activations",
        1,
        make_together=_make_activations,
        cost=_activations_cost,
        work_kind="language model",
    ),
    StageKind("screening", 1, _screening),
    StageKind("statistics", 2, _statistics),
)


# --- reading parents ----------------------------------------------------------------------------


def load_stage_model(work: Work, *, pruned: bool = True) -> LanguageModel:
    """The stage's model on its device; with `pruned`, that of the parent `prune` if it has one."""
    if pruned and "prune" in work.parents:
        made_by = work.stage.parents["prune"].source
        assert made_by
        return load_condition(made_by, work.parents["prune"], device=work.device)
    assert work.stage.source
    return load_model(work.stage.source.model, device=work.device)


def _save_splits(work: Work, splits: TokenSplits) -> None:
    parts = splits._asdict()
    tensors = {name: part.contiguous() for name, part in parts.items() if isinstance(part, Tensor)}
    save_file(tensors, work.out / "splits.safetensors")
    context = work.config["corpus"]["context_tokens"]
    facts = {"bos_token": splits.bos_token, "context_tokens": context}
    write_json(work.out / "tokens.json", facts)


def _load_splits(folder: pathlib.Path) -> TokenSplits:
    bos = read_json(folder / "tokens.json")["bos_token"]
    return TokenSplits(**load_file(folder / "splits.safetensors"), bos_token=bos)


def load_windows(work: Work, *splits: str) -> Tensor:
    """The windows of some splits of the parent corpus, one after the other."""
    folder = work.parents["corpus"]
    found = _load_splits(folder)
    context = read_json(folder / "tokens.json")["context_tokens"]
    return torch.cat([windows(getattr(found, s), context, found.bos_token) for s in splits])


def load_window_documents(work: Work, *splits: str) -> Tensor:
    """The document of each window that `load_windows` gives; no number is in two splits."""
    folder = work.parents["corpus"]
    context = read_json(folder / "tokens.json")["context_tokens"]
    return split_documents(_load_splits(folder), context, *splits)
