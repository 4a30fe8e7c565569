"""Study files: 500 generated ones, and YAML made to fill the memory."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import pathlib
import signal
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings

import prunelens.study.preflight.preview
import prunelens.study.preflight.text_checks
from prunelens.cli import main
from prunelens.cli.plan_view import show_preflight
from prunelens.config import StudyConfig, study_from_data
from prunelens.corpus import LookedAt
from prunelens.errors import UserError
from prunelens.study.preflight.preview import preflight
from prunelens.study_file import (
    MOST_BYTES,
    MOST_DEPTH,
    MOST_VALUES,
    parse_yaml,
    read_study,
    read_text,
)

PLANNED = "study: a plan could be made"
SECONDS = 10.0  # of one file, on a machine that is busy with other things
BUNDLED: dict[str, Any] = {
    "name": "hostile",
    "models": [{"name": "bundled", "layers": [2], "dtype": "float32"}],
    "corpus": {"source": "stdlib", "context_tokens": 256, "train_tokens": 100000},
    "perplexity": {"context_tokens": [256]},
    "prunings": [
        {"criterion": "wanda", "scope": "row", "sparsities": [0.3, 0.5]},
        {"checkpoint": "some/where", "name": "theirs"},
    ],
    "sae": {"expansion": 4, "k": 4, "steps": 24, "batch_tokens": 64, "seeds": [0, 1]},
    "taus": [0.5, 0.7],
    "questions": ["stability", "survival", "persistence", "transfer"],
}
PLANTED: dict[str, Any] = {
    "name": "planted",
    "models": [{"name": "planted", "layers": [0]}],
    "prunings": [{"criterion": "planted", "scope": "independent", "sparsities": [0.3]}],
    "questions": ["survival", "persistence"],
}
SPECIAL = [
    *(
        "../../../etc/passwd",
        "/etc/passwd",
        "~",
        "~nobody-has-this-home/x",
        "",
        ".",
        "..",
        "a/../b",
    ),
    *(
        "\0",
        "a\nb",
        "\x1b[31mred",
        "\ud800",
        "\u202etxt",
        "=cmd()",
        "@x",
        "-1",
        "{{7*7}}",
        "${HOME}",
    ),
    *("<img src=x onerror=alert(1)>", "'; DROP TABLE", "%s%n", "[bold]", "9" * 400, "x" * 5000),
]
Text = Callable[[Any], str]


# --- what is generated ----------------------------------------------------------------------------

numbers = (
    st.integers() | st.floats() | st.sampled_from([2**63, -(2**63), 10**30, 10**300, -1, 0, 1e308])
)
leaves = st.none() | st.booleans() | numbers | st.sampled_from(SPECIAL) | st.text(max_size=20)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
) | st.integers(1, 60).map(lambda depth: nested(depth))


def nested(depth: int) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


@st.composite
def broken_studies(draw: st.DrawFn) -> str:
    """A study in which a few places were changed, as text."""
    study = json.loads(json.dumps(draw(st.sampled_from([BUNDLED, PLANTED]))))
    for _ in range(draw(st.integers(1, 3))):
        places = list(walk(study))
        parent, key = draw(st.sampled_from(places))
        change = draw(st.sampled_from(["replace", "replace", "remove", "add", "double"]))
        if change == "remove":
            del parent[key]
        elif change == "add" and isinstance(parent, dict):
            parent[draw(st.text(max_size=12) | st.sampled_from(["nmae", "seeds", "__class__"]))] = (
                draw(values)
            )
        elif change == "double" and isinstance(parent, list):
            parent.append(parent[key])
        else:
            parent[key] = draw(values)
        if not study:
            break
    return as_yaml(study)


@st.composite
def broken_texts(draw: st.DrawFn) -> str:
    """The text of a study with pieces of YAML and of nothing put in or cut out."""
    text = as_yaml(BUNDLED)
    pieces = ["&a ", "*a", "!!python/name:os.system ", "<<: ", "[", "{", "}", "]", "\t", "- ", "? "]
    pieces += ["|\n", "%YAML 1.1\n", "---\n", "...\n", "\0", "\ufeff", '"', "'", "#", "!", "\x85"]
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        cut = draw(st.integers(0, 20))
        text = text[:at] + draw(st.sampled_from(pieces) | st.text(max_size=6)) + text[at + cut :]
    return text


def walk(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in nested lists and mappings: what holds it, and its key there."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        yield data, key
        if isinstance(value, dict | list):
            yield from walk(value)


def as_yaml(data: Any) -> str:
    """Flow style; numbers that JSON does not have as YAML has them."""
    if isinstance(data, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {as_yaml(v)}" for k, v in data.items()) + "}"
    if isinstance(data, list):
        return "[" + ", ".join(map(as_yaml, data)) + "]"
    if isinstance(data, float) and (data != data or abs(data) == float("inf")):
        return ".nan" if data != data else ".inf" if data > 0 else "-.inf"
    if isinstance(data, int) and abs(data) > 10**4000:
        return hex(data)
    return json.dumps(data)


# --- 500 of them ----------------------------------------------------------------------------------


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """`main` in this process; what it sets for a process of its own is set back."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["prunelens", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code

    before, handlers = signal.getsignal(signal.SIGTERM), logging.root.handlers[:]
    yield run
    signal.signal(signal.SIGTERM, before)
    logging.root.handlers[:] = handlers


