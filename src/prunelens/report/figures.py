"""Tables -> figures. Every number drawn here stands in a CSV; nothing is computed but means."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PRIMARY_TAU = 0.7
COLOURS = {"magnitude": "#1f77b4", "wanda": "#ff7f0e"}
ARM_COLOURS = {
    "ceiling_shared": "#2ca02c",
    "floor_shared": "#d62728",
    "ceiling_cross": "#9467bd",
    "chance": "#7f7f7f",
}
ARM_LABELS = {
    "ceiling_shared": "same start, no pruning",
    "floor_shared": "same start, nothing in common",
    "ceiling_cross": "other start, no pruning",
    "chance": "untrained",
}


def write_figures(tables: dict[str, pd.DataFrame], out: pathlib.Path) -> list[pathlib.Path]:
    """Draw the figures that the tables allow into `figures/` as .png and .pdf; returns the PNGs."""
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        if {"stability", "survival"} <= set(tables):
            written.append(_save(_seed_stability(tables), folder / "fig1_seed_stability"))
        if {"survival", "survival_corrected", "persistence"} <= set(tables):
            written.append(_save(_survival(tables), folder / "fig2_survival"))
    return written


def _seed_stability(tables: dict[str, pd.DataFrame]) -> Figure:
    """Paper's Figure 1; beside it, what the start of training alone contributes."""
    stability, survival = tables["stability"], tables["survival"]
    sites = list(_sites(stability))
    figure = Figure(figsize=(10, 3.6 * len(sites)), layout="constrained")
    grid = figure.subplots(len(sites), 2, squeeze=False)
    for (left, right), (title, part) in zip(grid, sites, strict=True):
        at_tau = part[part["tau"] == PRIMARY_TAU]
        _by_method(left, at_tau, "mnn", error="std", label="")
        _arm_line(left, _controls(survival, part), "chance")
        left.set(
            xlabel="sparsity", ylabel=f"MNN rate between seeds, tau {PRIMARY_TAU}", ylim=(0, None)
        )
        left.set_title(f"{title}: paper's view\n(bars: s.d. over seed pairs)")
        left.legend(frameon=False)
        for arm in ARM_LABELS:
            rates = _controls(survival, part)
            rates = rates[rates["arm"] == arm].groupby("tau")["mnn"].mean()
            right.plot(rates.index, rates, "o-", color=ARM_COLOURS[arm], label=ARM_LABELS[arm])
        right.set(xlabel="tau", ylabel="MNN rate of dense dictionaries", ylim=(-0.02, 1.02))
        right.set_title("control: how much agreement is the start?\n(no pruning in any of these)")
        right.legend(frameon=False)
    return figure


def _survival(tables: dict[str, pd.DataFrame]) -> Figure:
    """Paper's Figure 2; corrected for the start; and without any second dictionary."""
    survival, corrected = tables["survival"], tables["survival_corrected"]
    persistence = tables["persistence"]
    sites = list(_sites(survival))
    figure = Figure(figsize=(13, 3.8 * len(sites)), layout="constrained")
    grid = figure.subplots(len(sites), 3, squeeze=False)
    for (left, middle, right), (title, part) in zip(grid, sites, strict=True):
        at_tau = part[(part["tau"] == PRIMARY_TAU) & (part["coordinates"] == "normalised")]
        paper = at_tau[at_tau["arm"] == "shared_init"]
        _by_method(left, paper, "mnn", error="range", label="")
        for arm in ARM_LABELS:
            _arm_line(left, at_tau, arm)
        left.set(
            xlabel="sparsity", ylabel=f"MNN rate to dense, tau {PRIMARY_TAU}", ylim=(-0.02, 1.02)
        )
        left.set_title(f"{title}: paper's survival\nand what it is without pruning or features")
        left.legend(frameon=False, fontsize=7)
        fixed = _same_site(corrected, part)
        fixed = fixed[fixed["tau"] == PRIMARY_TAU]
        for arm, line in (("shared", "-"), ("cross", ":")):
            _corrected_lines(middle, fixed[fixed["arm"] == arm], arm, line)
        middle.axhline(1, color="#2ca02c", lw=0.8)
        middle.axhline(0, color="#d62728", lw=0.8)
        middle.set(xlabel="sparsity", ylabel="corrected survival")
        middle.set_xticks(sorted(fixed["sparsity"].unique()))
        middle.set_title("control: 0 = as if nothing survived,\n1 = as if nothing was pruned")
        if middle.get_legend_handles_labels()[0]:
            middle.legend(frameon=False)
        for source, line in (("pruned", "-"), ("noise_isotropic", ":"), ("noise_shuffled", "--")):
            rows = _same_site(persistence, part)
            label = source.replace("_", ": ")
            rows = rows[rows["source"] == source]
            _by_method(right, rows, "mean_correlation", error="range", label=label, line=line)
        right.set(xlabel="sparsity", ylabel="mean correlation per latent", ylim=(-0.02, 1.02))
        right.set_title("control: the dense SAE on the same tokens,\nbeside noise of equal size")
        right.legend(frameon=False, fontsize=7)
    return figure


