"""The explorer's page in a real browser: what a reader does, and what hostile text must not do."""

from __future__ import annotations

import dataclasses
import functools
import http.server
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from explorer_world import (
    HOSTILE_COLUMN,
    HOSTILE_CONDITION,
    HOSTILE_STUDY,
    HOSTILE_TOKEN,
    LOST_LATENT,
    MATCHED,
    NEEDLE_LATENT,
    SILENT_LATENT,
    explorer_world,
)
from prunelens.report.explorer.content import DENSE, Column, Condition, Explorer, View
from prunelens.report.explorer.folder import CONTENT_SECURITY_POLICY, write_explorer

pytestmark = pytest.mark.browser
ROWS = ".tabulator-row a[data-latent]"
MILLISECONDS = 10_000  # the longest that anything may take to appear
MANY = {"num_latents": 18_432, "num_conditions": 6, "windows": 128, "context_tokens": 256}
OPENS_WITHIN, SEARCHES_WITHIN = 6000, 4000  # milliseconds: three times what it takes when alone


class Sight(NamedTuple):
    """A page and what it must not have done."""

    page: Any
    dialogs: list[str]
    errors: list[str]
    requests: list[str]

    def latents(self) -> list[int]:
        """Of the rows in the document, from the top; there is at least one, sooner or later."""
        links = self.page.locator(ROWS)
        links.first.wait_for()
        return [int(text[1:]) for text in links.all_text_contents()]

    def count(self) -> str:
        return str(self.page.locator(".count").first.text_content())


