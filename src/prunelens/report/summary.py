"""What a study found, on one screen: the paper's number and its control side by side."""

from __future__ import annotations

import pandas as pd
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from prunelens.console import Console
from prunelens.match import TAU
from prunelens.report.sinks import sinks_found
from prunelens.report.sufficiency import known_of_the_others, not_enough


def summary(tables: dict[str, pd.DataFrame], runs: pd.DataFrame) -> RenderableType:
    """The tables of a study as one readable block, with what its numbers do and do not say."""
    parts: list[RenderableType] = [_table(tables, runs)]
    parts += [f"[bold red]warning[/] {escape(each.text)}" for each in not_enough(tables)]
    parts += [
        f"[bold red]warning[/] {escape(f'{found.run}: {found.text}')}"
        for found in sinks_found(tables)
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
    Console(width=None if Console().is_terminal else 140).print(summary(tables, runs))


def _table(tables: dict[str, pd.DataFrame], runs: pd.DataFrame) -> Table:
    table = Table(title=f"What pruning did to the features (tau {TAU})", title_style="bold")
    table.add_column("run", no_wrap=True)
    for name in (
        "per-\nplexity",
        "FVU",
        "seed\nstabil.",
        "survival\n(paper)",
        "corr.\nshared",
        "corr.\ncross",
        "persist-\nence",
        "equal\nnoise",
        "ratio\nto it",
        "on the\nnull",
        "dense SAE:",
    ):
        table.add_column(name, justify="right")
    for run in runs["run"]:
        table.add_row(escape(run), *_cells(tables, run))
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
        mean("sae_quality", "fvu"),
        mean("stability", "mnn"),
        mean("survival", "mnn", arm="shared_init", coordinates="normalised"),
        mean("survival_corrected", "corrected", arm="shared"),
        mean("survival_corrected", "corrected", arm="cross"),
        mean("persistence", "mean_correlation", source="pruned"),
        mean("persistence", "mean_correlation", source="noise_shuffled"),
        mean("persistence", "relative_shuffled", source="pruned"),
        mean("persistence", "relative_shuffled", source="null"),
        _verdicts(rows.get("transfer", empty)),
    ]


def _verdicts(rows: pd.DataFrame) -> str:
    """What RQ3 says of the dense SAEs, norm-filtered; all that occur."""
    if rows.empty:
        return "-"
    own = (rows["positions"] == "norm_filtered") & (rows["source"] == "pruned")
    found = rows.loc[own, "verdict"]
    return "/".join(sorted(set(found.dropna()) - {""})) or "-"


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
            " beside it what noise of equal size leaves (around the same common gain), the ratio of"
            " the two, and that ratio on the null, where nothing is there: 1 but for chance."
        )
    if known := known_of_the_others(tables):
        notes.append(f"training: {known}.")
    return notes
