"""Concept probes: how well is each concept read, before pruning and after?

The one answer that needs no dictionary. Labels say which tokens have a concept; a
logistic probe is fitted on dense activations and read on pruned ones, and fitted again there. The
latents of the dense SAE that tell a concept best are read alike. Beside the pruned activations
stand noise of equal size and the null. `concept_fates` says what became of each concept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prunelens.analyses.noise import CommonChange, NullRows, Rows
from prunelens.analyses.statistics import jackknifed, pooled_auc
from prunelens.columns import meanings_of
from prunelens.concepts import Labels
from prunelens.sae.buffers import Buffers
from prunelens.sae.sparse import SparseEncoder
from prunelens.spread import spread_over_documents

SOURCES = ("dense", "pruned", "noise_shuffled", "null")
READERS = {"latent": 1, "latents_5": 5}  # beside the probe, which reads all activations
FEWEST = 10  # tokens with the concept in either half below which nothing is said
FEWEST_GROUPS = 5  # of documents that have it in the second half
PENALTY = 0.01  # C of scikit-learn: little, for thousands of dimensions are fitted to 1,000 tokens
NOISE_SEED = 500_003  # beside the null's and those of persistence's controls
BATCH_TOKENS = 4096
COLUMNS = """
concept
frequency
reader: `probe`, or `latent`, `latents_5`: the one or five that tell it best.
seed: Of these latents' dense SAE; empty for the probe.
source: `dense`, or as in `concepts.csv`.
fit: `dense`: fitted on dense activations; `refit`: on the source's own.
auc: AUC on the second half of eval.
auc_low auc_high
balanced_accuracy: Mean of the shares of either class told right.
balanced_accuracy_low balanced_accuracy_high
num_positive: Tokens with the concept that it is measured on, and as many without.
num_documents: Groups of documents.
reason: Why there is nothing.
"""


class Halves(NamedTuple):
    """The labelled tokens, and their documents."""

    first: Int[np.ndarray, " tokens"]
    """Rows that everything is fitted on."""
    second: Int[np.ndarray, " tokens"]
    """Rows that everything is measured on; of other documents."""
    documents: Int[np.ndarray, " rows"]
    """Of every row."""
    groups: Int[np.ndarray, " rows"]
    """Of every row of `second` its group of documents; of others anything."""


def sources(
    dense: Rows, pruned: Rows, change: CommonChange, tokens: Int[Tensor, " tokens"]
) -> dict[str, Rows]:
    """What probes read, by SOURCES; the null is drawn as that of the other questions."""
    return {
        "dense": dense,
        "pruned": pruned,
        "noise_shuffled": NullRows(dense, pruned, change, tokens, seed=NOISE_SEED),
        "null": NullRows(dense, pruned, change, tokens),
    }


class Probed(NamedTuple):
    """What was found."""

    readings: pd.DataFrame
    """COLUMNS, and auc_without: an array, the AUC without each group of documents; NaN of one in
    which no token was drawn."""
    best: pd.DataFrame
    """concept, seed, latent, apart: the five latents whose means with and without a concept are
    furthest apart, in deviations."""


@torch.no_grad()
def probes(
    read: Mapping[str, Rows],
    saes: Mapping[int, SparseEncoder],
    labels: Labels,
    halves: Halves,
    *,
    most: int,
    progress: Callable[[float], None] | None = None,
) -> Probed:
    """How well every concept is read, from every source, by the probe and by single latents.

    The probe is a logistic regression with a ridge (C = PENALTY), fitted on dense activations of
    the first half (fit `dense`) and again on each source's own (`refit`). Of the latents those are
    taken whose means on dense tokens with and without the concept are furthest apart, in
    deviations; one or five of them enter a logistic regression. All are fitted on as many tokens
    with the concept as without, drawn over documents, and measured on such a draw of the second
    half.

    Args:
        read: by SOURCES, the dense one first: what is fitted on it reads the others.
        saes: seed -> dense SAE, of the space of `read`.
        labels: of every row.
        most: tokens with a concept in either half.
    Returns: a row per concept, reader, seed (NaN for the probe), source and fit. AUC and balanced
        accuracy (at a probability of one half) with 95 % intervals over documents, what was fitted
        being held fixed. NaN with a reason where a concept has fewer than FEWEST tokens in either
        half, or documents.
    Source: the choice of latents is that of sparse probing (Gurnee et al. 2023).
    """
    draws = {
        name: _draw(has, halves, most, seed=number)
        for number, (name, has) in enumerate(zip(labels.names, labels.has, strict=True))
    }
    drawn = {name: draw for name, draw in draws.items() if isinstance(draw, _Draw)}
    tokens = np.unique(np.concatenate([np.empty(0, int), *(draw.all for draw in drawn.values())]))
    found: list[dict[str, Any]] = [
        {"concept": name, "reason": why} for name, why in draws.items() if isinstance(why, str)
    ]
    probe: dict[tuple[str, ...], _Reader] = {}
    by_seed: dict[int, dict[tuple[str, ...], _Reader]] = {seed: {} for seed in saes}
    total, done = len(read) * (1 + len(saes)), itertools.count(1)
    for source, rows in read.items():
        found += [row | {"source": source} for row in _by_probe(rows, drawn, probe)]
        if progress:
            progress(next(done) / total)
        for seed, sae in saes.items() if drawn else ():
            latents, which = _Latents(sae, rows, tokens), {"source": source, "seed": seed}
            found += [row | which for row in _by_latents(latents, drawn, by_seed[seed])]
            if progress:
                progress(next(done) / total)
    table = pd.DataFrame(found).reindex(columns=[*meanings_of(COLUMNS), "auc_without"])
    frequency = dict(zip(labels.names, labels.has[:, labels.known].mean(1), strict=True))
    table["frequency"] = table["concept"].map(frequency)
    return Probed(table, _best(by_seed))


def _best(by_seed: Mapping[int, Mapping[tuple[str, ...], _Reader]]) -> pd.DataFrame:
    """The latents of the readers of every seed."""
    rows = [
        (name, seed, int(latent), float(apart))
        for seed, readers in by_seed.items()
        for (name, reader), each in readers.items()
        if reader == "latents_5"
        for latent, apart in zip(each.columns, each.apart, strict=True)
    ]
    return pd.DataFrame(rows, columns=["concept", "seed", "latent", "apart"])


class _Draw(NamedTuple):
    """The tokens by which one concept is judged."""

    fit: Int[np.ndarray, " tokens"]
    fit_y: Bool[np.ndarray, " tokens"]
    """Which of them have it."""
    read: Int[np.ndarray, " tokens"]
    read_y: Bool[np.ndarray, " tokens"]
    groups: Int[np.ndarray, " tokens"]
    """Of documents, of `read`."""
    num_groups: int
    """Of all documents; some may have none of these tokens."""

    @property
    def all(self) -> Int[np.ndarray, " tokens"]:
        """Both."""
        return np.concatenate([self.fit, self.read])


class _Reader(NamedTuple):
    """A logistic regression on some columns."""

    columns: Int[np.ndarray, " columns"]
    weights: Float[np.ndarray, " columns"]
    intercept: float
    apart: Float[np.ndarray, " columns"]
    """Of latents: means with and without the concept, in deviations."""


def _draw(has: Bool[np.ndarray, " rows"], halves: Halves, most: int, *, seed: int) -> _Draw | str:
    """As many tokens with the concept as without, or why there are too few."""
    parts = []
    for rows in (halves.first, halves.second):
        chosen = [rows[has[rows]], rows[~has[rows]]]
        if (count := min(*map(len, chosen), most)) < FEWEST:
            return f"fewer than {FEWEST} tokens with it, or without, in a half of the text"
        drawn = []
        for each in chosen:
            order = spread_over_documents(torch.from_numpy(halves.documents[each]), seed=seed)
            drawn.append(each[order[:count].numpy()])
        parts.append((np.concatenate(drawn), np.arange(2 * count) < count))
    (fit, fit_y), (read, read_y) = parts
    groups = halves.groups[read]
    if len(np.unique(groups[read_y])) < FEWEST_GROUPS:
        return f"fewer than {FEWEST_GROUPS} groups of documents with it"
    return _Draw(fit, fit_y, read, read_y, groups, int(halves.groups[halves.second].max()) + 1)


def _by_probe(
    rows: Rows, drawn: Mapping[str, _Draw], dense: dict[tuple[str, ...], _Reader]
) -> Iterator[dict[str, Any]]:
    """Readings of every concept by the probe of `dense`, and by the one that is fitted here.

    Where `dense` has none, the one that is fitted here becomes it.
    """
    for name, draw in drawn.items():
        fit, read = (_rows(rows, tokens) for tokens in (draw.fit, draw.read))
        own = _fitted(fit, draw.fit_y, np.arange(fit.shape[1]), PENALTY)
        fits = {"dense": dense.setdefault((name,), own), "refit": own}
        for kind, probe in fits.items():
            if kind == "dense" or probe is not fits["dense"]:
                row = {"concept": name, "reader": "probe", "fit": kind}
                yield row | _measured(draw, read, probe)


def _by_latents(
    latents: _Latents, drawn: Mapping[str, _Draw], dense: dict[tuple[str, ...], _Reader]
) -> Iterator[dict[str, Any]]:
    """Readings of every concept by the latents of `dense`; where it has none, by the best here."""
    for (name, draw), (reader, count) in itertools.product(drawn.items(), READERS.items()):
        if (name, reader) not in dense:
            dense[name, reader] = latents.best(draw, count)
        row = {"concept": name, "reader": reader, "fit": "dense"}
        yield row | latents.measured(draw, dense[name, reader])


def _rows(rows: Rows, tokens: Int[np.ndarray, " tokens"]) -> Float[np.ndarray, "tokens d_model"]:
    return rows.rows(torch.from_numpy(tokens)).cpu().numpy()


class _Latents:
    """Latents of one SAE on one source, of the tokens that are drawn for some concept."""

    def __init__(self, sae: SparseEncoder, rows: Rows, tokens: Int[np.ndarray, " tokens"]) -> None:
        from scipy.sparse import csr_array, vstack

        buffers, parts = Buffers(), []
        for batch in torch.from_numpy(tokens).split(BATCH_TOKENS):
            found = sae.encode_sparse(rows.rows(batch), buffers=buffers)
            values, indices = (part.cpu().numpy().copy() for part in found)
            ends = np.arange(len(batch) + 1) * values.shape[1]
            entries = (values.ravel(), indices.ravel(), ends)
            parts.append(csr_array(entries, (len(batch), sae.num_latents)))
        self._latents, self._tokens = vstack(parts, format="csr"), tokens

    def best(self, draw: _Draw, count: int) -> _Reader:
        """The latents that tell a concept best, and a regression on them."""
        x, y = self._of(draw.fit), draw.fit_y
        means = [np.asarray(x[rows].mean(0)).ravel() for rows in (y, ~y)]
        squares = np.asarray(x.multiply(x).mean(0)).ravel()
        deviation = np.sqrt(np.maximum(squares - np.mean(means, axis=0) ** 2, 0))
        with np.errstate(invalid="ignore", divide="ignore"):
            apart = np.where(deviation > 0, np.abs(means[0] - means[1]) / deviation, 0.0)
        columns = np.argsort(-apart, kind="stable")[:count]
        return _fitted(x[:, columns].toarray(), y, columns, 1.0)._replace(apart=apart[columns])

    def measured(self, draw: _Draw, reader: _Reader) -> dict[str, Any]:
        """How well they tell it."""
        return _measured(draw, self._of(draw.read)[:, reader.columns].toarray(), reader)

    def _of(self, tokens: Int[np.ndarray, " tokens"]) -> Any:
        return self._latents[np.searchsorted(self._tokens, tokens)]


def _fitted(
    x: Float[np.ndarray, "tokens columns"],
    y: Bool[np.ndarray, " tokens"],
    columns: Int[np.ndarray, " columns"],
    penalty: float,
) -> _Reader:
    import sklearn
    from sklearn.linear_model import LogisticRegression

    scale = x.std(0)
    scale = np.where(scale > 0, scale, 1.0)
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        # Hundreds of small fits: looking at their arguments takes as long as fitting them.
        model = LogisticRegression(C=penalty, max_iter=1000).fit(x / scale, y)
    unknown = np.full(len(columns), np.nan)
    return _Reader(columns, model.coef_[0] / scale, float(model.intercept_[0]), unknown)


def _measured(
    draw: _Draw, x: Float[np.ndarray, "tokens columns"], reader: _Reader
) -> dict[str, Any]:
    """AUC and balanced accuracy, with intervals, and the AUC without each group of documents."""
    scores = (x @ reader.weights + reader.intercept).astype(float)
    y, groups = draw.read_y, np.unique(draw.groups, return_inverse=True)[1]
    auc = pooled_auc(y, scores, groups)
    count = int(groups.max()) + 1
    right = [_share_without(scores[rows] > 0, groups[rows], count) for rows in (y, ~y)]
    row: dict[str, Any] = {"num_positive": int(y.sum()), "num_documents": count}
    for name, found in (("auc", auc), ("balanced_accuracy", (right[0] + 1 - right[1]) / 2)):
        estimate = jackknifed(float(found[0]), found[1:], "documents", scale="logit")
        row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    without = np.full(draw.num_groups, np.nan)
    without[np.unique(draw.groups)] = auc[1:]
    return row | {"auc_without": without}


def _share_without(
    said: Bool[np.ndarray, " tokens"], groups: Int[np.ndarray, " tokens"], num_groups: int
) -> Float[np.ndarray, " replicates"]:
    """The share of tokens of which it was said, and without each group."""
    yes, of = (np.bincount(part, minlength=num_groups) for part in (groups[said], groups))
    with np.errstate(invalid="ignore"):
        return np.append(yes.sum(), yes.sum() - yes) / np.append(of.sum(), of.sum() - of)