Open = Callable[..., Sight]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """One Chromium for all tests. Where there is none they are skipped, but not in CI."""
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next((path for name in names if (path := shutil.which(name))), None)
    if executable is None and not os.environ.get("CI"):
        pytest.skip("no Chromium on this machine")
    assert executable is not None, f"CI has none of {', '.join(names)}"
    if not os.environ.get("CI"):
        pytest.importorskip("playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def world() -> Explorer:
    return explorer_world()


@pytest.fixture(scope="module")
def view(world: Explorer) -> View:
    return world.views[0]


@pytest.fixture(scope="module")
def address(world: Explorer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the page, on the disk."""
    folder = write_explorer(world, tmp_path_factory.mktemp("small") / "explorer")
    return (folder / "index.html").as_uri()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Opens an address in a browser of its own; afterwards nothing hostile may have happened."""
    contexts, sights = [], []

    def open_at(address: str, wait: str = ROWS, **options: Any) -> Sight:
        context = browser.new_context(viewport={"width": 1300, "height": 800}, **options)
        context.set_default_timeout(MILLISECONDS)
        contexts.append(context)
        sight = _watched(context.new_page())
        sights.append(sight)
        sight.page.goto(address)
        sight.page.locator(wait).first.wait_for()
        return sight

    yield open_at
    for context in contexts:
        context.close()
    for sight in sights:
        assert sight.dialogs == []
        assert sight.errors == []


def _watched(page: Any) -> Sight:
    sight = Sight(page, [], [], [])

    def on_dialog(dialog: Any) -> None:
        sight.dialogs.append(dialog.message)
        dialog.dismiss()

    def on_console(message: Any) -> None:
        if message.type in {"error", "warning"}:
            sight.errors.append(message.text)

    page.on("dialog", on_dialog)
    page.on("console", on_console)
    page.on("pageerror", lambda error: sight.errors.append(str(error)))
    page.on("request", lambda request: sight.requests.append(request.url))
    return sight


def _until(page: Any, expression: str) -> None:
    """Wait for it (the browser's own way to wait would need `unsafe-eval` in the policy)."""
    for _ in range(MILLISECONDS // 20):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"never came true: {expression}")


def _column(of: View | Condition, key: str) -> Column:
    return next(column for column in of.columns if column.key == key)


def _by(values: np.ndarray, *, down: bool = False) -> list[int]:
    """Sorted as the page promises: undefined last, equal ones by index."""
    keys = np.where(np.isnan(values), np.inf, -values if down else values)
    return np.argsort(keys, kind="stable").tolist()


# --- the list -------------------------------------------------------------------------------------


def test_list_begins_with_what_was_lost_most(open_page: Open, address: str, view: View) -> None:
    sight = open_page(address)
    found = sight.latents()
    assert found[0] == LOST_LATENT
    expected = _by(_column(view.conditions[0], "persistence").values)
    assert found == expected[: len(found)]
    assert sight.count() == "300 of 300 latents"
    titles = sight.page.locator(".heading").all_text_contents()
    assert titles[:5] == ["latent", "fires on", "kept", "firing rate", "persistence"]


def test_every_request_is_to_the_folder(open_page: Open, address: str) -> None:
    sight = open_page(address)
    for hash_ in ("#/v0/latent/7", "#/v0/scatter", "#/v0/compare", "#/v0/c0/latent/5"):
        sight.page.goto(address + hash_)
        sight.page.wait_for_timeout(150)
    assert any("echarts" in request for request in sight.requests)
    folder = address.removesuffix("index.html")
    assert all(request.startswith((folder, "data:,")) for request in sight.requests)


def test_columns_sort(open_page: Open, address: str, view: View) -> None:
    sight = open_page(address)
    for down in (False, True):  # and another order is looked at from its top
        sight.page.evaluate("document.querySelector('.tabulator-tableholder').scrollTop = 5000")
        sight.page.get_by_role("button", name="mean activation").click()
        expected = _by(_column(view, "mean_activation").values, down=down)
        sight.page.locator(ROWS).first.filter(has_text=f"#{expected[0]}").wait_for()
        _until(sight.page, f"location.hash.includes('dir=desc') === {str(down).lower()}")
        found = sight.latents()
        assert found == expected[: len(found)]


def test_undefined_is_last_in_both_directions(open_page: Open, address: str, view: View) -> None:
    values = _column(view.conditions[0], "persistence").values
    undefined = np.flatnonzero(np.isnan(values))
    for direction in ("asc", "desc"):
        sight = open_page(f"{address}#/v0/latents?c=c0&sort=c.persistence&dir={direction}")
        sight.page.evaluate("document.querySelector('.tabulator-tableholder').scrollTop = 1e6")
        last = sight.page.locator(f"a[data-latent='{undefined[-1]}']")
        last.wait_for()
        assert sight.latents()[-len(undefined) :] == undefined.tolist()


def test_search_finds_text_where_latents_fire(open_page: Open, address: str) -> None:
    sight = open_page(address)
    sight.page.keyboard.press("/")
    sight.page.keyboard.type("NEEDLE")  # in the text " Nee" + "dle"
    sight.page.locator(".count", has_text="occurs 1 time").wait_for()
    assert sight.latents() == [NEEDLE_LATENT]
    assert "1 latent fires there" in sight.count()


def test_the_list_shows_what_a_latent_fires_on(open_page: Open, address: str, view: View) -> None:
    page = open_page(address).page
    page.get_by_role("searchbox").fill(f"#{NEEDLE_LATENT}")
    page.locator(".count", has_text="1 of 300").wait_for()
    row = int(np.searchsorted(view.contexts.latent, NEEDLE_LATENT))
    window, position = view.contexts.window[row], view.contexts.position[row]
    token = view.tokens.vocabulary[view.tokens.ids[window, position]]
    page.locator(".glimpse .fired", has_text=token.strip()).wait_for()
    assert page.locator(".glimpse .fired").count() == 1
    around = [
        "".join(view.tokens.vocabulary[i] for i in view.tokens.ids[window, first:last])
        for first, last in ((max(0, position - 3), position), (position + 1, position + 3))
    ]
    found = [page.locator(f".glimpse .{side}").text_content() for side in ("before", "after")]
    assert found == around
    assert page.locator(".heading", has_text="fires on").evaluate("it => it.tagName") == "SPAN"


def test_the_token_that_fires_is_in_sight_however_long_the_text_is(
    open_page: Open, view: View, tmp_path: pathlib.Path
) -> None:
    """Tokens of nothing but indentation must not push it out."""
    vocabulary = tuple(" " * 60 + word for word in view.tokens.vocabulary)
    tokens = dataclasses.replace(view.tokens, vocabulary=vocabulary)
    bare = dataclasses.replace(view, conditions=(), effects=None, tokens=tokens)
    folder = write_explorer(Explorer("long", (bare,)), tmp_path / "out")
    page = open_page((folder / "index.html").as_uri()).page
    page.locator(".glimpse .fired").first.wait_for()
    cells = page.locator(".glimpse", has=page.locator(".fired"))
    boxes = cells.evaluate_all(
        """cells => cells.map((cell) => {
          const [all, fired] = [cell, cell.querySelector(".fired")]
            .map((element) => element.getBoundingClientRect());
          return [fired.left - all.left, all.right - fired.right, fired.width];
        })"""
    )
    assert len(boxes) > 5
    assert all(left >= 0 and right >= 0 and width > 50 for left, right, width in boxes)


def test_search_agrees_with_a_plain_one(open_page: Open, address: str, view: View) -> None:
    sight = open_page(address)
    for text in ("quick", "word1", "g wo", "<SCRIPT", "not there"):
        occurrences, latents = _plain_search(view, text)
        sight.page.get_by_role("searchbox").fill(text)
        sight.page.locator(".count", has_text=f"“{text}” occurs").wait_for()
        assert f"occurs {occurrences:,} time" in sight.count()
        assert sight.count().startswith(f"{len(latents):,} of 300")
        if latents:
            assert set(sight.latents()) <= latents
        else:
            assert sight.page.locator(ROWS).count() == 0


def _plain_search(view: View, text: str) -> tuple[int, set[int]]:
    """How often the text occurs, and the latents that fire on one of its tokens."""
    marked, occurrences = set(), 0
    for window, ids in enumerate(view.tokens.ids.tolist()):
        words = [view.tokens.vocabulary[token].lower() for token in ids]
        owner = [position for position, word in enumerate(words) for _ in word]
        whole = "".join(words)
        for start in range(len(whole)):
            if whole.startswith(text.lower(), start):
                occurrences += 1
                marked |= {(window, owner[i]) for i in range(start, start + len(text))}
    contexts, latents = view.contexts, set()
    for row, activations in enumerate(contexts.activations[DENSE].tolist()):
        for offset, activation in enumerate(activations):
            position = int(contexts.position[row]) - contexts.either_side + offset
            if activation > 0 and (int(contexts.window[row]), position) in marked:
                latents.add(int(contexts.latent[row]))
    return occurrences, latents


def test_search_by_index(open_page: Open, address: str) -> None:
    sight = open_page(address)
    box = sight.page.get_by_role("searchbox")
    box.fill("#42")
    sight.page.locator(".count", has_text="1 of 300").wait_for()
    assert sight.latents() == [42]
    box.press("Enter")
    assert sight.page.get_by_role("heading", name="Latent #42").is_visible()
    sight.page.goto(f"{address}#/v0/latent/999")
    assert "no latent #999" in sight.page.get_by_role("alert").text_content()


def test_filters(open_page: Open, address: str, view: View) -> None:
    persistence = _column(view.conditions[2], "persistence").values
    rates, kept = _column(view, "firing_rate").values, view.conditions[2].kept
    sight = open_page(f"{address}#/v0/latents?c=c2")
    page = sight.page
    for choice, expected in (("lost", kept == 0), ("kept", kept == 1), ("unsaid", np.isnan(kept))):
        page.get_by_label("Fate", exact=True).select_option(choice)
        page.locator(".count", has_text=f"{expected.sum()} of 300").wait_for()
    page.get_by_label("Fate", exact=True).select_option("")
    page.get_by_label("Firing rate from").fill("0.001")
    page.get_by_label("to", exact=True).fill("0.01")
    page.get_by_label("Loss at least").fill("0.4")
    expected = (rates >= 0.001) & (rates <= 0.01) & (1 - persistence >= 0.4)
    page.locator(".count", has_text=f"{expected.sum()} of 300").wait_for()
    assert set(sight.latents()) <= set(np.flatnonzero(expected).tolist())
    page.get_by_role("button", name="Clear filters").click()
    page.locator(".count", has_text="300 of 300").wait_for()


def test_condition_is_chosen(open_page: Open, address: str, view: View) -> None:
    sight = open_page(address)
    sight.page.get_by_label("Condition", exact=True).select_option("c2")
    expected = _by(_column(view.conditions[2], "persistence").values)
    sight.page.locator(f"{ROWS} >> nth=1").filter(has_text=f"#{expected[1]}").wait_for()
    found = sight.latents()
    assert found == expected[: len(found)]


# --- a latent -------------------------------------------------------------------------------------


def test_latent_page_shows_dense_above_pruned(open_page: Open, address: str, view: View) -> None:
    sight = open_page(f"{address}#/v0/latent/{NEEDLE_LATENT}?c=c2", ".context")
    contexts = sight.page.locator(".context")
    assert contexts.count() == 4
    context = contexts.first
    assert context.locator(".who").all_text_contents() == ["dense", "wanda-row-0.50"]
    row = int(np.flatnonzero(view.contexts.latent == NEEDLE_LATENT)[0])
    for line, condition in ((0, DENSE), (1, "c2")):
        fires = view.contexts.activations[condition][row] > 0
        marked = context.locator(".line").nth(line).locator(".fires")
        assert marked.count() == fires.sum()
        peak = float(context.locator(".peak").nth(line).text_content())
        largest = np.nanmax(view.contexts.activations[condition][row])
        assert peak == pytest.approx(largest, rel=5e-3)
    assert context.locator(".middle").first.text_content() == "dle"
    sight.page.get_by_label("Under all conditions").check()
    assert context.locator(".who").count() == 4
    strip = sight.page.locator(".strip .fate")
    assert [text.split()[-1] for text in strip.all_text_contents()] == ["lost"] * 3
    assert strip.first.text_content().replace("✗ ", "").startswith("wanda-row-0.300.500")


def test_silent_latent_says_so(open_page: Open, address: str) -> None:
    sight = open_page(f"{address}#/v0/latent/{SILENT_LATENT}", ".chips")
    assert sight.page.get_by_text("It does not fire on the eval text.").is_visible()
    assert sight.page.locator(".strip .unsaid").count() == 3


def test_match_leads_there_and_back(open_page: Open, address: str) -> None:
    dense, own = MATCHED
    sight = open_page(f"{address}#/v0/latent/{dense}?c=c0", ".context")
    sight.page.get_by_text("each is the other’s nearest").wait_for()
    sight.page.get_by_role("link", name=f"#{own}", exact=True).click()
    sight.page.get_by_role("heading", name=f"Latent #{own} of wanda-row-0.30").wait_for()
    assert f"#/v0/c0/latent/{own}" in sight.page.url
    assert sight.page.locator(".context .who").first.text_content() == "wanda-row-0.30"
    sight.page.get_by_role("link", name=f"#{dense}", exact=True).click()
    sight.page.get_by_role("heading", name=f"Latent #{dense}", exact=True).wait_for()


def test_neuronpedia_is_linked_and_never_asked(open_page: Open, address: str) -> None:
    sight = open_page(f"{address}#/v0/latent/9", ".context")
    link = sight.page.get_by_role("link", name="On Neuronpedia")
    assert link.get_attribute("href") == "https://www.neuronpedia.org/gpt2-small/6-res-jb/9"
    assert link.get_attribute("rel") == "noopener noreferrer"
    assert link.get_attribute("target") == "_blank"
    assert not any("neuronpedia" in request or "labels/" in request for request in sight.requests)


def test_labels_are_asked_for_where_the_study_says_so(open_page: Open, tmp_path: Any) -> None:
    folder = write_explorer(explorer_world(num_latents=20), tmp_path / "out", labels=True)
    labels = folder / "labels" / "v0"
    labels.mkdir(parents=True)
    (labels / "9.js").write_text('prunelens.receive("labels/v0/9", {"text": "<b>cats</b>"});')
    sight = open_page(f"{(folder / 'index.html').as_uri()}#/v0/latent/9", ".explanation")
    assert sight.page.locator(".explanation").text_content() == "<b>cats</b>"


def test_missing_shard_is_named(open_page: Open, tmp_path: Any) -> None:
    folder = write_explorer(explorer_world(num_latents=200), tmp_path / "out")
    (folder / "data/v0/contexts-0001.js").unlink()
    sight = open_page(f"{(folder / 'index.html').as_uri()}#/v0/latent/150", ".problem")
    assert "data/v0/contexts-0001.js" in sight.page.get_by_role("alert").text_content()
    assert sight.errors == ["Failed to load resource: net::ERR_FILE_NOT_FOUND"]
    sight.errors.clear()


# --- scatter and comparison -----------------------------------------------------------------------


def test_scatter_opens_the_latent_that_is_clicked(
    open_page: Open, address: str, view: View
) -> None:
    sight = open_page(f"{address}#/v0/scatter?c=c0", ".plot canvas")
    x, y = (
        float(_column(of, key).values[LOST_LATENT])
        for of, key in ((view, "firing_rate"), (view.conditions[0], "persistence"))
    )
    across, down = sight.page.evaluate(
        f"echarts.getInstanceByDom(document.querySelector('.plot'))"
        f".convertToPixel({{seriesIndex: 0}}, [{x}, {y}])"
    )
    sight.page.locator(".plot").click(position={"x": across, "y": down})
    sight.page.get_by_role("heading", name=f"Latent #{LOST_LATENT}", exact=True).wait_for()
    sight.page.go_back()
    sight.page.get_by_label("Vertical", exact=True).select_option("c.jaccard")
    sight.page.get_by_role("heading", name="Jaccard against firing rate").wait_for()
    assert "y=c.jaccard" in sight.page.url


def test_comparison_counts(open_page: Open, address: str, view: View) -> None:
    sight = open_page(f"{address}#/v0/compare", ".group")
    for a, b in (("dense", "c2"), ("c0", "c2"), ("c2", "c0"), ("c2", "dense")):
        sight.page.get_by_label("From").select_option(a)
        sight.page.get_by_label("to", exact=True).select_option(b)
        for name, number in _groups(view, a, b).items():
            group = sight.page.locator(".group", has_text=re.compile(f"^{number} {name}$"))
            group.wait_for()
            assert group.count() == 1


def _groups(view: View, a: str, b: str) -> dict[str, Any]:
    fates = {condition.id: condition.kept for condition in view.conditions}
    fates["dense"] = np.ones(view.num_latents)
    (kept_a, kept_b), new = (fates[a], fates[b]), None
    if b != "dense":
        condition = next(condition for condition in view.conditions if condition.id == b)
        assert condition.own is not None
        assert condition.matched_back is not None
        new = np.sum((condition.matched_back < 0) & (condition.own.columns[0].values > 0))
    return {
        "lost": np.sum((kept_a == 1) & (kept_b == 0)),
        "kept": np.sum((kept_a == 1) & (kept_b == 1)),
        "regained": np.sum((kept_a == 0) & (kept_b == 1)),
        "new": "–" if new is None else new,
    }


def test_comparison_opens_latents(open_page: Open, address: str, view: View) -> None:
    sight = open_page(f"{address}#/v0/compare?a=c0&b=c2", ROWS)
    page = sight.page
    lost = (view.conditions[0].kept == 1) & (view.conditions[2].kept == 0)
    assert set(sight.latents()) <= set(np.flatnonzero(lost).tolist())
    page.locator(".group", has_text="new").click()
    page.get_by_text("Latents of the dictionary trained under").wait_for()
    condition = view.conditions[2]
    assert condition.own is not None
    new = np.asarray(condition.matched_back) < 0
    rates = np.where(new, condition.own.columns[0].values, np.nan)
    found = sight.latents()
    assert found == _by(rates, down=True)[: len(found)]  # the most frequent first
    page.locator(".tabulator-row").first.click()
    page.get_by_role("heading", name="of wanda-row-0.50").wait_for()
    assert "/c2/latent/" in page.url
    assert page.get_by_text("New", exact=True).is_visible()


def test_a_second_view_may_have_next_to_nothing(
    open_page: Open, view: View, tmp_path: pathlib.Path
) -> None:
    """Another dictionary without conditions, effects and firing rates."""
    bare = dataclasses.replace(
        view, id="v1", label="bare", columns=(), conditions=(), effects=None, neuronpedia=None
    )
    folder = write_explorer(Explorer("two", (view, bare)), tmp_path / "out")
    page = open_page((folder / "index.html").as_uri()).page
    page.get_by_label("View", exact=True).select_option("v1")
    _until(page, "!document.querySelector('.heading[title*=persistence]')")
    page.locator(ROWS).first.filter(has_text="#0").click()
    page.locator(".context").first.wait_for()
    page.get_by_role("link", name="Scatter").click()
    page.get_by_text("There is nothing to draw").wait_for()
    page.get_by_role("link", name="Compare").click()
    group = page.locator(".group", has_text=re.compile("^300 kept$"))
    group.wait_for()
    assert group.count() == 1


# --- addresses and keys ---------------------------------------------------------------------------


def test_back_and_forward(open_page: Open, address: str) -> None:
    sight = open_page(address)
    page = sight.page
    page.get_by_role("searchbox").fill("quick")
    page.locator(".count", has_text="occurs").wait_for()
    listed = sight.latents()
    page.locator(ROWS).nth(1).click()
    page.get_by_role("heading", name=f"Latent #{listed[1]}", exact=True).wait_for()
    page.get_by_role("link", name="Compare").click()
    page.locator(".group").first.wait_for()
    page.go_back()
    page.get_by_role("heading", name=f"Latent #{listed[1]}", exact=True).wait_for()
    page.go_back()
    page.locator(".count", has_text="occurs").wait_for()
    assert sight.latents() == listed
    page.go_forward()
    page.get_by_role("heading", name=f"Latent #{listed[1]}", exact=True).wait_for()


def test_a_copied_address_shows_the_same(open_page: Open, address: str) -> None:
    first = open_page(address)
    first.page.get_by_label("Condition", exact=True).select_option("c2")
    first.page.get_by_role("searchbox").fill("quick")
    first.page.locator(".count", has_text="occurs").wait_for()
    first.page.get_by_label("Fate", exact=True).select_option("lost")
    first.page.get_by_role("button", name="Jaccard").click()
    _until(first.page, "location.hash.includes('sort=c.jaccard')")
    second = open_page(first.page.url)
    second.page.locator(".count", has_text="occurs").wait_for()
    assert second.latents() == first.latents()
    assert second.count() == first.count()
    assert second.page.get_by_role("searchbox").input_value() == "quick"
    assert second.page.get_by_label("Fate", exact=True).input_value() == "lost"


def test_broken_addresses_lead_to_the_list(open_page: Open, address: str) -> None:
    sight = open_page(address)
    for broken in ("#/v9/nothing?c=c77&sort=x&a=%", "#///?%%%", "#/v0/c9/latent/1"):
        sight.page.goto(f"{address}#/v0/compare")
        sight.page.locator(".group").first.wait_for()
        sight.page.goto(address + broken)
        sight.page.locator(".filters").get_by_label("Fate", exact=True).wait_for()
        assert sight.latents()[0] == LOST_LATENT


def test_an_address_of_a_dictionary_that_there_is_not(open_page: Open, address: str) -> None:
    """It leads to the list: only every second condition has a dictionary of its own."""
    assert "latent" in open_page(f"{address}#/v0/c0/latent/5", wait=".latent.own").page.url
    assert len(open_page(f"{address}#/v0/c1/latent/5").latents()) > 5


def test_keys(open_page: Open, address: str) -> None:
    sight = open_page(address)
    page, order = sight.page, sight.latents()
    page.keyboard.press("j")
    page.keyboard.press("ArrowDown")
    _until(page, f"document.activeElement.dataset.latent === '{order[1]}'")
    page.keyboard.press("Enter")
    heading = functools.partial(page.get_by_role, "heading", exact=True)
    heading(name=f"Latent #{order[1]}").wait_for()
    page.keyboard.press("j")
    heading(name=f"Latent #{order[2]}").wait_for()
    page.keyboard.press("ArrowLeft")
    heading(name=f"Latent #{order[1]}").wait_for()
    page.keyboard.press("Escape")
    _until(page, f"document.activeElement.dataset.latent === '{order[1]}'")
    page.keyboard.press("?")
    assert page.get_by_role("dialog").is_visible()
    page.keyboard.press("Escape")
    assert not page.get_by_role("dialog").is_visible()
    page.get_by_role("button", name="firing rate").focus()
    page.keyboard.press("Enter")
    _until(page, "location.hash.includes('sort=d.firing_rate')")


# --- looks ----------------------------------------------------------------------------------------


def test_dark_by_preference_and_by_choice(open_page: Open, address: str) -> None:
    light, dark = (open_page(address, color_scheme=scheme) for scheme in ("light", "dark"))
    colours = [_background(sight) for sight in (light, dark)]
    assert colours[0] == "rgb(255, 255, 255)"
    assert max(map(int, re.findall(r"\d+", colours[1]))) < 60
    light.page.get_by_role("button", name="Light or dark").click()
    assert _background(light) == colours[1]
    light.page.reload()
    light.page.locator(ROWS).first.wait_for()
    assert _background(light) == colours[1]


def _background(sight: Sight) -> str:
    return str(sight.page.evaluate("getComputedStyle(document.body).backgroundColor"))


def test_a_narrow_page_does_not_scroll_sideways(open_page: Open, address: str) -> None:
    sight = open_page(address)
    sight.page.set_viewport_size({"width": 400, "height": 800})
    for place in ("latents", "latent/7", "compare", "scatter", "c0/latent/5"):
        sight.page.goto(f"{address}#/v0/{place}")
        sight.page.wait_for_timeout(300)
        assert sight.page.evaluate("document.documentElement.scrollWidth") <= 400, place


# --- safety ---------------------------------------------------------------------------------------


def test_hostile_text_is_text(open_page: Open, address: str) -> None:
    sight = open_page(address)
    page = sight.page
    assert page.locator("h1").text_content() == HOSTILE_STUDY
    assert HOSTILE_STUDY in page.title()
    page.get_by_label("Condition", exact=True).select_option("c1")
    page.get_by_role("button", name=HOSTILE_COLUMN).wait_for()
    page.goto(f"{address}#/v0/latent/{NEEDLE_LATENT}?c=c1&all=1")
    page.locator(".context").first.wait_for()
    assert page.locator(".context .token", has_text=HOSTILE_TOKEN).first.is_visible()
    assert page.locator(".chips .token").first.text_content() == HOSTILE_TOKEN
    shown = page.locator(".context .tokens").first.text_content()
    for visible in ("\\u{202e}gnp.exe", "\\u{2028}", "↵", "\\u{07}", "   "):
        assert visible in shown
    assert HOSTILE_CONDITION in page.locator(".strip").text_content()
    assert "\u202e" not in page.evaluate("document.documentElement.outerHTML")
    assert page.evaluate("document.querySelectorAll('img, svg, script:not([src])').length") == 0
    page.goto(f"{address}#/v0/compare?a=c1&b=c0")
    page.locator(".group").first.wait_for()
    page.keyboard.press("?")
    page.goto(f"{address}#/v0/scatter?c=c1&y=c.cosine_shared_init")
    page.locator(".plot canvas").first.wait_for()
    box = page.locator(".plot").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)


def test_the_policy_holds(open_page: Open, address: str) -> None:
    sight = open_page(address)
    sight.page.evaluate("""() => {
        const inline = document.createElement("script");
        inline.textContent = "window.ran = true";
        document.head.append(inline);
        const image = new Image();
        image.src = "https://example.org/pixel.png";
    }""")
    assert sight.page.evaluate("window.ran") is None
    refused = sight.page.evaluate("fetch('https://example.org/').then(() => 'sent', () => 'no')")
    assert refused == "no"
    sight.page.evaluate("() => { setTimeout('window.evaluated = true', 0); }")
    sight.page.wait_for_timeout(50)
    assert sight.page.evaluate("window.evaluated") is None
    assert len(sight.errors) >= 3
    assert all("Content Security Policy" in error for error in sight.errors)
    sight.errors.clear()


def test_served_over_http_it_asks_its_server_alone(
    open_page: Open, world: Explorer, tmp_path: pathlib.Path
) -> None:
    folder = write_explorer(world, tmp_path / "out")
    with _served(folder) as base:
        sight = open_page(f"{base}#/v0/latent/{NEEDLE_LATENT}", ".context")
        sight.page.goto(f"{base}#/v0/scatter")
        sight.page.locator(".plot canvas").first.wait_for()
        assert all(request.startswith((base, "data:,")) for request in sight.requests)


class _served:  # noqa: N801 - a context manager, used as a function
    """A plain local server of a folder, with the policy as a header too."""

    def __init__(self, folder: pathlib.Path) -> None:
        class Handler(http.server.SimpleHTTPRequestHandler):
            def end_headers(self) -> None:
                self.send_header("Content-Security-Policy", CONTENT_SECURITY_POLICY)
                super().end_headers()

            def log_message(self, *_: object) -> None:
                pass

        handler = functools.partial(Handler, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        return f"http://127.0.0.1:{self.server.server_port}/"

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


# --- size -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_address(tmp_path_factory: pytest.TempPathFactory) -> str:
    world = explorer_world(contexts_each=2, own_dictionaries=False, **MANY)
    folder = write_explorer(world, tmp_path_factory.mktemp("large") / "explorer")
    return (folder / "index.html").as_uri()


def test_18432_latents_under_6_conditions(open_page: Open, large_address: str) -> None:
    sight = open_page(large_address)
    page = sight.page
    opened = page.evaluate("performance.getEntriesByName('prunelens-first-rows')[0].startTime")
    assert sight.count() == "18,432 of 18,432 latents"
    rows = page.locator(".tabulator-row")
    assert rows.count() < 120
    page.evaluate("document.querySelector('.tabulator-tableholder').scrollTop = 1e9")
    page.wait_for_timeout(200)
    assert rows.count() < 120
    started = page.evaluate("performance.now()")
    page.get_by_role("searchbox").fill("needle")
    page.locator(".count", has_text="1 of 18,432").wait_for()
    searched = page.evaluate("performance.now()") - started
    print(f"\nfirst rows after {opened:.0f} ms, first search {searched:.0f} ms")
    assert opened < OPENS_WITHIN
    assert searched < SEARCHES_WITHIN


def test_a_large_scatter_opens_latents(open_page: Open, large_address: str) -> None:
    sight = open_page(f"{large_address}#/v0/scatter", ".plot canvas")
    across, down = sight.page.evaluate(
        "echarts.getInstanceByDom(document.querySelector('.plot'))"
        ".convertToPixel({seriesIndex: 0}, echarts.getInstanceByDom("
        "document.querySelector('.plot')).getOption().series[1].data.find((p) => p[2] === "
        f"{LOST_LATENT}).slice(0, 2))"
    )
    sight.page.wait_for_timeout(300)
    sight.page.locator(".plot").click(position={"x": across, "y": down})
    sight.page.get_by_role("heading", name=f"Latent #{LOST_LATENT}", exact=True).wait_for()
    assert f"/latent/{LOST_LATENT}" in sight.page.url
