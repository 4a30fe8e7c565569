"""docs/methods.md: grades are those of a self-test, links lead somewhere, names exist."""

import ast
import importlib.util
import itertools
import pathlib
import re
import types

import numpy as np
import pandas as pd
import pytest

from prunelens.analyses.grades import MEASURES
from prunelens.config import StudyConfig
from prunelens.errors import UserError
from prunelens.study.results import table_columns
from prunelens.study_file import read_study

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGE = (DOCS / "methods.md").read_text(encoding="utf-8")
SYMBOLS = {"c_i", "c_ij", "d_j", "x_sae", "z_j"}  # of formulas


def load_tool():
    path = ROOT / "tools" / "write_methods_grades.py"
    spec = importlib.util.spec_from_file_location("write_methods_grades", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


def selftest():
    """Grades of all worlds; every number is the row's own."""
    rows, numbers = [], itertools.count(1)
    columns = table_columns()["selftest"]
    measured = columns[columns.index("share_defined") : columns.index("truth_rho") + 1]
    for world, measure in itertools.product(tool.WORLDS, MEASURES):
        values = {name: next(numbers) / 1000 for name in measured}
        row = {"run": f"planted/L0/planted-{world}-0.30", "measure": measure, "threshold": 0.7}
        rows.append({**row, "num_latents": 400, **values, "mark": np.nan, "passed": np.nan})
    undertrained = {"measure": "shared_init", "num_latents": 700, "mark": "false survival >= 0.5"}
    for step, share in ((6, 0.9), (2000, 0.021)):
        row = {"run": rows[0]["run"], "step": step, "false_survival": share, "passed": True}
        rows.append({**undertrained, **row})
    table = pd.DataFrame(rows).reindex(columns=table_columns()["selftest"])
    alone = table[:2].assign(unpaired_together=0.001, unpaired_alone=-0.4)
    return tool.SelfTest(table, alone, "made by a test")


def blocks(page):
    found = re.findall(r"<!-- grades:begin (\w+) -->\n(.*?)<!-- grades:end \1 -->", page, re.DOTALL)
    assert len(found) == page.count("grades:begin")
    return dict(found)


def outside(page):
    return re.sub(
        r"(<!-- grades:begin (\w+) -->\n).*?(?=<!-- grades:end \2)", r"\1", page, flags=16
    )


# ---- the page as it is ----


def test_every_measure_is_graded_in_both_worlds_and_in_its_section():
    found = blocks(PAGE)
    for world in ("independent", "by_rate"):
        lines = found[f"world_{world}"].splitlines()[2:]
        assert [line.split("`")[1] for line in lines] == list(MEASURES)
        aucs = [float(line.split("|")[4]) for line in lines]
        assert all(0.5 < auc <= 1 for auc in aucs)
    in_sections = [
        line.split("`")[1]
        for name in tool.SECTIONS
        for line in found[name].splitlines()
        if line.startswith("| `")
    ]
    assert sorted(in_sections) == sorted(MEASURES)


def test_the_grades_are_those_of_the_shipped_self_test():
    found = blocks(PAGE)
    assert tool.described(read_study("selftest")) in found["made"]
    assert not any("misses" in text for text in found.values())


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)\s]+)\)", PAGE)
    assert len(links) > 30
    for link in links:
        file, _, anchor = link.partition("#")
        target = (DOCS / file).resolve() if file else DOCS / "methods.md"
        assert target.is_file(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def anchors(page):
    """As GitHub makes them from headings."""
    outside_fences = re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", outside_fences, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def test_names_in_backticks_exist():
    """Columns, options, measures, arms: whatever has an underscore, a dot or a star."""
    known = names_in_code()
    page = re.sub(r"^```.*?^```$", "", outside(PAGE), flags=re.DOTALL | re.MULTILINE)
    checked = 0
    for name in set(re.findall(r"`([a-z][a-z0-9_.*]*)`", page)) - SYMBOLS:
        first, _, rest = name.partition(".")
        checked += "_" in name or "." in name
        if rest == "csv":
            assert first in table_columns(), name
        elif rest and first in StudyConfig.model_fields:
            assert rest in StudyConfig.model_fields[first].annotation.model_fields, name
        elif name.endswith("_*"):
            assert any(word.startswith(name[:-1]) for word in known), name
        elif "_" in name:
            assert name in known, name
    assert checked > 60


def names_in_code():
    """Identifiers and one-word strings of the package; docstrings do not count."""
    found = set()
    for path in (ROOT / "src" / "prunelens").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for field in ("id", "attr", "arg", "name"):
                found.add(getattr(node, field, None))
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return {name for name in found if name and " " not in name}


# ---- the tool ----


def test_filling_is_idempotent_and_touches_blocks_alone():
    once = tool.filled(PAGE, selftest())
    assert tool.filled(once, selftest()) == once
    assert outside(once) == outside(PAGE)
    assert blocks(once).keys() == blocks(PAGE).keys()
    assert once != PAGE


def test_numbers_stand_where_they_belong():
    found = selftest()
    rows = found.grades.set_index(["run", "measure"])
    by_rate = rows.loc[("planted/L0/planted-by_rate-0.30", "scaling")]
    independent = rows.loc[("planted/L0/planted-independent-0.30", "scaling")]
    written = blocks(tool.filled(PAGE, found))
    line = next(x for x in written["world_by_rate"].splitlines() if "`scaling`" in x)
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[4] == f"{by_rate['auc']:.2f}"
    assert cells[10] == (
        f"{by_rate['rate_rho']:.2f} ({by_rate['rate_low']:.2f} to {by_rate['rate_high']:.2f})"
    )
    assert f"| {independent['auc']:.2f} / {by_rate['auc']:.2f} |" in written["scaling"]
    assert "| planted-independent-0.30 | 2000 | 0.02 |" in written["undertrained"]
    assert "| 0.00 | -0.40 |" in written["scaling_alone"]


def test_a_missed_mark_is_said_in_every_place():
    found = selftest()
    row = found.grades["measure"] == "persistence"
    found.grades[["mark", "passed", "reason"]] = found.grades[["mark", "passed", "reason"]].astype(
        object
    )
    found.grades.loc[row, ["mark", "passed", "reason"]] = ("AUC >= 0.95", True, "")
    found.grades.loc[row.idxmax(), ["passed", "reason"]] = (False, "misses: AUC >= 0.95")
    written = blocks(tool.filled(PAGE, found))
    assert written["marks"].startswith("4 of 5 graded rows")
    assert "`persistence` (planted-independent-0.30) misses: AUC >= 0.95" in written["marks"]
    assert "| **misses: AUC >= 0.95** / reached |" in written["persistence"]
    assert "**misses: AUC >= 0.95**" in written["world_independent"]
    assert "reached" in written["world_by_rate"] and "misses" not in written["world_by_rate"]


def test_undefined_is_an_empty_cell_and_zero_has_no_sign():
    found = selftest()
    found.grades.loc[0, "auc"], found.grades.loc[0, "bias"] = np.nan, -0.001
    line = blocks(tool.filled(PAGE, found))["world_independent"].splitlines()[2]
    cells = [cell.strip() for cell in line.split("|")]
    assert (cells[4], cells[8]) == ("", "0.00")


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        (PAGE.replace("<!-- grades:begin noise -->", ""), "'noise'"),
        (PAGE + "<!-- grades:begin unheard_of -->\n", "'unheard_of'"),
        (PAGE + "<!-- grades:begin noise -->\n", "'noise'"),
        (PAGE.replace("<!-- grades:end noise -->", ""), "has no end"),
    ],
)
def test_a_page_without_its_blocks_is_refused(page, complaint):
    with pytest.raises(UserError, match=complaint):
        tool.filled(page, selftest())


