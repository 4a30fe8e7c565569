"""In a terminal of 80 columns nothing that a command prints is cut, and no line is longer."""

import contextlib
import fcntl
import logging
import math
import os
import pty
import re
import struct
import sys
import termios
import threading

import pandas as pd
import pytest
import typer

from prunelens.cli import main
from prunelens.cli.app import app
from prunelens.cli.printing import print_table
from prunelens.console import in_words
from prunelens.report.selftest import SelfTest
from prunelens.sae.topk import TopKSAE
from prunelens.study.artifacts.store import Stage
from prunelens.study.clean import Leftover
from prunelens.study.preflight.preview import Preflight
from prunelens.study.progress import StudyProgress

RUN = "Llama-3.2-1B-Instruct/L12/magnitude-global-0.50"
SENTENCE = "the hub refuses meta-llama/Llama-3.2-1B to your token; ask for access on its page"


@pytest.fixture
def terminal(monkeypatch):
    """Call it with a function: what stands on a terminal of 80 columns after it."""
    for name in ("COLUMNS", "LINES", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def on_terminal(function):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        seen = []
        reader = threading.Thread(target=lambda: seen.extend(iter(lambda: read(ours), b"")))
        before = [os.dup(number) for number in range(3)]
        for number in range(3):
            os.dup2(theirs, number)
        os.close(theirs)
        reader.start()
        try:
            with monkeypatch.context() as patch, open(1, "w", closefd=False) as screen:
                patch.setattr(sys, "stdout", screen)
                patch.setattr(sys, "stderr", screen)
                function()
        finally:
            for number, old in enumerate(before):
                os.dup2(old, number)
                os.close(old)
            reader.join()
            os.close(ours)
        shown = re.sub(r"\x1b\[\??[0-9;]*[a-zA-Z]", "", b"".join(seen).decode()).replace(
            "\r\n", "\n"
        )
        assert max(map(len, shown.splitlines())) <= 80, shown
        assert "\x1b" not in shown
        return shown

    return on_terminal


def read(number):
    """What comes next, nothing where nobody writes any more."""
    with contextlib.suppress(OSError):  # so does Linux tell the end
        return os.read(number, 2**16)
    return b""


@pytest.fixture
def prunelens_on_terminal(terminal, monkeypatch):
    """The command line there, where it succeeds."""

    def run(*arguments):
        monkeypatch.setattr(logging.root, "handlers", [])
        monkeypatch.setattr(sys, "argv", ["prunelens", *map(str, arguments)])

        def ended():
            with pytest.raises(SystemExit) as ended:
                main()
            assert not ended.value.code

        return terminal(ended)

    return run


def whole(shown, *words):
    """Each of them in one piece, but for ends of lines between the words of a sentence."""
    in_one_line = " ".join(shown.split())
    for word in words:
        assert str(word) in (in_one_line if " " in str(word) else shown), (word, shown)
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown


def test_status(prunelens_on_terminal, monkeypatch):
    rows = [
        {"run": RUN, "status": "failed", "present": 3, "stages": 123, "reason": SENTENCE},
        {"run": "m/L1/dense", "status": "done", "present": 20, "stages": 20, "reason": ""},
    ]
    monkeypatch.setattr("prunelens.study.folder.study_status", lambda *_: rows)
    shown = prunelens_on_terminal("status", "folder")
    assert shown.startswith("Runs of folder: 1 failed, 1 done\n")
    whole(shown, RUN, "failed", "3/123", f"reason: {SENTENCE}", "m/L1/dense", "20/20")


def test_predict_tells_the_ends_of_intervals_apart(prunelens_on_terminal, monkeypatch):
    ends = ("", "_low", "_high")
    names = [name + end for name in ("persistence", "shared_init") for end in ends]
    numbers = [[0.2018, 0.671, math.nan, math.nan, 0.532, 0.0484, 0.962], [math.nan] * 7]
    table = pd.DataFrame(numbers, columns=["firing_rate", *names])
    table.insert(0, "latent", [12_115, 7])
    monkeypatch.setattr("prunelens.study.predict.predict_latents", lambda *_, **__: table)
    shown = prunelens_on_terminal("predict", "folder", "--sparsity", "0.5")
    whole(shown, "to sparsity 0.5", "0.532 [0.0484, 0.962]", "12115")
    row = next(line for line in shown.splitlines() if "12115" in line)
    assert re.split(" {2,}", row.strip()) == ["12115", "0.2018", "0.671", "0.532 [0.0484, 0.962]"]


def test_clean(prunelens_on_terminal, monkeypatch):
    path = f"artifacts/activations/{'0123456789abcdef' * 4}"
    why = "nothing that is still to be made reads these activations"
    found = [Leftover(path, f"activations {RUN}", why, 123_456_789)]
    monkeypatch.setattr("prunelens.study.clean.leftovers", lambda *_: found)
    shown = prunelens_on_terminal("clean", "folder")
    whole(shown, f"activations {RUN}", "123.5", why, "What folder does not need", "--yes")
    assert path in "".join(line.strip() for line in shown.splitlines())


def test_match(prunelens_on_terminal, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        TopKSAE.initialise(16, 64, 4, init_seed=0).save(tmp_path / name)
    shown = prunelens_on_terminal("match", tmp_path / "a", tmp_path / "b")
    whole(shown, "Share of the features of A", "MNN", "one-way, B to A", "0.9", "1.0000")


@pytest.mark.parametrize(
    ("verdict", "reason", "told"),
    [
        ("retrain", "", "retrain: on the pruned model the SAE fails, refitted or not"),
        ("undecided", "undecided: as it is, ce_drop has no interval", "undecided: as it is"),
    ],
)
def test_transfer_tells_its_verdict_first(
    verdict, reason, told, prunelens_on_terminal, monkeypatch
):
    row = {"condition": "magnitude-global-0.50", "positions": "norm_filtered", "refit": "none"}
    row |= {"ce_recovered": 0.98765, "verdict": verdict, "reason": reason}
    for number, name in enumerate(("fvu_dense_var_ratio", "fvu_raw_ratio", "ce_drop"), start=1):
        row |= {name: number + 0.234, f"{name}_low": number + 0.123, f"{name}_high": number + 0.346}
    dense = row | {"condition": "dense", "verdict": "", "reason": ""}
    table = pd.DataFrame([dense, row])
    monkeypatch.setattr("prunelens.study.single.transfer_sae", lambda *_, **__: table)
    shown = prunelens_on_terminal("transfer", "sae", "bundled")
    assert shown.index(told) < shown.index("The SAE on the dense")
    whole(shown, "magnitude-global-0.50", "0.9877", "3.23 [3.12, 3.35]", "The rule: an")
    whole(shown, "fvu_dense_var_ratio: 1.23 [1.12, 1.35]", "fvu_raw_ratio: 2.23 [2.12, 2.35]")


def test_plan_tells_its_time_in_words_and_what_to_do(prunelens_on_terminal, monkeypatch):
    run = {"run": RUN, "saes": 3, "control_saes": 5, "stages": 40, "shared": 14}
    run |= {"forward_tokens": 467_900, "sae_tokens": 123_456_789, "flops": 2.46e12, "hours": 9528.0}
    needs = ("peak", "stores", "store", "kept", "downloads", "device", "forward", "perplexity")
    gigabytes = {f"{name}_gigabytes": 1.23 for name in (*needs, "sae_training", "host", "memory")}
    device = {"device": "cpu", "name": "x86_64", "cores": 2, "calibration_seconds": 40.0}
    schedule = {"workers": 64, "makespan_hours": 0.02, "critical_path_hours": 3.34}
    found = Preflight(
        [run],
        {"sae": 8},
        {"runs": 1, **{name: run[name] for name in list(run)[1:] if name != "shared"}},
        gigabytes,
        gigabytes,
        {"forward": 1.0, "total": 9528.0},
        device | gigabytes,
        {},
        [SENTENCE],
        [{"level": "warning", "check": "access", "what": SENTENCE, "fix": ""}],
        [{**schedule, "idle_share": 0.5, "chain": [f"survival {RUN}"]}],
    )
    monkeypatch.setattr("prunelens.study.preflight.preview.preflight", lambda *_, **__: found)
    shown = prunelens_on_terminal("plan", "demo")
    first = "demo: 1 runs, 8 SAEs, 40 stages, about 397 days on this CPU: use a GPU"
    assert " ".join(shown.split()).startswith(first)
    whole(shown, RUN, "397 days", "467.9 K", "123.5 M", "2.46e+12", "controls: 5", "14")
    whole(shown, "72 s", "3 h 20 min", "50%", f"critical path: survival {RUN}")
    whole(shown, f"warning (access): {SENTENCE}")


def test_selftest(prunelens_on_terminal, monkeypatch):
    mark = "no effect of firing rate: interval covers 0, rho within 0.1 of the truth's"
    judged = {"world": "none", "mark": mark, "passed": True, "reason": ""}
    grade = {"measure": "activation_shared_init", "step": math.nan, "share_defined": 0.968}
    grade |= {"auc": 0.985, "precision": 0.998, "recall": 0.916, "false_survival": 0.007}
    grade |= {"bias": -0.056, "bias_rotated": 0.275, "truth_rho": -0.013}
    grade |= {"rate_rho": 0.12, "rate_low": -0.04, "rate_high": 0.22}
    null = {"measure": "relative_shuffled", "source": "noise_shuffled", "value": 1.151}
    null |= {"statistic": "rank correlation with firing rate", "low": 1.121, "high": 1.181}
    null |= {"nothing": 1.0, "says_nothing": True}
    name = "relative_shuffled, rank correlation with firing rate (null)"
    coverage = {"name": name, "truth": -0.358, "measured": 0.97, "num_sets": 100}
    coverage |= {"num_undefined": 17}
    tables = (pd.DataFrame([row | judged]) for row in (grade, null, coverage))
    found = SelfTest(*tables, (), None)
    monkeypatch.setattr("prunelens.report.selftest.run_selftest", lambda *_, **__: found)
    believe = {"activation_shared_init": SENTENCE * 3}
    monkeypatch.setattr("prunelens.report.selftest.what_to_believe", lambda *_: believe)
    shown = prunelens_on_terminal("selftest")
    whole(shown, "activation_shared_init", "0.12 [-0.04, 0.22]", f"mark: {mark}", SENTENCE * 3)
    whole(shown, "0.968", "0.985", "0.998", "0.916", "0.007", "-0.056", "0.275", "-0.013")
    whole(shown, "noise_shuffled", "1.151 [1.121, 1.181]", "rank correlation with firing rate")
    whole(shown, "-0.358", "97.0%", "100", "17", "(null)")
    assert shown.count("passed") == 3


def test_what_fits_stays_and_the_widest_goes_first(terminal):
    rows = [{"a": "x" * 30, "b": 1, "c": "y" * 38, "d": 0.25, "e": "z" * 20}]
    first, head, _, row, below = terminal(lambda: print_table("All:", rows)).splitlines()
    assert first == "All:" and head.split() == ["a", "b", "d", "e"]
    assert row.split() == ["x" * 30, "1", "0.25", "z" * 20] and below == f"    c: {'y' * 38}"


def test_wide_letters_markup_and_controls(terminal):
    rows = [{"name": "\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 35, "why": "[red]\x1b[31m a\nb", "n": 10.0}]
    shown = terminal(lambda: print_table("[bold]", rows))
    assert r"[red]\x1b[31m a b" in shown and "[bold]" in shown and "10" in shown
    assert sum(map(len, re.findall("\N{CJK UNIFIED IDEOGRAPH-4E2D}+", shown))) == 35


def test_elsewhere_a_row_is_one_line(capsys):
    print_table("All:", [{"name": RUN, "why": SENTENCE * 3, "number": 1.5}] * 2)
    assert len(capsys.readouterr().out.splitlines()) == 5
    print_table("Nothing:", [])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0, "0 s"),
        (0.3, "under 1 s"),
        (119.4, "119 s"),
        (119.7, "120 s"),
        (719, "12 min"),
        (7170, "2 h"),
        (12_000, "3 h 20 min"),
        (172_790, "2.0 days"),
        (216_000, "2.5 days"),
        (34_300_800, "397 days"),
    ],
)
def test_durations_in_words(seconds, told):
    assert in_words(seconds) == told


def test_version(prunelens):
    ended = prunelens("--version")
    assert re.fullmatch(r"prunelens \d+\.\d+\.\d+\n", ended.stdout) and not ended.returncode


def test_help_shows_every_word_of_it(prunelens_on_terminal):
    """Square brackets, which typer takes for markup, among them."""
    for name, command in typer.main.get_command(app).commands.items():
        shown = prunelens_on_terminal(name, "--help")
        texts = [command.help, *(option.help or "" for option in command.params)]
        for word in " ".join(texts).replace("\\[", "[").split():
            assert word in shown, (name, word)
    assert "prunelens[ray]" in prunelens_on_terminal("run", "--help")


def test_progress_tells_the_time_that_is_left(terminal):
    stage = Stage("survival", 1, {}, {}, label=f"survival {RUN} 3-3", estimate=lambda: 100.0)

    def show():
        with StudyProgress() as progress:
            progress.start(1000.0)
            progress._started -= 4000
            progress.update(stage, 0.8)

    whole(terminal(show), " 8 % ", "about 12 h 47 min left", "survival ", "\u2501")
