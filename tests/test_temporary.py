"""What is being written: it takes its place whole, and what a killed process left goes."""

import os
import subprocess
import sys
import threading

import pytest

from prunelens.temporary import is_left, new_folder, remove, replacing, temporary_beside

DEAD = 2**22 + 1  # no process has this number


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(folder, content):
    (folder / "deeper").mkdir()
    (folder / "deeper" / "a.txt").write_text(content)


def killed(path):
    """What a process of this machine that is gone was writing."""
    mine = temporary_beside(path.with_name(f".{path.name}"))
    return mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{DEAD}-"))


def test_an_orphan_that_nobody_waits_for_is_gone(tmp_path):
    """In a container without an init, what a killed run left would be kept for a day."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # it has ended and stays a zombie
    mine = temporary_beside(tmp_path / "x")
    theirs = mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{ended.pid}-"))
    mine.mkdir(), theirs.mkdir()
    assert not is_left(mine) and is_left(theirs)
    ended.wait()
    assert is_left(theirs)


def test_no_two_makers_write_to_one_folder(tmp_path):
    names = {temporary_beside(tmp_path / "x").name for _ in range(100)}
    assert len(names) == 100 and all(name.startswith("x.") for name in names)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path, monkeypatch, at_once):
    if not at_once:  # as on other systems than Linux
        monkeypatch.setattr("prunelens.temporary.sys.platform", "other")
    for number in range(3):
        with new_folder(tmp_path / "x") as folder:
            write(folder, str(number))
        assert (tmp_path / "x" / "deeper" / "a.txt").read_text() == str(number)
        assert names(tmp_path) == ["x"]


@pytest.mark.skipif(sys.platform != "linux", reason="folders are exchanged in one step there")
def test_there_is_no_moment_without_a_folder(tmp_path):
    ended, missed = threading.Event(), []

    def look():
        while not ended.is_set():
            if not (tmp_path / "x" / "deeper" / "a.txt").exists():
                missed.append(1)

    with new_folder(tmp_path / "x") as folder:
        write(folder, "first")
    looking = threading.Thread(target=look)
    looking.start()
    for number in range(100):
        with new_folder(tmp_path / "x") as folder:
            write(folder, str(number))
    ended.set()
    looking.join()
    assert not missed


@pytest.mark.parametrize("writing", [new_folder, replacing])
def test_a_failure_leaves_what_was_there(tmp_path, writing):
    with writing(tmp_path / "x") as new:
        write(new, "old") if writing is new_folder else new.write_text("old")
    before = (tmp_path / "x").stat()
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "x") as new:
        write(new, "new") if writing is new_folder else new.write_text("new")
        raise ZeroDivisionError
    assert names(tmp_path) == ["x"] and (tmp_path / "x").stat() == before


@pytest.mark.parametrize("name", ["x", "x[1]"])
def test_what_killed_processes_left_goes_with_the_next(tmp_path, name):
    final = tmp_path / name
    other, mine = killed(tmp_path / "other"), temporary_beside(tmp_path / f".{name}")
    for path in (killed(final), other, mine):
        path.mkdir()
    killed(final).write_text("half a file")
    with new_folder(final) as folder:
        write(folder, "new")
    assert names(tmp_path) == sorted([name, other.name, mine.name])


def test_what_others_call_alike_is_theirs(tmp_path):
    """The folder beside which an export is written may be anybody's."""
    theirs = [".x.backup.tmp", ".x.tmp", ".x.a-1-b.tmp", ".x.notes-2024-draft.tmp", "x.1.tmp"]
    for name in theirs:
        (tmp_path / name).write_text("years of work")
        os.utime(tmp_path / name, (0, 0))
    for writing in (new_folder, replacing):
        with writing(tmp_path / "x") as new:
            write(new, "new") if writing is new_folder else new.write_text("new")
        remove(tmp_path / "x")
    assert names(tmp_path) == sorted(theirs)


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    remove(tmp_path / "link")
    remove(tmp_path / "nothing")
    assert names(tmp_path) == ["kept"] and names(tmp_path / "kept") == ["a.txt"]
