"""The report in a real browser: what is shown, browsed, searched, saved, and what never runs."""

import io
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import image

from tell_core.report.pairs import Pair, PairedItem, pairs
from tell_core.report.reading import read_run
from tests.browser.chromium import Browser
from tests.browser.conftest import HOSTILE, SAVED_FIGURES

SECTIONS = (
    "answer", "curves", "leverage", "forecast", "price", "uncertainty", "predictions",
    "emergence", "mechanism", "scaling", "ledger", "curation", "shuffle", "prompts",
    "limits", "reproduce",
)  # fmt: skip
VISIBLE = "return [...document.querySelectorAll(arguments[0])].filter(e => e.offsetParent).length"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def report(run: Path) -> Path:
    return run / "report.html"


def test_every_section_and_figure_is_there(browser: Browser, report: Path) -> None:
    browser.open(report)

    assert tuple(browser.run("return [...document.querySelectorAll('section')].map(s => s.id)")) \
        == SECTIONS  # fmt: skip
    carried = json.loads(browser.texts("#carried")[0])
    assert browser.run(VISIBLE, "figure.chart") == len(carried["figures"]) > 15
    assert browser.run("return document.querySelector('#answer .lead').textContent").startswith(
        "With 1,000 task tokens"
    )


def test_every_figure_has_a_text_alternative(browser: Browser, report: Path) -> None:
    browser.open(report)

    labels = browser.run(
        "return [...document.querySelectorAll('.drawing')].map(d => d.getAttribute('aria-label'))"
    )
    assert len(labels) == len(set(labels)) + browser.run(VISIBLE, ".for-wide")
    assert all(len(label) > 40 for label in labels)


