"""An interruption comes through, whatever it meets."""

import signal
import sys
import time

import pytest

import prunelens.cli.app
from prunelens.cli import main
from prunelens.errors import UserError
from prunelens.interruption import AGAIN_AFTER, interruptible, is_interrupted
from prunelens.study.stages import failure_of

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


class Deaf:
    """While it is deleted a signal comes: Python drops what is raised there."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        signal.raise_signal(self.number)


@BOTH
def test_what_python_drops_comes_again(number):
    with pytest.raises(KeyboardInterrupt), interruptible() as received:
        deaf = Deaf(number)
        del deaf
        assert received == [number]
        started = time.monotonic()
        time.sleep(30)
    assert time.monotonic() - started < 20  # it ended what was waited for
    assert received == [number, number]


def test_other_things_that_python_drops_are_told_as_ever(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)

    class Broken:
        def __del__(self):
            raise ValueError("no")

    with interruptible() as received:
        broken = Broken()
        del broken
    assert [type(dropped.exc_value) for dropped in told] == [ValueError] and not received


def test_a_signal_that_is_ignored_stays_so_and_the_rest_is_put_back():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    handler, hook = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    try:
        with interruptible() as received:
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGTERM) is not handler
        assert received == [] and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGTERM) is handler and sys.unraisablehook is hook


@BOTH
@pytest.mark.parametrize("becomes", ["another error", "a failed run"])
def test_a_library_that_makes_something_else_of_it(number, becomes, monkeypatch, capsys):
    def run_app():
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            if becomes == "a failed run":
                return 1
            raise RuntimeError("from inside a library") from None

    monkeypatch.setattr(prunelens.cli.app, "run_app", run_app)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 128 + number
    *more, last = capsys.readouterr().err.splitlines()
    assert last == "prunelens: stopped; the same command goes on from here"
    became = ["prunelens: the interruption came out as RuntimeError: from inside a library"]
    assert more == (became if becomes == "another error" else [])


@pytest.mark.parametrize("code", [0, 1])
def test_without_one_nothing_changes(code, monkeypatch, capsys):
    monkeypatch.setattr(prunelens.cli.app, "run_app", lambda: code)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code and capsys.readouterr().err == ""


def test_a_defect_is_shown_as_such(monkeypatch):
    def run_app():
        raise RuntimeError("a defect")

    monkeypatch.setattr(prunelens.cli.app, "run_app", run_app)
    with pytest.raises(RuntimeError, match="a defect"):
        main()


@BOTH
def test_a_stage_in_which_it_becomes_another_error_has_not_failed(number, tmp_path):
    """Else the study would go on with the next stage."""
    for error in (RuntimeError("from inside a library"), UserError("a field is wrong")):

        def make(error=error):
            try:
                signal.raise_signal(number)
            except KeyboardInterrupt:
                raise error from None

        with pytest.raises(KeyboardInterrupt), interruptible():
            failure_of(make, tmp_path / "logs" / "x.log")
        assert not is_interrupted()
    assert not (tmp_path / "logs").exists()


@BOTH
def test_what_was_to_come_again_does_not_come_after_the_end(number):
    with interruptible() as received:
        deaf = Deaf(number)
        del deaf
    assert received == [number]
    time.sleep(4 * AGAIN_AFTER)  # by the handler of the process it would end these tests
    assert received == [number]
