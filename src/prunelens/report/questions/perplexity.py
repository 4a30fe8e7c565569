"""The models themselves on the page."""

from __future__ import annotations

from prunelens.report.questions.section import Section

PERPLEXITY = Section(
    "perplexity",
    "The models themselves",
    "How much did each pruning hurt the model as a whole?",
    "Perplexity on windows of 256 tokens, where most tokens have little context.",
    "Perplexity on the longest windows, as the pruning literature measures it.",
    tables={"table1_perplexity": "Table 1: perplexity"},
    assumed={
        "table1_perplexity": (
            "Left open by the paper: whether windows open with the BOS (its dense numbers of Gemma"
            " look as if they did not), and whether global magnitude takes weights of"
            " the output head, with the embedding that is tied to it (runs named -head) or not."
        )
    },
    needs=("perplexity",),
    moved_by_sinks=False,
)
