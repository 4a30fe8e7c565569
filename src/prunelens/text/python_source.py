"""The concepts of Python's source, as its own tokenizer and parser say them."""

from __future__ import annotations

import ast
import io
import itertools
import keyword
import tokenize
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Spans = Mapping[str, Sequence[tuple[int, int]]]
"""Concept -> first character and the one behind the last, of every place that has it."""
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
