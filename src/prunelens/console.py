"""Rich's console for text from outside, with nothing to obey, and durations in words."""

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


def in_words(seconds: float) -> str:
    """A duration as people say it: `40 s`, `12 min`, `3 h 20 min`, `2.5 days`, `397 days`."""
    if 0 < seconds < 1:
        return "under 1 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 2:
        return f"{60 * hours + minutes} min"
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days = seconds / 86_400
    return f"{days:.0f} days" if days >= 10 else f"{days:.1f} days"
