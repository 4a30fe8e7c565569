"""The documentation builds without a warning, fetches nothing, and leaves nothing out."""

import html.parser
import pathlib
import re
import subprocess
import sys

import pytest
from ruamel.yaml import YAML
from typer.main import get_command

from prunelens.cli.app import app
from prunelens.config import NEEDS
from prunelens.report.questions import figures

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
LOADS = {  # what a browser fetches by itself: element -> attributes
    "script": ("src",),
    "link": ("href",),
    "img": ("src", "srcset"),
    "iframe": ("src",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
    "audio": ("src",),
    "object": ("data",),
    "embed": ("src",),
    "use": ("href", "xlink:href"),
}
MOST_BYTES = 80_000  # of a picture


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as `make docs` builds it, elsewhere."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def navigation():
    pages = YAML(typ="safe", pure=True).load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))[
        "nav"
    ]
    return [path for page in pages for path in page.values()]


def fetched(page):
    """What a browser fetches from somewhere else when it opens the page."""
    found = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            for name, value in attributes:
                if name in LOADS.get(tag, ()) and re.match(r"\s*(?:https?:)?//", value or ""):
                    found.append(f"<{tag} {name}={value}>")

    Reader().feed(page)
    return found + re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\"']+", page)


def test_every_page_is_built_and_every_document_is_a_page(site):
    pages = navigation()
    assert sorted(pages) == sorted(path.name for path in DOCS.glob("*.md"))
    for page in pages:
        assert (site / page).with_suffix(".html").is_file(), page


def test_no_page_or_style_fetches_from_elsewhere(site):
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(pages) > len(navigation())
    for page in pages:
        assert not fetched(page.read_text(encoding="utf-8")), page.relative_to(site)


@pytest.mark.parametrize(
    "markup",
    [
        '<script src="https://a.b/c.js">',
        '<link rel="preconnect" href="//fonts.b">',
        "<img srcset='http://a.b/c.png 2x'>",
        "<style>@import 'https://a.b/c.css'</style>",
        "<style>p {background: url(//a.b/c)}</style>",
    ],
)
def test_what_is_fetched_is_seen(markup):
    assert fetched(markup)
    assert not fetched('<a href="https://a.b">a link that is followed on a click</a>')


def test_every_question_has_its_section():
    headings = re.findall(r"^## (.+)$", (DOCS / "questions.md").read_text("utf-8"), re.MULTILINE)
    sections = [name for heading in headings for name in re.findall(r"`(\w+)`", heading)]
    assert sorted(sections) == sorted(NEEDS)


def test_every_figure_is_explained():
    page = (DOCS / "questions.md").read_text("utf-8")
    for name, figure in figures().items():
        number = figure.title.split(":")[0]
        assert f"**{number}" in page, number
        assert f"figures/{name}.png" in page or name == "fig9_selftest"  # of another study


def test_pictures_are_small():
    for picture in (DOCS / "figures").glob("*.png"):
        assert picture.stat().st_size <= MOST_BYTES, picture.name


def test_every_command_is_in_the_quick_start():
    page = (DOCS / "index.md").read_text(encoding="utf-8")
    for command in get_command(app).commands:
        assert f"`prunelens {command}" in page, command


def test_every_example_is_in_the_quick_start_and_in_the_index():
    names = {
        path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".ipynb")
    }
    for page in (DOCS / "index.md", ROOT / "examples" / "README.md"):
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r"\w+\.(?:py|ipynb)\b", text)) >= names, page


def test_contributing_names_what_is_there():
    """Every path exists, and every name in capitals or of a class stands in a file of its row."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    added, changed = (part.split("\n## ")[0] for part in text.split("## Where do I ")[1:])
    rows = [line.split("|")[1:-1] for line in (added + changed).splitlines() if line[:2] == "| "]
    rows = [row for row in rows if row[0].strip() != "What"]
    assert len(rows) >= 15
    for what, where, *then in rows:
        paths = _paths(where)
        found = [_of_the_house(path) for path in (*paths, *_paths("".join(then)))]
        files = [
            file for path in found for file in ([path] if path.is_file() else path.glob("*.py"))
        ]
        code = "".join(file.read_text(encoding="utf-8") for file in files if file.suffix == ".py")
        for name in re.findall(r"`([A-Z]\w+)`", where):
            assert re.search(rf"\b{name}\b", code), f"{what}: {name}"
        if what.strip().startswith(SIX):
            assert 1 <= len(set(paths)) <= 3, (what, paths)
    assert sum(row[0].strip().startswith(SIX) for row in rows) == len(SIX)
    for path in _paths(added.split("What lives outside")[1]):
        _of_the_house(path)


SIX = (
    *("a question", "a pruning criterion", "a source of text", "an SAE architecture"),
    *("an executor", "a column of a table"),
)


def _paths(text):
    return [named for named in re.findall(r"`([\w./]+)`", text) if re.search(r"[./]", named)]


def _of_the_house(path):
    """Raises AssertionError where no such file or folder is."""
    found = [root / path for root in (ROOT / "src" / "prunelens", ROOT) if (root / path).exists()]
    assert found, f"CONTRIBUTING.md names {path}, which is not there"
    return found[0]
