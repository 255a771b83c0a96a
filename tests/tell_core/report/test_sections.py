"""Forecast, price and uncertainty: what the files say is what the sections say."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tell_core.analysis.sentences import forecast_sentences
from tell_core.report.blocks import Block, Bullets, Fold, Section, Table, Text, charts_of
from tell_core.report.forecast import forecast
from tell_core.report.leverage import leverage
from tell_core.report.limits import limits, reproduce
from tell_core.report.price import price
from tell_core.report.reading import RunFiles, read_run
from tell_core.report.uncertainty import uncertainty

BuildRun = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("without_drawing")


@pytest.fixture
def run(build_run: BuildRun) -> RunFiles:
    return read_run(build_run())


def test_every_forecast_sentence_of_the_analysis_is_on_the_page(run: RunFiles) -> None:
    assert run.forecast
    assert run.leverage

    section = forecast(run)

    found = [item for block in _flat(section.blocks) if isinstance(block, Bullets)
             for item in block.items]  # fmt: skip
    assert sorted(found) == sorted(forecast_sentences(run.forecast, run.leverage))


def test_an_adaptive_run_says_what_it_left_out_and_why_it_ran_the_rest(run: RunFiles) -> None:
    step = {"reason": "one seed at the middle", "cells": ["tell-t8-s0"]}
    record = {"rounds": [step], "left_out": ["tell-t8-s1", "tell-t8-s2"]}
    adaptive = replace(run, manifest={**run.manifest, "adaptive": record})

    (bullets,) = limits(adaptive).blocks
    table = _table(reproduce(adaptive), "Rounds of the adaptive run")

    assert isinstance(bullets, Bullets)
    assert "2 cells of the full grid were left out" in bullets.items[0]
    assert [entry.text for entry in table.rows[0]][1:] == ["one seed at the middle", "tell-t8-s0"]
    assert table.rows[-1][2].text == "tell-t8-s1, tell-t8-s2"
    assert not any("adaptive" in item for item in limits(run).blocks[0].items)


def test_calibration_is_stated_for_every_metric(run: RunFiles) -> None:
    table = _table(forecast(run), "Calibration by metric")

    assert [entry.text for entry in table.rows[0]] == [
        "Log-probability of the reference, nats per token", "80\N{NO-BREAK SPACE}%", "4", "2",
        "50\N{NO-BREAK SPACE}%",
    ]  # fmt: skip
    assert len(table.rows) == 3


@pytest.mark.parametrize(("covered", "is_warned"), [(9, False), (8, False), (6, False), (5, True)])
def test_too_few_backtests_inside_are_a_warning(
    build_run: BuildRun, covered: int, is_warned: bool
) -> None:
    path = build_run()
    found = json.loads((path / "forecast.json").read_text())
    calibration = {"nominal": 0.8, "num_backtests": 9, "num_covered": covered}
    found["metrics"]["log_probability"]["calibration"] = calibration | {"coverage": covered / 9}
    (path / "forecast.json").write_text(json.dumps(found))

    said = [b.text for b in forecast(read_run(path)).blocks if isinstance(b, Text)]

    assert any("as too narrow" in text for text in said) == is_warned


def test_a_forecast_draws_measured_scores_band_and_backtests(run: RunFiles) -> None:
    charts = list(charts_of(forecast(run).blocks))

    assert [chart.name for chart in charts] == [
        "forecast-log_probability-sft-g0", "forecast-log_probability-tell-g240000",
    ]  # fmt: skip
    kinds = [str(row[0]) for row in charts[1].data.rows]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "measured": 3, "forecast": 41, "back-test": 2,
    }  # fmt: skip
    assert "1 of 2 back-tests inside" in charts[1].alt


def test_ends_beyond_the_horizon_are_written_as_such(run: RunFiles) -> None:
    table = _table(forecast(run), "Task tokens needed for a score")

    intervals = {row[2].text: row[6].text for row in table.rows}
    assert intervals["a score of -0.1"].endswith(", beyond the horizon)")
    notes = {row[2].text: row[7].text for row in table.rows}
    assert notes == {
        "a score of -0.1": "needs more data", "the best score of any arm": "beyond the horizon",
    }  # fmt: skip


def test_a_single_seed_has_no_forecast_and_says_why(build_run: BuildRun) -> None:
    section = forecast(read_run(build_run(seeds=(0,))))

    assert not list(charts_of(section.blocks))
    said = [item for block in section.blocks if isinstance(block, Bullets) for item in block.items]
    assert any("one training seed" in sentence for sentence in said)


def test_price_shows_each_row_of_the_analysis_with_base_at_zero(run: RunFiles) -> None:
    assert run.leverage

    section = price(run)

    shown = [(row[4].value, row[5].text) for table in _tables(section) for row in table.rows]
    expected = [row["change"] for row in run.leverage["price"]]
    assert sorted(value or 0.0 for value, _ in shown) == pytest.approx(sorted(expected))
    assert all(interval.startswith("[") for _, interval in shown)
    charts = list(charts_of(section.blocks))
    assert len(charts) == 3
    assert all(("base", None, 0.0, None, None) in chart.data.rows for chart in charts)


@pytest.mark.parametrize("metric", ["chrf", "general_log_probability"])
def test_without_a_comparison_the_price_is_said_to_be_unknown(
    build_run: BuildRun, metric: str
) -> None:
    path = build_run()
    analysed = json.loads((path / "leverage.json").read_text())
    analysed["metrics"] = {metric: analysed["metrics"][metric]}
    (path / "leverage.json").write_text(json.dumps(analysed | {"price": []}))
    (path / "results.parquet").unlink()

    section = price(read_run(path))

    assert [block.kind for block in section.blocks] == ["text"]
    text = section.blocks[0]
    assert isinstance(text, Text)
    assert ("arm base was not run" in text.text) == (metric == "general_log_probability")


def test_uncertainty_names_floor_and_smallest_difference(run: RunFiles) -> None:
    section = uncertainty(run)

    said = " ".join(block.text for block in section.blocks if isinstance(block, Text))
    assert "2 seeds and 80 test items" in said
    assert "this design can show is 0.052 to 0.183, depending on the task budget" in said
    assert "Exact match 0.012; chrF 0.012." in said
    assert [chart.name for chart in charts_of(section.blocks)] == [
        "spread-log_probability-item_sd", "spread-log_probability-seed_sd",
    ]  # fmt: skip


def test_the_smallest_difference_is_shown_for_each_task_budget(run: RunFiles) -> None:
    table = _table(uncertainty(run), "Smallest difference")

    assert table.columns[:3] == ("Metric", "Task budget", "Smallest difference")
    first = [row for row in table.rows if row[0].text == table.rows[0][0].text]
    values = [row[2].value for row in first]
    assert values == pytest.approx([0.183, 0.1175, 0.052])


def test_one_seed_has_no_smallest_difference(build_run: BuildRun) -> None:
    section = uncertainty(read_run(build_run(seeds=(0,))))

    said = " ".join(block.text for block in section.blocks if isinstance(block, Text))
    assert "unknown: no SFT and TELL with two seeds in common" in said


def test_answers_decoded_once_have_no_noise_floor(build_run: BuildRun) -> None:
    path = build_run()
    analysed = json.loads((path / "leverage.json").read_text())
    for entry in analysed["metrics"].values():
        for row in entry["variance"]:
            row.update(num_repeats=1, decoding_sd=None, reason="decoded once")
    (path / "leverage.json").write_text(json.dumps(analysed))

    said = [b.text for b in uncertainty(read_run(path)).blocks if isinstance(b, Text)]

    assert any(text.startswith("Noise floor: not measured") for text in said)


def test_p_values_stand_beside_the_advantages(run: RunFiles) -> None:
    table = _table(leverage(run), "Score minus that of SFT at the same task budget")

    assert table.columns[-4:] == ("Difference", "Interval", "p", "p (Holm)")
    assert {row[3].text for row in table.rows} == {"SFT", "SFT matched", "the best"}
    assert {tuple(entry.text for entry in row[4:]) for row in table.rows} == {
        ("+0.210", "[+0.090, +0.330]", "< 0.001", "0.012")
    }


def _flat(blocks: Sequence[Block]) -> list[Block]:
    found: list[Block] = []
    for block in blocks:
        found += [block, *_flat(block.blocks)] if isinstance(block, Fold) else [block]
    return found


def _tables(section: Section) -> list[Table]:
    return [block for block in _flat(section.blocks) if isinstance(block, Table)]


def _table(section: Section, caption: str) -> Table:
    return next(table for table in _tables(section) if table.caption.startswith(caption))
