"""Which tokens have which concepts: labels that need no dictionary.

A document's labels are spans of its characters, by concept; a token has the concepts in whose spans
its last character lies. `python_spans` finds those of Python's source, `labelled_documents` reads
others, `label_tokens` finds the labelled documents again among the tokens of a corpus.
"""

from __future__ import annotations

import ast
import functools
import io
import itertools
import json
import keyword
import pathlib
import tokenize
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from safetensors.numpy import load_file, save_file
from torch import Tensor

from prunelens.config import CorpusConfig
from prunelens.corpus import Tokenizer
from prunelens.errors import UserError
from prunelens.text import documents, labelled_rows, reader_of

Spans = Mapping[str, Sequence[tuple[int, int]]]
"""Concept -> first character and the one behind the last, of every place that has it."""
_KEY_TOKENS = 8  # in a row, by which a document is found again
_PARSED = (SyntaxError, ValueError, RecursionError, tokenize.TokenError)  # what no source raises
_PARTS: tuple[tuple[str, tuple[type[ast.AST], ...], str], ...] = (
    # concept, nodes, and the field of theirs that has it; "": all of it
    ("assertion", (ast.Assert,), ""),
    ("assignment target", (ast.Assign, ast.AugAssign, ast.AnnAssign), "target targets"),
    ("attribute access", (ast.Attribute,), ""),
    ("body of a class", (ast.ClassDef,), "body"),
    ("body of a function", (ast.FunctionDef, ast.AsyncFunctionDef), "body"),
    ("body of a loop", (ast.For, ast.While, ast.AsyncFor), "body"),
    ("body of an if", (ast.If,), "body"),
    ("body of else", (ast.If, ast.For, ast.While), "orelse"),
    ("body of finally", (ast.Try,), "finalbody"),
    ("body of try", (ast.Try,), "body"),
    ("body of with", (ast.With, ast.AsyncWith), "body"),
    ("called function", (ast.Call,), "func"),
    ("comparison", (ast.Compare,), ""),
    ("comprehension", (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp), ""),
    ("conditional expression", (ast.IfExp,), ""),
    ("condition", (ast.If, ast.While), "test"),
    ("decorator", (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef), "decorator_list"),
    ("default of a parameter", (ast.arguments,), "defaults kw_defaults"),
    ("dictionary literal", (ast.Dict,), ""),
    ("exception handler", (ast.ExceptHandler,), ""),
    ("f-string", (ast.JoinedStr,), ""),
    ("import", (ast.Import, ast.ImportFrom), ""),
    ("keyword argument", (ast.keyword,), ""),
    ("lambda", (ast.Lambda,), ""),
    ("list literal", (ast.List,), ""),
    ("parameter", (ast.arg,), ""),
    ("raise", (ast.Raise,), ""),
    ("returned value", (ast.Return,), "value"),
    ("subscript", (ast.Subscript,), "slice"),
    ("tuple", (ast.Tuple,), ""),
    ("yield", (ast.Yield, ast.YieldFrom), ""),
)
_PARTS_OF = {
    kind: [(name, fields) for name, kinds, fields in _PARTS if kind in kinds]
    for kind in {kind for _, kinds, _ in _PARTS for kind in kinds}
}
_KEYWORDS = ("def", "for", "if", "import", "in", "is", "not", "return", "self")
_DEPTHS, _BRACKETS = (1, 2, 3, 4, 5), (1, 2, 3)
_OPEN, _CLOSED = "([{", ")]}"


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
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "probes.concepts: the model's tokenizer does not tell which characters a token stands"
            " for; leave 'probes' out of the questions"
        )
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


def labelled_documents(config: CorpusConfig, concepts: str) -> Iterator[LabelledText]:
    """The documents of a corpus with their labels.

    Args: concepts: `python`, or the field of its rows that holds them: `{concept: [[start, end],
        …]}` in characters, a list of `{start, end, label}`, or one value for the whole document.
    Raises: UserError as `corpus.documents`, and for labels of another form.
    """
    if concepts == "python":
        halves = reader_of(config).halves
        for _, text in halves()[1] if halves else documents(config):
            yield LabelledText(text, functools.partial(python_spans, text))
    else:
        for where, text, value in labelled_rows(config, concepts):
            yield LabelledText(text, functools.partial(_spans, value, concepts, text, where))


