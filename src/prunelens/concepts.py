"""Which tokens have which concepts: labels that need no dictionary.

A document's labels are spans of its characters, by concept; a token has the concepts in whose spans
its last character lies. `labelled_documents` reads them, `label_tokens` finds the documents again
among the tokens of a corpus.
"""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from safetensors.numpy import load_file, save_file
from torch import Tensor

from prunelens.config import CorpusConfig
from prunelens.errors import UserError
from prunelens.text import documents, labelled_rows, reader_of
from prunelens.text.python_source import Spans, python_spans
from prunelens.tokens import Tokenizer

_KEY_TOKENS = 8  # in a row, by which a document is found again


class LabelledText(NamedTuple):
    """A document with its labels."""

    text: str
    spans: Callable[[], Spans | None]
    """Called where the document is wanted; None: it cannot be labelled."""


class Labels(NamedTuple):
    """The concepts of every token of some streams."""

    names: list[str]
    """Of the concepts, sorted."""
    has: Bool[np.ndarray, "concepts tokens"]
    """Where each is."""
    known: Bool[np.ndarray, " tokens"]
    """The tokens of labelled documents; of the others nothing is known."""

    def at(self, tokens: Int[np.ndarray, " some"]) -> Labels:
        """Those of some tokens; of -1 nothing is known."""
        there = tokens >= 0
        return Labels(self.names, self.has[:, tokens] & there, self.known[tokens] & there)

    def save(self, folder: pathlib.Path) -> None:
        """Write two files into `folder`."""
        (folder / "concepts.json").write_text(json.dumps(self.names), encoding="utf-8")
        has = np.ascontiguousarray(np.packbits(self.has, axis=1))  # others are written scrambled
        bits = {"has": has, "known": self.known.astype(np.uint8)}
        save_file(bits, folder / "labels.safetensors")

    @classmethod
    def load(cls, folder: pathlib.Path) -> Labels:
        """Read what `save` wrote."""
        names = json.loads((folder / "concepts.json").read_text(encoding="utf-8"))
        bits = load_file(folder / "labels.safetensors")
        count = len(bits["known"])
        has = np.unpackbits(bits["has"], axis=1, count=count).astype(bool)
        return cls(names, has.reshape(len(names), count), bits["known"].astype(bool))


def label_tokens(
    stream: Int[Tensor, " tokens"],
    starts: Int[Tensor, " documents"],
    labelled: Iterable[LabelledText],
    tokenizer: Tokenizer,
    *,
    bos_token: int | None,
) -> Labels:
    """The labels of a stream's tokens, whose documents are found again by their tokens.

    Args:
        stream, starts: as in `TokenSplits`; of a document there may be a part alone.
        labelled: documents, among them those of the stream. Read until all of those are found.
        tokenizer: that made the stream.
        bos_token: whose ids the stream lacks.
    Raises: UserError where the tokenizer does not tell which characters a token stands for, or no
        document is found.
    """
    refuse_without_places(tokenizer)
    ids, bounds = stream.int().numpy(), [*starts.tolist(), len(stream)]
    wanted: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
    for first, last in itertools.pairwise(bounds):
        wanted[_key(ids[first:last])].append((first, last))
    places: dict[str, list[np.ndarray]] = defaultdict(list)
    known = np.zeros(len(ids), dtype=bool)
    for text, spans in labelled:
        own, ends = _tokens(text, tokenizer, bos_token)
        found = list(_found(own, ids, wanted))
        told = spans() if found else None
        for first, last, begin in found if told is not None else ():
            known[first:last] = True
            for name, ranges in (told or {}).items():
                inside = _inside(ranges, ends[begin : begin + last - first], len(text))
                places[name].append(first + inside.nonzero()[0])
        if not wanted:
            break
    if not known.any():
        raise UserError(
            "probes.corpus: no document of eval is among those that are labelled; give the text"
            " that the study reads, with its labels"
        )
    names = sorted(places)
    has = np.zeros((len(names), len(ids)), dtype=bool)
    for row, name in zip(has, names, strict=True):
        row[np.concatenate(places[name])] = True
    return Labels(names, has, known)


def refuse_without_places(tokenizer: Tokenizer) -> None:
    """Raises UserError where a tokenizer does not tell which characters a token stands for."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "probes.concepts: the model's tokenizer does not tell which characters a token stands"
            " for; leave 'probes' out of the questions"
        )


def labelled_documents(config: CorpusConfig, concepts: str) -> Iterator[LabelledText]:
    """The documents of a corpus with their labels.

    Args: concepts: `python`, or the field of its rows that holds them: `{concept: [[start, end],
        …]}` in characters, a list of `{start, end, label}`, or one value for the whole document.
    Raises: UserError as `text.documents`, and for labels of another form.
    """
    if concepts == "python":
        halves = reader_of(config).halves
        for _, text in halves()[1] if halves else documents(config):
            yield LabelledText(text, functools.partial(python_spans, text))
    else:
        for where, text, value in labelled_rows(config, concepts):
            yield LabelledText(text, functools.partial(_spans, value, concepts, text, where))


def _key(ids: np.ndarray) -> bytes:
    return ids[:_KEY_TOKENS].tobytes()


def _tokens(
    text: str, tokenizer: Tokenizer, bos_token: int | None
) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, " tokens"]]:
    """A document's token ids as a stream has them, and where each one's last character is."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.array(encoded["input_ids"], dtype=np.int32)
    ends = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 1] - 1
    kept = slice(None) if bos_token is None else ids != bos_token
    return ids[kept], ends[kept].clip(min=0)


def _found(
    own: Int[np.ndarray, " tokens"],
    ids: Int[np.ndarray, " stream"],
    wanted: dict[bytes, list[tuple[int, int]]],
) -> Iterator[tuple[int, int, int]]:
    """The parts of the stream that this document has, which are wanted no longer; and where.

    Those of fewer tokens than the key has are found in no document that is longer.
    """
    raw, size = own.tobytes(), own.itemsize
    keys = {key for key in wanted if key in raw}  # quick: most documents have none
    for begin in range(len(own)) if keys else ():
        key = raw[size * begin : size * (begin + _KEY_TOKENS)]
        for first, last in list(wanted.get(key, ())) if key in keys else ():
            if np.array_equal(own[begin : begin + last - first], ids[first:last]):
                wanted[key].remove((first, last))
                if not wanted[key]:
                    del wanted[key]
                yield first, last, begin


def _inside(
    ranges: Sequence[tuple[int, int]], characters: Int[np.ndarray, " tokens"], length: int
) -> Bool[np.ndarray, " tokens"]:
    """Which characters are in one of the ranges, which may overlap."""
    firsts, lasts = (
        np.bincount(places, minlength=length + 1) for places in zip(*ranges, strict=True)
    )
    return (firsts - lasts).cumsum()[characters] > 0


def _spans(value: Any, concepts: str, text: str, where: str) -> Spans:
    """The labels of a row as spans."""
    if value is None:
        return {}
    if isinstance(value, str | int):
        return {f"{concepts} {value}"[:200]: [(0, len(text))]}
    try:
        if isinstance(value, Mapping):
            pairs = [(name, span) for name, spans in value.items() for span in spans or ()]
        else:
            pairs = [(each["label"], (each["start"], each["end"])) for each in value]
        found: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for name, (first, last) in pairs:
            if not 0 <= int(first) <= int(last) <= len(text):
                raise ValueError
            found[str(name)[:200]].append((int(first), int(last)))
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"probes.concepts: {concepts!r} of {where} holds no labels of {len(text)} characters;"
            ' write {"concept": [[start, end]]}, or one value for the whole text'
        ) from None
    return found