def test_an_unfinished_selftest_is_refused(tmp_path):
    found = selftest()
    without = found.grades[found.grades["measure"] != "scaling"]
    with pytest.raises(UserError, match=r"not one grade of scaling in the world 'independent'"):
        tool.filled(PAGE, found._replace(grades=without))
    without = found.grades[found.grades["step"].isna()]
    with pytest.raises(UserError, match=r"`sufficiency`"):
        tool.filled(PAGE, found._replace(grades=without))
    with pytest.raises(UserError, match=r"prunelens selftest --out FOLDER"):
        tool.read_selftest(tmp_path)
    with pytest.raises(SystemExit, match=r"error: FOLDER: give one folder"):
        tool.main([])


def test_scaling_alone_is_graded_like_the_joint_one(tmp_path):
    """Where `alone` is the truth and the joint one is noise, the grade is that of the truth."""
    num = 60
    truth = np.tile([1.0, 0.0], num // 2)
    rates = np.linspace(0.01, 0.1, num)
    keys = {"seed": 0, "latent": range(num)}
    fates = pd.DataFrame({**keys, "alive": True, "fate": np.where(truth, "kept", "removed")})
    fates = fates.assign(true_cosine=1.0, true_scale=truth, true_share=truth)
    fates = fates.assign(firing_rate_first_half=rates)
    fates = fates.assign(init_retention=rates, scaling=0.0, cosine_shared_init=0.0)
    latents = pd.DataFrame({**keys, "source": "pruned", "alone": truth, "scaling": -truth})
    unpaired = latents.assign(source="unpaired", alone=-0.5, scaling=0.25)
    (tmp_path / "grades").mkdir()
    (tmp_path / "scaling").mkdir()
    fates.to_parquet(tmp_path / "grades" / "fates.parquet")
    pd.concat([latents, unpaired]).to_parquet(tmp_path / "scaling" / "latents.parquet")
    run = types.SimpleNamespace(
        name="planted/L0/planted-independent-0.30",
        pruning=types.SimpleNamespace(scope="independent"),
        stages={name: tmp_path / name for name in ("grades", "scaling")},
    )
    row = tool._grade_alone(run, types.SimpleNamespace(read=lambda folder: folder))
    assert (row["measure"], row["auc"], row["recall"], row["bias"]) == ("scaling", 1, 1, 0)
    assert (row["unpaired_together"], row["unpaired_alone"]) == (0.25, -0.5)