def python_spans(text: str) -> Spans | None:
    """The concepts of a module's source; None where Python does not parse it.

    What is inside an f-string is that string's, and no name or call.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the source says to whoever runs it
            tree = ast.parse(text)
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except _PARSED:
        return None
    lines = text.split("\n")
    begin = [0, *itertools.accumulate(len(line) + 1 for line in lines)]
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for name, (row, column), (last_row, last_column) in _lexical(tokens):
        found[name].append((begin[row - 1] + column, begin[last_row - 1] + last_column))

    def place(row: int, column: int) -> int:
        """Of a character, from its line and its byte in that."""
        line = lines[row - 1]
        if not line.isascii():
            column = len(line.encode()[:column].decode())
        return begin[row - 1] + column

    for name, first, last in _syntactic(tree):
        ends = place(last.end_lineno, last.end_col_offset)
        found[name].append((place(first.lineno, first.col_offset), ends))
    return found


def _lexical(
    tokens: Iterable[tokenize.TokenInfo],
) -> Iterator[tuple[str, tuple[int, int], tuple[int, int]]]:
    """Concepts of single tokens, with their first and last place."""
    depth = brackets = 0
    before = ""
    for token in tokens:
        kind, text = token.type, token.string
        depth += (kind == tokenize.INDENT) - (kind == tokenize.DEDENT)
        if kind in (tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE, tokenize.NL):
            continue
        if kind == tokenize.OP:
            brackets -= text in _CLOSED
        names = [f"indented {n} times or more" for n in _DEPTHS if depth >= n]
        names += [f"in {n} brackets or more" for n in _BRACKETS if brackets >= n]
        if kind == tokenize.OP:
            brackets += text in _OPEN
            names.append("bracket" if text in _OPEN + _CLOSED else "operator or comma")
        elif kind == tokenize.NAME:
            names += _of_name(text, before)
        elif kind in (tokenize.COMMENT, tokenize.NUMBER, tokenize.STRING):
            names.append(tokenize.tok_name[kind].lower())
        yield from ((name, token.start, token.end) for name in names)
        before = text


def _of_name(text: str, before: str) -> Iterator[str]:
    if text in _KEYWORDS:
        yield f"the word {text}"
    if keyword.iskeyword(text):
        yield "constant" if text in ("None", "True", "False") else "keyword"
        return
    yield "name"
    if before in ("def", "class"):
        yield "name being defined"
    if before == ".":
        yield "name of an attribute"
    if text.startswith("__") and text.endswith("__"):
        yield "dunder name"
    elif text.startswith("_"):
        yield "private name"
    if text.isupper() and len(text) > 1:
        yield "name in capitals"


def _syntactic(tree: ast.AST) -> Iterator[tuple[str, Any, Any]]:
    """Concepts of parts of the syntax tree, with their first and last node."""
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if not isinstance(node, ast.JoinedStr):
            nodes += ast.iter_child_nodes(node)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node, clean=False
        ):
            yield "docstring", node.body[0], node.body[0]
        if isinstance(node, ast.Call) and (inside := [*node.args, *node.keywords]):
            yield "argument of a call", inside[0], inside[-1]
        for name, fields in _PARTS_OF.get(type(node), ()):
            for part in _parts(node, fields):
                yield name, part[0], part[-1]


def _parts(node: ast.AST, fields: str) -> Iterator[list[ast.AST]]:
    """The node, or what is in its fields, where there is anything."""
    if not fields:
        yield [node]
    for field in fields.split():
        value = getattr(node, field, None)
        part = value if isinstance(value, list) else [value]
        if part := [each for each in part if each is not None]:
            yield part


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
