"""The repository keeps its promises: tree of files, pins, imports, no pickle, no machine's paths.

The file tree in CONTRIBUTING.md is a fenced block of this form, two spaces of indentation a level:

    ```text
    prunelens/
      README.md, LICENSE   one or more names, then two or more spaces and what they are for
      src/prunelens/       a folder ends with a slash
        errors.py          UserError
        prune/             a folder with nothing below it stands for all that it holds
    ```

Whatever it names exists, and where it lists the content of a folder, it lists all of it; names
that start with a dot may be left out.
"""

from __future__ import annotations

import ast
import fnmatch
import os
import pathlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from beartype.roar import BeartypeCallHintParamViolation
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from prunelens.prune.sparsegpt import prune_matrix

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "prunelens"


# ---- the file tree in CONTRIBUTING.md ----


class Entry(NamedTuple):
    path: str  # relative to the root; a folder's ends with a slash
    is_leaf: bool  # nothing is listed below it


def test_the_tree_is_the_one_on_disk() -> None:
    """Every name exists and no file of a listed folder is missing."""
    entries = tree_entries((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    missing, unlisted = compare(entries, [str(p.relative_to(ROOT)) for p in repository_files()])
    assert not missing, f"CONTRIBUTING.md names what does not exist: {missing}"
    assert not unlisted, f"CONTRIBUTING.md leaves out: {unlisted}"


def test_tree_comparison_sees_both_kinds_of_difference() -> None:
    readme = (
        "```text\nprunelens/\n  a.py, b.py   two\n"
        "  src/p/       code\n    c.py  x\n  d/     all\n```\n"
    )
    entries = tree_entries(readme)
    assert [e.path for e in entries] == ["a.py", "b.py", "src/p/", "src/p/c.py", "d/"]
    assert compare(entries, ["a.py", "b.py", "src/p/c.py", "d/e/f.py", ".dot"]) == ([], [])
    assert compare(entries, ["b.py", "src/p/c.py", "src/p/g.py", "d/f", "h/i.py"]) == (
        ["a.py"],
        ["src/p/g.py", "h/"],
    )


def tree_entries(readme: str) -> list[Entry]:
    """The entries of a tree, top-down."""
    block = re.search(r"^```text\nprunelens/\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    assert block, "CONTRIBUTING.md has no ```text block whose first line is `prunelens/`"
    paths: list[str] = []
    folders: list[str] = []  # the folder that each level of indentation is in
    for line in block[1].splitlines():
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.split(r"\s{2,}", line.strip())[0].split(", ")
        assert 1 <= depth <= len(folders) + 1, f"the tree, odd indentation: {line!r}"
        folders = folders[: depth - 1]
        paths += ["".join(folders) + name for name in names]
        if names[-1].endswith("/"):
            folders.append(names[-1])
    return [
        Entry(path, not any(p != path and p.startswith(path) for p in paths if path.endswith("/")))
        for path in paths
    ]


def compare(entries: list[Entry], files: list[str]) -> tuple[list[str], list[str]]:
    """What the tree names and the disk lacks; what the disk has and the tree leaves out."""
    holds = {parent for file in files for parent in _with_parents(file)}
    missing = [e.path for e in entries if e.path not in holds]
    named = {parent for e in entries for parent in _with_parents(e.path)}
    listed_as_a_whole = tuple(e.path for e in entries if e.is_leaf and e.path.endswith("/"))
    unlisted = {}
    for file in files:
        outermost = next((p for p in _with_parents(file) if p not in named), file)
        hidden = pathlib.PurePath(outermost).name.startswith(".")
        if outermost not in named and not hidden and not file.startswith(listed_as_a_whole):
            unlisted[outermost] = True
    return missing, list(unlisted)


def _with_parents(path: str) -> list[str]:
    """`a/b/c` -> `a/`, `a/b/`, `a/b/c`."""
    return [path[: m.end()] for m in re.finditer("/(?!$)", path)] + [path]


# ---- what the code may hold ----

PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
UNSAFE_CALLS = {
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "np.load", "numpy.load"),
    *("pd.read_pickle", "eval", "exec", "compile", "__import__", "os.system", "os.popen"),
}
TRUSTING = {  # an argument -> the values that let a file choose what is run
    "trust_remote_code": lambda value: value is not False,
    "allow_pickle": lambda value: value is not False,
    "weights_only": lambda value: value is not True,
    "use_safetensors": lambda value: value is not True,
    "shell": lambda value: value is not False,
}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_module_has_a_docstring_and_nothing_unsafe(path: pathlib.Path) -> None:
    """Neither pickle nor code from a model's repository can run through prunelens."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "no module docstring"
    assert not list(unsafe(tree))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from yaml import safe_load",
        "import torch\ntorch.load('f')",
        "from torch import save",
        "AutoModel.from_pretrained('m', trust_remote_code=True)",
        "frame.to_pickle('f')",
        "np.save('f', a, allow_pickle=True)",
        "from os import system",
        "AutoModelForCausalLM.from_pretrained('m', trust_remote_code=False)",
        "AutoModelForCausalLM.from_pretrained('m', use_safetensors=True)",
        "AutoTokenizer.from_pretrained('m')",
        "AutoConfig.from_pretrained('m', trust_remote_code=chosen)",
        "AutoModelForCausalLM.from_config(c)",
        "load(f, weights_only=False)",
        "subprocess.run('x', shell=True)",
        "YAML(typ='unsafe').load(text)",
    ],
)
def test_unsafe_code_is_seen(source: str) -> None:
    assert list(unsafe(ast.parse(source)))


def unsafe(tree: ast.AST) -> Iterator[str]:
    """What in the code reads or writes pickles, or trusts code that came with data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in PICKLING)
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{a.name}" for a in node.names}
            yield from names & UNSAFE_CALLS
            if (node.module or "").split(".")[0] in PICKLING:
                yield str(node.module)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in UNSAFE_CALLS or called.endswith((".to_pickle", ".read_pickle")):
                yield called
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            for name, value in given.items():
                constant = value.value if isinstance(value, ast.Constant) else None
                if name in TRUSTING and TRUSTING[name](constant):
                    yield ast.unparse(node)
                if called == "YAML" and name == "typ" and constant != "safe":
                    yield ast.unparse(node)
            if re.match(r"Auto\w+\.from_(pretrained|config)$", called):
                needed = {"trust_remote_code"}
                if called.startswith("AutoModel") and called.endswith("pretrained"):
                    needed.add("use_safetensors")
                if needed - set(given):
                    yield ast.unparse(node)


def test_shapes_are_checked_under_pytest() -> None:
    with pytest.raises(BeartypeCallHintParamViolation, match="products"):
        prune_matrix(torch.ones(3, 4), torch.ones(5, 5), name="m", scope="row", sparsity=0)


def test_no_file_names_a_place_on_one_machine() -> None:
    """Absolute paths of whoever wrote a file have no place in the repository."""
    place = re.compile(r"(?<![\w.:/-])/(?:work|root|home|opt|mnt|Users)/\w+")
    found = {
        str(path.relative_to(ROOT)): match[0]
        for path in repository_files()
        if (text := _text(path)) and (match := place.search(text))
    }
    assert not found


def _text(path: pathlib.Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def repository_files() -> list[pathlib.Path]:
    """Every file that .gitignore leaves in; each of its lines is one name, anywhere in the tree."""
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    ignored = [".git", "shared"] + [
        line.rstrip("/") for line in lines if line and not line.startswith("#")
    ]
    files = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [f for f in folders if not any(fnmatch.fnmatch(f, i) for i in ignored)]
        kept = [n for n in names if not any(fnmatch.fnmatch(n, i) for i in ignored)]
        files += [pathlib.Path(folder) / name for name in kept]
    return sorted(files)


# ---- dependencies and imports ----

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_constraints_pin_every_dependency_within_its_range() -> None:
    pins: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    optional = [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
    for requirement in map(Requirement, PROJECT["dependencies"] + optional):
        if requirement.name == PROJECT["name"]:  # an extra that brings another one
            continue
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(pin), f"{requirement} excludes its pin {pin}"
    assert pins["torch"] == "2.13.0"  # what the Makefile installs first


def test_package_imports_only_what_it_depends_on() -> None:
    imported = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(str(node.module).split(".")[0])
    optional = [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
    names = [Requirement(r).name for r in PROJECT["dependencies"] + optional]
    offered = {canonicalize_name(n).replace("-", "_").replace(".", "_") for n in names}
    offered |= {"prunelens", "ruamel", "sklearn", "PIL"}  # ruamel.yaml, scikit-learn, pillow
    assert not imported - offered - sys.stdlib_module_names


def test_import_is_fast_and_brings_no_torch() -> None:
    """In a fresh interpreter, best of three: a busy machine slows some of them down."""
    code = (
        "import sys, time; start = time.perf_counter(); import prunelens; "
        "print(time.perf_counter() - start, 'torch' in sys.modules)"
    )
    seconds = []
    for _ in range(3):
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        elapsed, brings_torch = result.stdout.split()
        assert brings_torch == "False"
        seconds.append(float(elapsed))
    assert min(seconds) < 0.3