@settings(
    max_examples=500,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(text=st.one_of(broken_studies(), broken_studies(), broken_texts(), st.text(max_size=200)))
def test_500_study_files_end_in_a_plan_or_in_one_line(
    text: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    command_line: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the command `plan` reads and checks them, without what it measures."""
    monkeypatch.setattr(prunelens.study.preflight.preview, "preflight", laid_out)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path = tmp_path / "study.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    started = time.perf_counter()
    assert command_line("plan", str(path)) == 2
    assert time.perf_counter() - started < SECONDS
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("prunelens: ")
    assert printed.err.count("\n") == 1 and printed.err.strip().isprintable()
    assert len(printed.err) < 1000
    assert [p.name for p in tmp_path.iterdir()] == ["study.yaml"]


def laid_out(study: StudyConfig, **_: object) -> None:
    """In place of the preflight: itself, for models that are here, but nothing is measured, and no
    tokens are counted, which takes seconds of the standard library.
    """
    if needs_no_hub(study):
        with pytest.MonkeyPatch.context() as patch:
            seen = LookedAt(eval_tokens=10_000, highest_id=torch.tensor(0), bos_token=None)
            patch.setattr(prunelens.study.preflight.text_checks, "check_splits", lambda *_: seen)
            found = preflight(study, calibration_seconds=0)
        with contextlib.redirect_stdout(io.StringIO()):
            show_preflight(study.name, found)
        json.dumps(found._asdict())
    raise UserError(PLANNED)


def needs_no_hub(study: StudyConfig) -> bool:
    return {model.name for model in study.models} <= {"bundled", "planted"}


@st.composite
def odd_studies(draw: st.DrawFn) -> Any:
    """A study in which one or two values are others, many of them numbers that may be meant."""
    study = json.loads(json.dumps(draw(st.sampled_from([BUNDLED, PLANTED]))))
    for _ in range(draw(st.integers(1, 2))):
        parent, key = draw(st.sampled_from(list(walk(study))))
        parent[key] = draw(st.integers(-3, 12) | st.sampled_from(ODD) | leaves)
    return study


ODD = [255, 257, 1000, 10**9, 2**31, 2**40, 0.0, 0.5, 0.999, 1.0, 5e-324, 1e-300, 1e300, [], {}]


def test_studies_that_are_valid_pass_the_whole_preflight_or_end_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reached = 0

    @settings(max_examples=1000, derandomize=True, database=None, deadline=None)
    @given(odd_studies())
    def check(data: Any) -> None:
        nonlocal reached
        with contextlib.suppress(UserError):
            study = study_from_data(data)
            reached += needs_no_hub(study)
            with pytest.raises(UserError):
                laid_out(study)

    check()
    assert reached >= 20  # of 27 to 41: hypothesis draws constants of whatever is imported by then


@pytest.mark.parametrize("change", [{"name": "9" * 400}, {"sae": {"expansion": "9" * 400}}])
def test_studies_whose_preflight_ended_in_a_traceback(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"name|expansion"):
        study_from_data({**PLANTED, **change})


def test_the_generated_files_are_of_all_kinds() -> None:
    """So that the test above is not about one early mistake alone."""
    kinds = {"planned": 0, "study": 0, "yaml": 0}

    @settings(max_examples=100, derandomize=True, database=None, deadline=None)
    @given(st.one_of(broken_studies(), broken_texts()))
    def count(text: str) -> None:
        try:
            data = parse_yaml(text, where="x")
        except UserError:
            kinds["yaml"] += 1
            return
        try:
            study_from_data(data)
            kinds["planned"] += 1
        except UserError:
            kinds["study"] += 1

    count()
    assert min(kinds.values()) >= 2, kinds  # 8 studies of 100, or fewer: see `reached` above


# --- YAML that grows ------------------------------------------------------------------------------

NINE = range(1, 30)
LAUGHS = "l0: &l0 [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in NINE
)
MERGES = "l0: &l0 {x: 1}\n" + "\n".join(
    f"l{i}: &l{i} {{<<: [{', '.join([f'*l{i - 1}'] * 9)}]}}" for i in NINE
)
GRID = "{criterion: wanda, scope: row, sparsities: &s [" + "0.3, " * 900 + "]}"
BOMBS = {
    "billion laughs": (LAUGHS, "values"),
    "merge keys": (MERGES, "values"),
    "in a field that is shown": (f"{LAUGHS}\nname: *l29", "values"),
    "conditions": (f"prunings: [&g {GRID}" + ", *g" * 200 + "]", "values"),
    "values": ("taus: [" + "0.5, " * (MOST_VALUES + 1) + "]", "values"),
    "itself": ("name: &x [*x]", "inside itself"),
    "deep list": ("[" * 20_000, "deep"),
    "deep mapping": ("\n".join(" " * i + "a:" for i in range(MOST_DEPTH + 5)), "deep"),
    "deep closed": ("[" * 500 + "]" * 500, "deep"),
    "huge scalar": ("name: " + "x" * MOST_BYTES, "larger"),
    "huge integer": ("sae: {k: 0x" + "F" * 100_000 + "}", "number"),
    "long integer": ("sae: {k: " + "9" * 10_000 + "}", "not valid YAML"),
    "python object": ("name: !!python/object/apply:os.system ['touch ran']", "tag"),
    "python name": ("name: !!python/name:os.system", "tag"),
    "unknown tag": ("name: !x y", "tag"),
    "bad bool": ("name: !!bool x", "tag"),
    "duplicate key": ("name: a\nname: b", "duplicate"),
    "unhashable key": ("{{a: b}: c}", "not valid YAML"),
    "two documents": ("name: a\n---\nname: b", "not valid YAML"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_yaml_that_grows_is_refused_before_it_does(
    kind: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text, expected = BOMBS[kind]
    path = tmp_path / "study.yaml"
    path.write_text(text)
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(UserError, match=expected):
        read_study(path)
    seconds, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 2 * SECONDS and peak < 100e6
    assert not (tmp_path / "ran").exists()


def test_aliases_are_counted_as_what_they_stand_for() -> None:
    assert parse_yaml("a: &x [1, 2]\nb: [*x, *x]", where="") == {"a": [1, 2], "b": [[1, 2]] * 2}
    most = (MOST_VALUES - 10) // 100
    hundred = f"a: &x [{', '.join('1' * 99)}]\n"
    assert parse_yaml(hundred + "b: [" + "*x, " * (most - 1) + "]", where="")
    with pytest.raises(UserError, match=str(MOST_VALUES)):
        parse_yaml(hundred + "b: [" + "*x, " * (most + 1) + "]", where="")


def test_a_file_without_an_end_is_not_read_to_its_end(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="larger"):
        read_text(pathlib.Path("/dev/zero"))
    for other in (tmp_path, pathlib.Path("/dev/zero")):
        with pytest.raises(UserError, match="no file"):
            read_study(other)


@pytest.mark.parametrize(
    "data",
    [
        {"sae": {"seeds": list(range(101))}},
        {"taus": [i / 1000 for i in range(1, 102)]},
        {"models": [{"layers": list(range(700))}], "prunings": BUNDLED["prunings"]},
        {"sae": {"k": 2**63}},
        {2**70: 1},
    ],
)
def test_a_study_has_limits(data: dict[Any, Any]) -> None:
    with pytest.raises(UserError, match=r"100|2000|number|integer"):
        study_from_data(data)


@pytest.mark.parametrize(
    "setting", ["²=1", "a.²=1", "prunings.9=1", "prunings." + "9" * 5000 + "=1"]
)
def test_settings_name_places(
    setting: str, command_line: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line("plan", "demo", "--set", setting) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and printed.startswith("prunelens: ")
