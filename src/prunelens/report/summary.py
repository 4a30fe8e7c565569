"""What a study found: the answer first, then the paper's number and its control side by side."""

from __future__ import annotations

import pandas as pd
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from prunelens.console import Console
from prunelens.match import TAU
from prunelens.report.answer import ANSWERS
from prunelens.report.sinks import sinks_found
from prunelens.report.sufficiency import known_of_the_others, not_enough


def summary(tables: dict[str, pd.DataFrame], runs: pd.DataFrame) -> RenderableType:
    """The answer in sentences, then a study's tables, with what its numbers do and do not say."""
    warnings = [each.text for each in not_enough(tables)]
    warnings += [f"{found.run}: {found.text}" for found in sinks_found(tables)]
    parts: list[RenderableType] = [
        Padding(f"[bold]{escape(row.run)}[/] {escape(row.answer)}", (0, 0, 1, 0))
        for row in tables.get(ANSWERS, pd.DataFrame()).itertuples()
    ]
    parts += [f"[bold red]warning[/] {escape(text)}" for text in warnings]
    sites = runs["run"].str.rpartition("/")[0]
    parts += [
        _table(tables, site, list(part)) for site, part in runs["run"].groupby(sites, sort=False)
    ]
    parts += [f"  {line}" for line in _notes(tables)]
    if "claims" in tables:
        parts.append(_claims(tables["claims"]))
    failed = runs[runs["status"] == "failed"]
    parts += [
        f"[red]failed[/] {escape(row.run)}: {escape(row.reason)}" for row in failed.itertuples()
    ]
    return Group(*parts)


def print_summary(tables: dict[str, pd.DataFrame], runs: pd.DataFrame) -> None:
    """Print it to standard output."""
    Console(width=None if Console().is_terminal else 100).print(summary(tables, runs))


def _table(tables: dict[str, pd.DataFrame], site: str, runs: list[str]) -> Table:
    """The runs of a model at a layer, in 80 letters."""
    title = f"{escape(site)}: what pruning did to the features (tau {TAU})"
    table = Table(title=title, title_style="bold", box=None, padding=(0, 1, 0, 0))
    widest = max(len(run.rpartition("/")[2]) for run in runs)
    table.add_column("condition", overflow="fold", min_width=min(widest, 22))
    for name in (
        "per-\nplexity",
        "seed\nstabil.",
        "survival\n(paper)",
        "corr.\nshared",
        "persist-\nence",
        "equal\nnoise",
        "dense SAE",
    ):
        table.add_column(name, justify="right")
    for run in runs:
        table.add_row(escape(run.rpartition("/")[2]), *_cells(tables, run))
    return table


def _claims(claims: pd.DataFrame) -> Table:
    """The paper's claims on this study; report.html and claims.csv have the numbers."""
    colours = {"holds": "green", "fails": "red", "undecided": "yellow"}
    table = Table(title="The paper's claims, on this study", title_style="bold")
    table.add_column("claim")
    table.add_column("by the paper's\nprotocol")
    table.add_column("controlled:\nwhat to believe")
    for row in claims.itertuples():
        verdicts = (f"[{colours[v]}]{v}[/]" for v in (row.paper_protocol, row.controlled))
        table.add_row(f"{row.claim} {escape(row.statement)}", *verdicts)
    return table


def _cells(tables: dict[str, pd.DataFrame], run: str) -> list[str]:
    """One run's numbers; the perplexity is that of the longest window."""
    rows = {name: part[part["run"] == run] for name, part in tables.items()}
    for name in ("stability", "survival", "survival_corrected"):
        if name in rows:
            rows[name] = rows[name][rows[name]["tau"] == TAU]
    empty = pd.DataFrame()
    answers = tables.get(ANSWERS, pd.DataFrame(columns=["run"])).set_index("run")

    def mean(name: str, column: str, digits: int = 3, **where: str) -> str:
        part = rows.get(name, empty)
        for key, value in where.items():
            part = part[part[key] == value] if len(part) else part
        if not len(part) or part[column].isna().all():
            return "-"
        return f"{part[column].mean():.{digits}f}"

    longest = rows.get("perplexity", empty)
    if len(longest):
        rows["perplexity"] = longest[longest["context_tokens"] == longest["context_tokens"].max()]
    return [
        mean("perplexity", "perplexity", 2),
        mean("stability", "mnn"),
        mean("survival", "mnn", arm="shared_init", coordinates="normalised"),
        mean("survival_corrected", "corrected", arm="shared"),
        mean("persistence", "mean_correlation", source="pruned"),
        mean("persistence", "mean_correlation", source="noise_shuffled"),
        answers.loc[run, "dense_sae"] if run in answers.index else "-",
    ]


def _notes(tables: dict[str, pd.DataFrame]) -> list[str]:
    """How to read the columns, from this study's own controls."""
    notes = []
    if "survival" in tables:
        rates = tables["survival"]
        rates = rates[(rates["tau"] == TAU) & (rates["coordinates"] == "normalised")]
        arms = rates.groupby("arm")["mnn"].mean()
        notes.append(
            "survival (paper) shares its start of training with the dense SAE. With that start it"
            f" would be {arms.get('ceiling_shared', float('nan')):.3f} without any pruning and"
            f" {arms.get('floor_shared', float('nan')):.3f} in a space with no feature in common;"
        )
        notes.append(
            "corrected survival puts it between these two (0 and 1). With another start, without"
            f" pruning, it would be {arms.get('ceiling_cross', float('nan')):.3f}, untrained"
            f" {arms.get('chance', float('nan')):.3f}."
        )
    if "persistence" in tables:
        notes.append(
            "persistence is the correlation of the dense SAE's latents before and after pruning;"
            " beside it what noise of equal size leaves (around the same common gain)."
        )
    if known := known_of_the_others(tables):
        notes.append(f"training: {known}.")
    return notes
