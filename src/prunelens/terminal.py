"""The one place through which text reaches a terminal.

Names, tokens, paths and reasons come from models, texts and folders of others. A terminal obeys the
control characters in them: it moves, recolours or hides what is shown. Here they become visible.
"""

from __future__ import annotations

import re
import sys

_OBEYED = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 and C1 but tab and line feed
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that turn the direction of text
    r"\ud800-\udfff]"  # halves of a surrogate pair, which cannot be written at all
)


def inert(text: str) -> str:
    r"""The text with whatever a terminal would obey written out, as \x1b or \u202e."""
    return _OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)


def say(text: object, *, error: bool = False, flush: bool = False) -> None:
    """A line on standard output, or on standard error."""
    print(inert(str(text)), file=sys.stderr if error else sys.stdout, flush=flush)