def _by_method(
    axes: Axes, rows: pd.DataFrame, column: str, *, error: str, label: str, line: str = "-"
) -> None:
    """One line per method over sparsity, dense (if there) as the common first point."""
    dense = rows[rows["method"] == "dense"]
    for family, method, part in _families(rows):
        groups = pd.concat([dense, part]).groupby("sparsity")[column]
        centre = groups.mean()
        if error == "std":
            below = above = groups.std().fillna(0)
        else:
            below, above = centre - groups.min(), groups.max() - centre
        name = f"{family} {label}".strip()
        axes.errorbar(
            centre.index,
            centre,
            yerr=[below, above],
            fmt=f"o{line}",
            color=COLOURS.get(method),
            capsize=2,
            label=name,
        )
    axes.set_xticks(sorted(rows["sparsity"].unique()))
    if not len(rows[rows["method"] != "dense"]) and len(dense):
        axes.plot([0], [dense[column].mean()], "ko", label="dense")


def _families(rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Pruned rows by condition but for the sparsity: its name, its method, its rows."""
    pruned = rows[rows["method"] != "dense"]
    condition = pruned["run"].str.rsplit("/", n=1).str[-1]
    family = condition.str.replace(r"-[0-9.]+", "", regex=True)
    for name, part in pruned.groupby(family, sort=False):
        yield str(name), part["method"].iloc[0], part


def _corrected_lines(axes: Axes, rows: pd.DataFrame, arm: str, line: str) -> None:
    for family, method, part in _families(rows):
        known = part.dropna(subset="corrected").sort_values("sparsity")
        if len(known):
            axes.errorbar(
                known["sparsity"],
                known["corrected"],
                yerr=[known["corrected"] - known["low"], known["high"] - known["corrected"]],
                fmt=f"o{line}",
                color=COLOURS.get(method),
                capsize=2,
                label=f"{family}, {arm}",
            )


def _arm_line(axes: Axes, rows: pd.DataFrame, arm: str) -> None:
    part = rows[(rows["arm"] == arm) & (rows["tau"] == PRIMARY_TAU)]
    if len(part):
        axes.axhline(
            part["mnn"].mean(), color=ARM_COLOURS[arm], ls="--", lw=1, label=ARM_LABELS[arm]
        )


def _controls(survival: pd.DataFrame, like: pd.DataFrame) -> pd.DataFrame:
    rows = _same_site(survival, like)
    return rows[(rows["coordinates"] == "normalised") & (rows["method"] == "dense")]


def _same_site(table: pd.DataFrame, like: pd.DataFrame) -> pd.DataFrame:
    first = like.iloc[0]
    return table[(table["model"] == first["model"]) & (table["layer"] == first["layer"])]


def _sites(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    for (model, layer), part in table.groupby(["model", "layer"], sort=False):
        yield f"{model}, layer {layer}", part


def _save(figure: Figure, stem: pathlib.Path) -> pathlib.Path:
    for suffix in (".pdf", ".png"):
        path = stem.with_suffix(suffix)
        temporary = path.with_name(f".{path.name}.tmp")
        figure.savefig(temporary, format=suffix[1:], dpi=150)
        temporary.replace(path)
    return stem.with_suffix(".png")
