"""What a terminal would obey is shown, whoever wrote it."""

import io
import pathlib
import re
import unicodedata

import pytest
from rich.markup import escape
from rich.table import Table

from prunelens.cli import main
from prunelens.console import Console
from prunelens.terminal import inert, say

SOURCE = pathlib.Path(__file__).parents[2] / "src" / "prunelens"
RED, TITLE, C1, BACKWARDS = "\x1b[31m", "\x1b]0;owned\x07", "\x9b31m", "\u202egnp.exe"


def is_obeyed(character):
    """Controls, and formats that turn the direction of text (not the joiners of scripts)."""
    turns = (
        unicodedata.bidirectional(character)
        in (*("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"),)
        or character in "\u061c\u200e\u200f"
    )
    kind = unicodedata.category(character)
    return turns or kind == "Cs" or (kind == "Cc" and character not in "\t\n")


def test_every_character_is_obeyed_or_left_alone():
    for number in range(0x110000):
        character = chr(number)
        if is_obeyed(character):
            assert inert(character).startswith("\\") and inert(character).isprintable()
        else:
            assert inert(character) == character
    assert inert(f"a{RED}b{BACKWARDS}") == r"a\x1b[31mb\u202egnp.exe"


def test_a_console_leaves_escapes_in_all_that_it_prints():
    shown = io.StringIO()
    console = Console(file=shown, width=200)
    table = Table("name", title=escape(TITLE))
    table.add_row(escape(RED), C1)
    for what in (RED, table, [RED], {RED: TITLE}):
        console.print(what, BACKWARDS)
    console.log(RED)
    assert not any(map(is_obeyed, shown.getvalue()))
    assert r"\x1b[31m" in shown.getvalue()


def test_colours_of_our_own_remain():
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, color_system="standard", highlight=False)
    console.print(f"[red]{RED}[/]")
    assert shown.getvalue().count("\x1b") == 2
    assert r"\x1b[31m" in shown.getvalue()


def test_a_line_is_inert_and_can_always_be_written(capfdbinary):
    say(f"{RED} {C1} \ud800", flush=True)
    say(TITLE, error=True, flush=True)
    out, err = capfdbinary.readouterr()
    assert out == rb"\x1b[31m \x9b31m \ud800" + b"\n"
    assert err == rb"\x1b]0;owned\x07" + b"\n"


@pytest.mark.parametrize("command", ["plan", "run", "status", "report", "view", "clean"])
def test_a_path_that_would_be_obeyed_is_told_harmlessly(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["prunelens", command, str(tmp_path / f"{RED}{BACKWARDS}")])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert not any(map(is_obeyed, out + err))
    assert r"\x1b[31m" in err


def test_reasons_in_a_received_folder_are_told_harmlessly(monkeypatch, capsys):
    row = {"run": f"m/{C1}", "status": "failed", "present": 0, "stages": 1}
    rows = [{**row, "reason": f"{RED}{TITLE}[red]"}]
    monkeypatch.setattr("prunelens.study.folder.study_status", lambda *_: rows)
    monkeypatch.setattr("sys.argv", ["prunelens", "status", "."])
    with pytest.raises(SystemExit):
        main()
    shown = "".join(capsys.readouterr())
    assert not any(map(is_obeyed, shown))
    assert "owned" in shown


def test_nothing_else_writes_to_a_terminal():
    direct = re.compile(
        r"^ *print\(|rich.console import.*Console|sys\.std(out|err)\.", re.MULTILINE
    )
    for path in SOURCE.rglob("*.py"):
        if path.name not in ("terminal.py", "console.py"):
            assert not direct.search(path.read_text(encoding="utf-8")), path
