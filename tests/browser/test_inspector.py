"""The inspector of candidate quanta in a real browser: the map, the details, small screens."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tell_core.report.inspector import write_inspector
from tell_core.store import write_json, write_stage
from tests.browser.chromium import Browser
from tests.browser.conftest import HOSTILE

LEARNED_AT = (3, 3, 40, None)


def cluster(label: int, learned_step: int | None) -> dict[str, Any]:
    """A cluster whose tokens TELL learns at a step and SFT never does."""
    curve = {"steps": [0, 3, 40], "of": "tokens", "num": 2, "was_known": False}
    tell = {**curve, "losses": [4.0, 2.0, 0.1], "learned_step": learned_step}
    sft = {**curve, "losses": [4.0, 3.9, 3.8], "learned_step": None}
    token = {"item": f"dev-{label}", "role": "task", "loss": 0.01}
    return {
        "label": label, "size": 9 - label, "num_items": 2, "roles": {"task": 9 - label},
        "mean_loss": 0.01, "cohesion": 0.8, "outputs": [[f"out{label}", 9 - label]],
        "skills": [["veil", 2]], "curves": {"tell": tell, "sft": sft},
        "tokens": [{**token, "before": HOSTILE, "token": f"gold{label}", "after": " after"}],
        "pushed_by": [{"push": 0.5, "prompt": f"prompt {label} ", "response": "answer"}],
    }  # fmt: skip


SUMMARY = {
    "name": "tell-s0", "verdict": "Four candidate quanta.", "num_clusters": 4, "agreement": 0.9,
    "chance": [0.4], "output_purity": 0.8, "output_agreement": 0.2, "stability": {"4": 0.9},
    "tokens": {"chosen": 30, "supervised": 100},
    "ranks": {
        "slope": -1.2, "low": -1.4, "high": -1.0, "null_slopes": [-1.1], "verdict": "no evidence",
    },
}  # fmt: skip


@pytest.fixture
def inspector(tmp_path: Path) -> Path:
    return write_page(tmp_path, [cluster(label, step) for label, step in enumerate(LEARNED_AT)])


def write_page(
    tmp_path: Path,
    clusters: list[dict[str, Any]],
    learned_by_seed: dict[int, tuple[int | None, ...]] | None = None,
) -> Path:
    """The page; with traces of some clusters, of the step at which each seed learns them."""
    with write_stage(tmp_path, "quanta", "0" * 16) as out:
        write_json(out / "summary.json", SUMMARY)
        write_json(out / "clusters.json", clusters)
        if learned_by_seed:
            write_traces(tmp_path, out / "tokens.parquet", learned_by_seed)
    (tmp_path / "quanta").mkdir()
    write_json(tmp_path / "quanta" / "tell-s0.json", {"stage": f"quanta-{'0' * 16}"})
    return write_inspector(tmp_path, "tell-s0")


def write_traces(
    root: Path, tokens: Path, learned_by_seed: dict[int, tuple[int | None, ...]]
) -> None:
    """A run of arm `tell` with a seed for each step given, and one of another arm."""
    budgets = {"task_budget_tokens": 9, "general_budget_tokens": 9}
    num_seeds = len(next(iter(learned_by_seed.values())))
    cells = {f"tell-s{seed}": {"arm": "tell", **budgets} for seed in range(num_seeds)}
    write_json(root / "manifest.json", {"cells": {**cells, "sft-s0": {"arm": "sft", **budgets}}})
    labels = list(learned_by_seed)
    pq.write_table(
        pa.table({
            "item_id": [f"dev-{label}" for label in labels], "position": [0] * len(labels),
            "cluster": labels,
        }),
        tokens,
    )  # fmt: skip
    rows = [
        {"cell": f"tell-s{seed}", "seed": seed, "item_id": f"dev-{label}", "position": 0,
         "step": step, "loss": 0.1 if at is not None and step >= at else 4.0}
        for label, learned in learned_by_seed.items()
        for seed, at in enumerate(learned)
        for step in (0, 3, 40)
    ]  # fmt: skip
    rows.append({**rows[0], "cell": "sft-s0"})
    pq.write_table(pa.Table.from_pylist(rows), root / "traces.parquet")


def test_the_timeline_has_a_line_for_every_quantum_where_it_is_learned(
    browser: Browser, inspector: Path
) -> None:
    browser.open(inspector)

    assert browser.texts("#map-title") == ["The Q sequence"]
    assert browser.texts("#drawing text")[-1] == "not learned"
    left, top = places(browser)
    assert left[0] == left[1] < left[2] < left[3]
    assert top == sorted(set(top))
    assert len(browser.texts(".hollow")) == 1
    assert browser.console_errors() == []


def places(browser: Browser) -> tuple[list[float], list[float]]:
    """Centres of the circles, by cluster: across and down."""
    script = """return [...document.querySelectorAll('.dot')]
        .sort((a, b) => a.dataset.place - b.dataset.place)
        .map(dot => [Number(dot.getAttribute('cx')), Number(dot.getAttribute('cy'))])"""
    found = browser.run(script)
    return [x for x, _ in found], [y for _, y in found]


def test_the_timeline_is_over_the_seeds_of_the_arm_where_losses_were_traced(
    browser: Browser, tmp_path: Path
) -> None:
    clusters = [cluster(label, step) for label, step in enumerate(LEARNED_AT)]
    page = write_page(tmp_path, clusters, learned_by_seed={0: (40, 40, 40), 2: (3, 3, None)})

    browser.open(page)

    left, top = places(browser)
    assert top[1] < top[2] < top[0]
    assert left[0] > left[2]
    assert len(browser.texts(".whisker")) == 2
    browser.find('.dot[data-place="2"]').click()
    assert any("2 of 3 seeds" in words for words in browser.texts("#detail .note"))


def test_a_click_opens_tokens_curves_of_both_arms_and_what_pushes(
    browser: Browser, inspector: Path
) -> None:
    browser.open(inspector)

    browser.find('.dot[data-place="2"]').click()

    assert browser.texts("#detail h2") == ["Cluster 2"]
    assert browser.texts("#detail .contexts li mark") == ["gold2", "answer"]
    assert browser.texts("#detail .legend li") == [
        "tell: learned at step 40",
        "sft: not learned",
    ]
    assert len(browser.texts("#detail polyline")) == 2
    assert "prompt 2 answer" in browser.texts("#detail .whole li")[1]


def test_what_is_learned_and_rises_again_is_said_to_be_lost(
    browser: Browser, tmp_path: Path
) -> None:
    lost = cluster(0, 3)
    lost["curves"]["sft"] |= {"losses": [4.0, 1.0, 5.0], "learned_step": 3}

    browser.open(write_page(tmp_path, [lost]))

    assert browser.texts("#detail .legend li") == [
        "tell: learned at step 3",
        "sft: learned at step 3, lost again",
    ]


def test_keys_open_a_quantum_and_buttons_go_on(browser: Browser, inspector: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(inspector)

    browser.find('.dot[data-place="1"]').send_keys(Keys.ENTER)
    browser.find("#next").click()

    assert browser.texts("#detail h2") == ["Cluster 2"]
    assert browser.texts("#place") == ["3 of 4"]


@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_gets_a_legible_timeline(browser: Browser, inspector: Path, width: int) -> None:
    browser.resize(width, 800, is_phone=True)
    browser.open(inspector)

    assert browser.run("return document.documentElement.scrollWidth") <= width
    words = browser.run(
        "return [...document.querySelectorAll('#drawing text')].map(t => t.getBoundingClientRect())"
    )
    assert all(box["height"] > 10 for box in words)
    ends = [(box["left"], box["right"]) for box in words]
    assert all(before[1] <= after[0] for before, after in pairwise(ends))

    browser.run("document.documentElement.style.scrollBehavior = 'auto'")
    dot = browser.find('.dot[data-place="3"]')
    browser.run("arguments[0].scrollIntoView({block: 'center'})", dot)
    dot.click()

    top = browser.run("return document.getElementById('detail').getBoundingClientRect().top")
    assert -20 <= top < 100


def test_texts_of_the_data_stay_text(browser: Browser, inspector: Path) -> None:
    browser.open(inspector)

    assert HOSTILE in browser.texts("#detail .contexts li")[0]
    assert (
        browser.run("return document.querySelectorAll('#detail img, #detail script').length") == 0
    )
    assert browser.run("return document.title") == "tell-s0 · Quanta"


def test_the_page_loads_nothing(browser: Browser, inspector: Path) -> None:
    browser.open(inspector)

    assert browser.run("return performance.getEntriesByType('resource').length") == 0


def test_a_discovery_of_single_tokens_says_so_instead_of_drawing(
    browser: Browser, tmp_path: Path
) -> None:
    browser.open(write_page(tmp_path, []))

    assert browser.texts("#map-title") == ["No candidate quanta"]
    assert "Every cluster is a single token" in browser.texts("#map-words")[0]
    assert browser.texts("#drawing, #map .legend, .steps") == []
    assert browser.console_errors() == []
