"""Rich's console for text from outside: tables, colours and progress, and nothing to obey."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import rich.console
from rich.segment import Segment
from rich.text import Text

from prunelens.terminal import inert


class Console(rich.console.Console):
    """Rich's console, which leaves escapes in what it is told to print."""

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """As Rich does; only its own control codes remain."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=inert(segment.text))

    def render_str(self, text: str, **how: Any) -> Text:
        """As Rich does; made inert before it is measured, so that nothing is cut."""
        return super().render_str(inert(text), **how)