def test_page_is_one_small_file_that_loads_nothing(browser: Browser, report: Path) -> None:
    browser.open(report)

    assert report.stat().st_size < 5_000_000
    loaded = browser.run("return performance.getEntriesByType('resource').map(r => r.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []


@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_needs_no_sideways_scrolling(browser: Browser, report: Path, width: int) -> None:
    browser.resize(width, 800, is_phone=True)

    browser.open(report)

    widths = "return [document.scrollingElement.scrollWidth, innerWidth]"
    content, window = browser.run(widths)
    assert window == width
    assert content <= window
    assert browser.run(VISIBLE, "#answer .for-narrow") == 1
    assert browser.run(VISIBLE, "#answer .for-wide") == 0


def test_dark_mode_turns_paper_and_ink_round(browser: Browser, report: Path) -> None:
    colours = (
        "const s = getComputedStyle(document.body);"
        "const text = document.querySelector('#answer .drawing text');"
        "return [s.backgroundColor, s.color, getComputedStyle(text).fill]"
    )
    browser.open(report)
    light = [_brightness(colour) for colour in browser.run(colours)]

    browser.use_theme("dark")

    dark = [_brightness(colour) for colour in browser.run(colours)]
    assert light[0] > 0.8 > 0.6 > max(light[1:])
    assert dark[0] < 0.2 < 0.4 < min(dark[1:])


def test_without_scripts_a_sample_stands_in(browser: Browser, report: Path) -> None:
    browser.allow_scripts(False)

    browser.open(report)

    visible = {
        selector: sum(one.is_displayed() for one in browser.driver.find_elements("css selector", s))
        for selector, s in (
            ("sample", ".sample .comparison"), ("controls", ".controls"), ("save", ".downloads"),
            ("figures", "#answer .drawing"),
        )
    }  # fmt: skip
    assert visible == {"sample": 8, "controls": 0, "save": 0, "figures": 1}


# ---- items ----------------------------------------------------------------------------------


@pytest.fixture
def lead(run: Path) -> Pair:
    """The comparison that the page shows first."""
    return pairs(read_run(run))[0]


def test_items_replace_the_sample(browser: Browser, report: Path, lead: Pair) -> None:
    browser.open(report)

    assert browser.run(VISIBLE, ".sample") == 0
    differing = [item for item in lead.items if item.differs]
    assert _status(browser).startswith(f"{len(differing)} of {len(lead.items)} items")
    assert browser.run(VISIBLE, ".items .comparison") == min(10, len(differing))


@pytest.mark.parametrize("name", ["differ", "tell", "sft", "right", "wrong", "all"])
def test_a_filter_keeps_what_it_says(browser: Browser, report: Path, lead: Pair, name: str) -> None:
    expected = {item.item_id for item in lead.items if _keeps(name, item)}
    browser.open(report)

    browser.choose("filter", name)

    assert _all_shown(browser) == expected
    assert _status(browser).startswith(f"{len(expected)} of {len(lead.items)} items")


def test_search_finds_words_anywhere_and_marks_them(
    browser: Browser, report: Path, lead: Pair
) -> None:
    wanted = lead.items[-1]
    browser.open(report)
    browser.choose("filter", "all")

    browser.find("[data-control=query]").send_keys(f"  {wanted.prompt.upper()} word ")

    assert _shown(browser) == [wanted.item_id]
    assert set(browser.texts(".items mark")) == {"word:", wanted.prompt.split()[-1]}
    browser.find("[data-control=query]").send_keys(" nowhere")
    assert _status(browser).startswith(f"0 of {len(lead.items)} items")
    assert _shown(browser) == []


def test_order_by_the_largest_lead(browser: Browser, report: Path, lead: Pair) -> None:
    browser.open(report)
    browser.choose("filter", "all")

    for order, sign in (("tell", 1), ("sft", -1)):
        browser.choose("order", order)
        gains = {item.item_id: sign * item.gain for item in lead.items}
        shown = [gains[item_id] for item_id in _all_in_order(browser)]
        assert np.all(np.diff(shown) <= 2e-4)  # the page holds four digits of each score


def test_another_metric_judges_anew(browser: Browser, report: Path, lead: Pair) -> None:
    better = {
        item.item_id
        for item in lead.items
        if (item.tell_scores["exact_match"] or 0) > (item.sft_scores["exact_match"] or 0)
    }
    browser.open(report)

    browser.choose("metric", "1")
    browser.choose("filter", "tell")

    assert browser.find("[data-control=metric] option:checked").text == "Exact match"
    assert _all_shown(browser) == better


def test_the_reader_picks_budget_and_seed(browser: Browser, report: Path, run: Path) -> None:
    other = next(
        pair for pair in pairs(read_run(run))
        if (pair.tell.task_budget_tokens, pair.tell.seed) == (64_000, 1)
    )  # fmt: skip
    browser.open(report)

    browser.choose("task", "64000")
    browser.choose("seed", "1")
    browser.choose("filter", "tell")

    assert _all_shown(browser) == {item.item_id for item in other.items if item.gain > 0}
    assert "64,000 tokens of task data, seed 1" in _status(browser)


def test_an_item_shows_both_answers_and_every_score(
    browser: Browser, report: Path, lead: Pair
) -> None:
    item = next(item for item in lead.items if item.gain > 0)
    browser.open(report)
    browser.choose("filter", "all")

    browser.find("[data-control=query]").send_keys(item.item_id)

    parts = browser.texts(".items dd:not(.scored)")
    assert parts == [item.prompt, item.reference, item.tell_text, item.sft_text]
    ours, theirs = browser.texts(".items .scored")
    for text, gold, is_right in (
        (ours, item.tell_gold, item.tell_right), (theirs, item.sft_gold, item.sft_right),
    ):  # fmt: skip
        assert f"{gold:.3f}".replace("-", "−") in text
        assert ("✓ right" if is_right else "✗ wrong") in text


def test_pages_turn_by_keyboard_and_focus_stays(browser: Browser, report: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(report)
    browser.choose("filter", "all")
    first = _shown(browser)
    forth = browser.find(".pages [data-step='1']")

    forth.send_keys(Keys.ENTER)

    assert browser.find(".pages span").text == "Page 2 of 8"
    assert not set(first) & set(_shown(browser))
    assert browser.driver.switch_to.active_element == forth
    for _ in range(9):
        forth.send_keys(Keys.SPACE)
    assert browser.find(".pages span").text == "Page 8 of 8"
    assert forth.get_attribute("aria-disabled") == "true"


def test_every_control_has_a_name_and_is_reached_by_tab(browser: Browser, report: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(report)
    browser.find("[data-control=task]").send_keys(Keys.NULL)
    reached = []
    for _ in range(6):
        focused = browser.driver.switch_to.active_element
        reached.append((focused.get_attribute("data-control"), focused.accessible_name))
        focused.send_keys(Keys.TAB)

    names = [control for control, _ in reached]
    assert names == ["task", "seed", "filter", "metric", "order", "query"]
    assert all(name for _, name in reached)


# ---- hostile data ---------------------------------------------------------------------------


def test_hostile_rows_are_shown_and_never_run(browser: Browser, hostile_run: Path) -> None:
    browser.open(hostile_run / "report.html")
    browser.choose("filter", "all")
    browser.find("[data-control=query]").send_keys("zq003p")

    assert browser.run("return window.hacked") is None
    prompt, _, ours, theirs = browser.texts(".items dd:not(.scored)")
    assert prompt.endswith(HOSTILE)
    assert ours.endswith(HOSTILE)
    assert theirs.endswith(HOSTILE)
    assert browser.run(VISIBLE, "main img") == 0
    assert browser.run("return document.scripts.length") == 3


def test_markup_that_got_into_the_page_would_not_run(browser: Browser, report: Path) -> None:
    browser.open(report)

    browser.run(
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 6';"
        "document.body.append(s);"
        "document.body.insertAdjacentHTML('beforeend', '<b onclick=\"window.hacked = 7\">x</b>');"
        "document.body.lastChild.click();"
    )

    assert browser.run("return window.hacked") is None
    assert any("Content Security Policy" in error for error in browser.console_errors())


# ---- figures --------------------------------------------------------------------------------


@pytest.mark.parametrize("figure", SAVED_FIGURES)
def test_saved_data_is_that_of_the_figures_directory(
    browser: Browser, report: Path, figure: str
) -> None:
    browser.open(report)

    saved = browser.save(figure, "csv")

    assert saved == (report.parent / "figures" / f"{figure}.csv").read_bytes()


def test_saved_curves_are_the_analysed_ones(browser: Browser, report: Path) -> None:
    analysed = json.loads((report.parent / "leverage.json").read_text())
    curves = analysed["metrics"]["log_probability"]["curves"]
    browser.open(report)

    rows = [
        line.split(",") for line in browser.save("learning_curves", "csv").decode().split("\r\n")
    ]

    means = {(row[0], row[1]): float(row[2]) for row in rows[1:] if row[0] == "tell"}
    assert means == {
        ("tell", str(curve["task_tokens"])): pytest.approx(curve["mean"])
        for curve in curves
        if curve["arm"] == "tell"
    }


def test_a_saved_svg_stands_alone(browser: Browser, report: Path) -> None:
    browser.open(report)

    svg = browser.save("curve-log_probability-g240000", "svg").decode()

    root = ElementTree.fromstring(svg)
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"TELL", "SFT", "SFT matched"} <= set(texts)
    assert root.find(f"{SVG}rect[@fill='var(--paper)']") is not None
    assert (root.findtext(f"{SVG}title") or "").startswith("Log-probability")
    assert "prefers-color-scheme: dark" in svg
    assert "--tell:" in svg
    assert "--sans:" in svg


def test_a_saved_panel_names_its_own_arms_only(browser: Browser, report: Path) -> None:
    browser.open(report)

    svg = browser.save("forecast-log_probability-sft-g0", "svg").decode()

    texts = {text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")}
    assert "SFT" in texts
    assert "TELL" not in texts


@pytest.mark.parametrize("figure", ["learning_curves", "heat-tell-t16000-g240000-s0"])
def test_a_saved_png_holds_the_drawing(browser: Browser, report: Path, figure: str) -> None:
    browser.open(report)

    pixels = image.imread(io.BytesIO(browser.save(figure, "png")))

    assert min(pixels.shape[:2]) > 400
    channels = (pixels[..., :3] * 255).round().astype(np.int64).reshape(-1, 3)
    colours, counts = np.unique(channels @ [65536, 256, 1], return_counts=True)
    assert len(colours) > 50
    assert counts.max() / counts.sum() < 0.97


# ---- helpers --------------------------------------------------------------------------------


def _status(browser: Browser) -> str:
    return browser.texts(".browser .status")[0]


def _shown(browser: Browser) -> list[str]:
    return [title.split(":")[0] for title in browser.texts(".items h3")]


def _all_in_order(browser: Browser) -> list[str]:
    """Item ids of all pages, turned by the button."""
    found = _shown(browser)
    while browser.run(
        "const b = document.querySelector(\".pages [data-step='1']\");"
        "if (!b.offsetParent || b.getAttribute('aria-disabled') === 'true') return false;"
        "b.click(); return true"
    ):
        found += _shown(browser)
    return found


def _all_shown(browser: Browser) -> set[str]:
    found = _all_in_order(browser)
    assert len(found) == len(set(found))
    return set(found)


def _keeps(name: str, item: PairedItem) -> bool:
    return {
        "differ": item.differs,
        "tell": item.gain > 0,
        "sft": item.gain < 0,
        "right": item.tell_right and item.sft_right,
        "wrong": not item.tell_right and not item.sft_right,
        "all": True,
    }[name]


def _brightness(colour: str) -> float:
    """Mean of the channels of ``rgb(r, g, b)``, 0 to 1."""
    channels = [float(part) for part in colour.split("(")[1].rstrip(")").split(",")[:3]]
    return sum(channels) / (3 * 255)
