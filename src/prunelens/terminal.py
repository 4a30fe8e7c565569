"""The one place through which text reaches a terminal.

Names, tokens, paths and reasons come from models, texts and folders of others. A terminal obeys the
control characters in them: it moves, recolours or hides what is shown. Here they become visible.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any

import rich.console
from rich.segment import Segment
from rich.text import Text

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


class Console(rich.console.Console):
    """Rich's console, which leaves escapes in what it is told to print."""

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """As Rich does; only its own control codes remain."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=inert(segment.text))

    def render_str(self, text: str, **how: Any) -> Text:
        """As Rich does; made inert before it is measured, so that nothing is cut."""
        return super().render_str(inert(text), **how)
