"""The self-test in a smaller size: the real pipeline on the planted world, and how it is told."""

import json
import sys

import pandas as pd
import pytest

from prunelens.analyses.grades import AUC_MARK, FOLLOWS_RATE, MEASURES, SEPARATES
from prunelens.cli import main
from prunelens.cli.app import app
from prunelens.cli.selftest import TITLES
from prunelens.errors import UserError
from prunelens.report import selftest
from prunelens.report.selftest import judge, run_selftest, selftest_study, what_to_believe

SMALL = {
    "corpus.train_tokens": "60_000",
    "corpus.eval_tokens": "40_000",
    "sae.k": "4",
    "sae.steps": "200",
    "sae.batch_tokens": "512",
    "sae.learning_rate": "2e-2",
    "sae.seeds": "[0, 1]",
    "sae.warm_steps": "30",
    "sufficiency.checkpoints": "[0.015]",
    "taus": "[0.7]",
}
WORLDS = ("independent", "by_rate", "none")
CHANGED = ("independent", "by_rate")  # worlds in which features are destroyed
MARKED = {world: {*SEPARATES, *FOLLOWS_RATE} for world in CHANGED} | {"none": {*FOLLOWS_RATE}}


@pytest.fixture(scope="module", autouse=True)
def undrawn():
    """Figures and page take as long as half of the study."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunelens.report.write.write_figures", lambda *_: [])
        patch.setattr("prunelens.report.write.write_page", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("selftest")


@pytest.fixture(scope="module")
def finished(out):
    """One finished self-test, shared by the tests that only look.

    Its stages are made in processes of their own, where nothing checks every shape: twice as fast.
    """
    return run_selftest(out, settings=SMALL, workers=2, quiet=True)


@pytest.fixture
def row(finished):
    """(world, measure) -> its grades at the end of training."""
    at_end = finished.grades[finished.grades["step"].isna()]
    return at_end.set_index(["world", "measure"]).loc


def command(out, *options):
    """Exit code of `prunelens selftest` on a folder."""
    words = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    words += ["--out", str(out), *options]
    return app(["selftest", *words], standalone_mode=False)


# ---- what the small world says ----


def test_every_run_is_done_from_activations_to_claims(finished, out):
    assert {result.status for result in finished.outcome.results} == {"done"}
    claims = pd.read_csv(out / "tables" / "claims.csv")
    assert set(claims["claim"]) == set(range(1, 12))
    for name in ("stability", "survival", "persistence", "scaling", "subspace", "fragility"):
        assert len(pd.read_csv(out / "tables" / f"{name}.csv"))


def test_every_world_grades_every_measure(finished):
    at_end = finished.grades[finished.grades["step"].isna()]
    for world in WORLDS:
        assert set(at_end.loc[at_end["world"] == world, "measure"]) == set(MEASURES)
        marked = at_end[(at_end["mark"] != "") & (at_end["world"] == world)]
        assert set(marked["measure"]) == MARKED[world]
    assert (finished.grades["passed"].notna() == (finished.grades["mark"] != "")).all()


@pytest.mark.parametrize("world", CHANGED)
def test_persistence_tells_survived_from_destroyed(row, world):
    found = row[world, "persistence"]
    assert found["auc"] >= AUC_MARK
    assert found["false_survival"] < 0.1
    assert found["num_latents"] > 100


@pytest.mark.parametrize("world", CHANGED)
@pytest.mark.parametrize("name", SEPARATES)
def test_the_measures_that_carry_conclusions_tell_survived_from_destroyed(row, world, name):
    found = row[world, name]
    assert found["auc"] >= 0.95
    assert 0.5 < found["share_defined"] < 0.9  # rare latents fire too seldom to have a value


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", FOLLOWS_RATE)
def test_the_controlled_measures_depend_on_firing_rate_as_the_truth_does(row, world, name):
    found = row[world, name]
    # SAEs of 200 steps read rare directions less well; persistence is off by more
    assert abs(found["rate_rho"] - found["truth_rho"]) <= 0.2


def test_a_match_of_directions_depends_on_firing_rate_where_the_truth_does_not(row):
    controlled = row["independent", "relative_shuffled"]
    assert row["by_rate", "relative_shuffled"]["rate_rho"] > controlled["rate_rho"]
    paper = row["independent", "shared_init"]  # rises with firing rate where nothing was planted
    assert paper["rate_low"] > 0
    assert paper["rate_rho"] > controlled["rate_rho"]
    assert paper["follows_rate"] is False


def test_a_shared_start_feigns_survival_until_the_saes_have_learnt(finished):
    early = finished.grades.dropna(subset="step").sort_values("step")
    assert set(early["measure"]) == {"shared_init"}
    first, last = early.iloc[0], early.iloc[-1]
    assert (first["step"], last["step"]) == (3, 200)
    assert first["false_survival"] > 0.9
    assert first["passed"] is True
    assert last["false_survival"] < 0.2


def test_a_second_call_does_no_work_and_prints_the_same(finished, out, capsys):
    tables = {path: path.read_bytes() for path in (out / "tables").iterdir()}
    code = command(out)
    printed = capsys.readouterr().out
    assert code == (0 if finished.passed else 1)
    assert run_selftest(out, settings=SMALL, workers=1, quiet=True).outcome.num_executed == 0
    assert command(out) == code
    assert capsys.readouterr().out == printed
    assert {path: path.read_bytes() for path in (out / "tables").iterdir()} == tables


# ---- how it is told ----


def reached(rows):
    """The same rows, every mark reached."""
    marked = rows["mark"] != ""
    passed = rows["passed"].astype(object).where(~marked, True)
    return rows.assign(passed=passed, reason="")


@pytest.fixture
def told(finished, monkeypatch):
    """The command, on grades of which some were changed."""

    def tell(out, *options, **changed):
        grades = finished.grades.copy()
        marked = grades["mark"] != ""
        grades.loc[marked, ["passed", "reason"]] = [True, ""]
        for measure, reason in changed.items():
            missed = marked & (grades["measure"] == measure) & (grades["world"] == "by_rate")
            assert missed.any()
            grades.loc[missed, ["passed", "reason"]] = [False, reason]
        judged = judge(
            grades, reached(finished.nulls), reached(finished.coverage), finished.outcome
        )
        monkeypatch.setattr(selftest, "run_selftest", lambda *_, **__: judged)
        return command(out, *options)

    return tell


def test_all_marks_reached_is_exit_code_0(told, finished, out, capsys):
    assert told(out) == 0
    printed = capsys.readouterr()
    assert "MISSED" not in printed.out
    assert "fined" in printed.out
    assert printed.err == ""
    for title in TITLES.values():
        table = printed.out.split(title)[1].split("Where nothing is")[0].split("Pruning ")[0]
        assert all(table.count(f"\n{measure} ") == 1 for measure in MEASURES)
    marked = sum(map(len, MARKED.values())) + 1  # and one of SAEs that hardly learnt
    for rows in (finished.nulls, finished.coverage):
        marked += (rows["mark"] != "").sum()
    assert printed.out.count("passed") == marked
    assert "no mark: their numbers say how far to trust them" in printed.out


def test_a_missed_mark_is_said_and_exit_code_1(told, out, capsys):
    assert told(out, persistence="misses: AUC >= 0.95") == 1
    printed = capsys.readouterr()
    assert printed.out.count("MISSED") == 1
    missed = next(line for line in printed.out.splitlines() if "MISSED" in line)
    assert missed.split()[0] == "persistence"
    assert printed.err.strip() == "prunelens: by_rate: persistence misses: AUC >= 0.95"


def test_quiet_says_no_more_than_what_was_missed(told, out, capsys):
    assert told(out, "--quiet", persistence="misses: AUC >= 0.95") == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "persistence" in printed.err
    assert told(out, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_json_holds_every_row_and_the_verdict(told, finished, out, capsys):
    assert told(out, "--json", scaling="misses: AUC >= 0.95") == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["passed"] is False
    assert printed["failures"] == ["by_rate: scaling misses: AUC >= 0.95"]
    assert len(printed["rows"]) == len(finished.grades)
    for said, known in zip(printed["rows"], finished.grades.to_dict("records"), strict=True):
        assert (said["world"], said["measure"]) == (known["world"], known["measure"])
        assert said["auc"] == pytest.approx(known["auc"], nan_ok=True) or said["auc"] is None
    assert set(MEASURES) < set(printed["believe"])
    assert told(out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True


def test_a_failed_run_is_named(finished):
    first, *others = finished.outcome.results
    failed = first._replace(status="failed", reason="the disk is full")
    tables = finished.grades, finished.nulls, finished.coverage
    judged = judge(*tables, finished.outcome._replace(results=[failed, *others]))
    assert not judged.passed
    assert judged.failures[0] == "planted/L0/dense failed: the disk is full"
    nothing = finished.outcome._replace(results=[failed], failures=("predictor: no rows",))
    judged = judge(*(table.iloc[:0] for table in tables), nothing)
    assert judged.failures == (judged.failures[0], "predictor: no rows")


def test_what_was_not_held_against_its_mark_does_not_pass(finished):
    grades, nulls, coverage = map(reached, (finished.grades, finished.nulls, finished.coverage))

    def failures(grades=grades, nulls=nulls, coverage=coverage):
        return judge(grades, nulls, coverage, finished.outcome).failures

    assert failures() == ()
    assert "sufficiency.checkpoints" in " ".join(failures(grades[grades["step"].isna()]))
    unmeasured = grades[(grades["measure"] != "scaling") | (grades["world"] == "by_rate")]
    said = tuple(f"{world}: scaling was not measured" for world in ("independent", "none"))
    assert failures(unmeasured) == said
    unasked = nulls[(nulls["measure"] != "beyond_noise") | (nulls["world"] == "none")]
    asked = "beyond_noise was not asked where nothing is"
    assert failures(nulls=unasked) == tuple(f"{world}: {asked}" for world in CHANGED)
    simulated = coverage[coverage["world"] != "by_rate"]
    assert failures(coverage=simulated) == ("by_rate: no interval was simulated",)
    assert failures(grades.iloc[:0], nulls.iloc[:0], coverage.iloc[:0])


def test_what_is_found_where_nothing_is_and_a_wrong_interval_are_named(finished):
    grades, nulls, coverage = map(reached, (finished.grades, finished.nulls, finished.coverage))
    marked = nulls.index[nulls["mark"] != ""][0]
    nulls.loc[marked, ["passed", "reason"]] = [False, "misses: nothing is found"]
    marked = coverage.index[coverage["kind"] == "interval"][0]
    coverage.loc[marked, ["measured", "passed"]] = [0.5, False]
    coverage.loc[marked, "reason"] = "misses: holds the truth"
    first, second = judge(grades, nulls, coverage, finished.outcome).failures
    assert "(null)" in first and first.endswith("misses: nothing is found")
    assert second.endswith("50.0% misses: holds the truth")


def sentence(speaks=False, **numbers):
    """On `cross_init` in every world, flawless but for what is given by world.

    `speaks`: whether it finds something where nothing is.
    """
    flawless = {"auc": 0.99, "recall": 1.0, "false_survival": 0.0, "bias": 0.0, "truth_rho": 0.0}
    flawless |= {"bias_rotated": 0.0, "rate_rho": 0.05, "follows_rate": True}
    rows = []
    for world in WORLDS:
        row = {"world": world, "measure": "cross_init", "step": float("nan"), "threshold": 0.7}
        rows.append({**row, **flawless, **numbers.get(world, {})})
    null = {"measure": "cross_init", "says_nothing": not speaks, "passed": float("nan")}
    return what_to_believe(pd.DataFrame(rows), pd.DataFrame([null]))["cross_init"]


def test_what_to_believe_follows_from_the_numbers():
    assert sentence() == "believe it for which features survive, and for whether rare ones do"
    astray = sentence(independent={"follows_rate": False, "rate_rho": 0.31})
    assert astray.startswith("believe it for which features survive, not for whether rare ones do")
    assert "0.31 where the truth has 0.00" in astray
    assert "not for whether rare ones do" in sentence(by_rate={"follows_rate": False})
    assert "AUC 0.80" in sentence(by_rate={"auc": 0.8})
    assert sentence(by_rate={"auc": 0.8}).startswith("believe its trend over firing rate")
    both = sentence(independent={"auc": 0.7, "follows_rate": False})
    assert both.startswith("do not believe it")
    assert "calls 30% of the destroyed" in sentence(by_rate={"false_survival": 0.3})
    assert "misses 40% of the survived" in sentence(independent={"recall": 0.6})
    assert "-0.20 off" in sentence(independent={"bias": -0.2}, by_rate={"bias": -0.2})
    nothing = sentence(none={"auc": float("nan"), "follows_rate": False, "rate_rho": 0.2})
    assert nothing.startswith("believe it for which features survive, not for whether rare ones do")
    assert "finds something where nothing is, and decides no claim" in sentence(speaks=True)
    undefined = sentence(by_rate={"auc": float("nan"), "follows_rate": float("nan")})
    assert undefined.startswith("do not believe it")


# ---- mistakes of users ----


@pytest.mark.parametrize(
    ("setting", "value", "word"),
    [
        ("questions", "[stability]", "questions"),
        ("prunings.1.scope", "independent", "twice"),
        ("prunings.0.scope", "row", "scope"),
        ("prunings", "[]", "prunings"),
        ("models.0.name", "bundled", "planted"),
        ("models.0.site", "mlp_out", "models"),
        ("sae.stepz", "5", "sae.stepz"),
        ("sae.seeds", "[0]", "sae.seeds"),
    ],
)
def test_settings_cannot_change_what_is_tested(setting, value, word):
    with pytest.raises(UserError, match=word):
        selftest_study({setting: value})


def test_a_file_called_selftest_is_not_taken_for_the_shipped_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "selftest").write_text("name: other\n")
    assert selftest_study().name == "selftest"


def test_a_mistake_is_exit_code_2_and_one_line(tmp_path, monkeypatch, capsys):
    words = ["prunelens", "selftest", "--set", "prunings=[]", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1
    assert "prunings" in printed.err
    assert not (tmp_path / "out").exists()
