import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tell_core.analysis.simulated_curves import simulated_curves, spaced_steps
from tell_core.analysis.summary import FORECAST_FILE, LEVERAGE_FILE, analyse_run, verdict_sentence
from tell_core.errors import AnalysisError
from tell_core.spec.arms import parse_arm
from tell_core.spec.cells import plan_cells
from tell_core.spec.model import ExperimentSpec

NUM_ITEMS = 40
STEPS = spaced_steps(12).astype(int)


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was analysed."""
    root, spec = tmp_path_factory.mktemp("run"), _spec()
    analyse_run(_write_run(spec, root), spec, root)
    return root


def test_a_run_gives_leverage_and_emergence_for_every_cell(tmp_path: Path) -> None:
    spec = _spec()

    leverage = analyse_run(_write_run(spec, tmp_path), spec, tmp_path)

    assert leverage == json.loads((tmp_path / "leverage.json").read_text())
    assert leverage["baselines"] == ["sft", "sft_matched", "best"]
    assert set(leverage["metrics"]) == {
        "exact_match", "label_f1", "log_probability", "general_log_probability"
    }  # fmt: skip
    arms = leverage["metrics"]["log_probability"]["arms"]
    assert set(arms) == {"tell", "tell_no_anchor"}
    assert set(arms["tell"]) == {"5000", "20000"}
    rows = arms["tell"]["20000"]
    assert [(row["task_budget_tokens"], row["baseline"]) for row in rows] == [
        (budget, name) for budget in (500, 2000, 8000) for name in leverage["baselines"]
    ]
    assert leverage["metrics"]["general_log_probability"]["arms"] == {}
    assert len(leverage["metrics"]["general_log_probability"]["curves"]) == len(
        {
            (cell.arm, cell.task_budget_tokens, cell.general_budget_tokens)
            for cell in plan_cells(spec)
        }
    )
    emergence = json.loads((tmp_path / "emergence.json").read_text())
    trained = [cell.name for cell in plan_cells(spec) if parse_arm(cell.arm).is_trained]
    assert list(emergence["cells"]) == trained
    assert emergence["by_arm"]["tell"]["task"]["shares"]["step"] > 0.5


def test_the_leverage_built_into_a_run_is_found(tmp_path: Path) -> None:
    spec = _spec()

    leverage = analyse_run(_write_run(spec, tmp_path, ratio=3.0), spec, tmp_path)

    rows = leverage["metrics"]["log_probability"]["arms"]["tell"]["20000"]
    row = next(r for r in rows if (r["task_budget_tokens"], r["baseline"]) == (2000, "sft"))
    assert row["ratio"] == pytest.approx(3, rel=0.2)
    assert row["low"] <= 3 <= row["high"]


def test_every_advantage_has_a_p_value_and_one_corrected_over_its_baseline(analysed: Path) -> None:
    leverage = json.loads((analysed / LEVERAGE_FILE).read_text())

    arms = leverage["metrics"]["log_probability"]["arms"].values()
    rows = [row for by_general in arms for found in by_general.values() for row in found]
    for name in leverage["baselines"]:
        same = [row for row in rows if row["baseline"] == name]
        smallest = min(row["p_value"] for row in same)
        assert min(row["p_holm"] for row in same) == min(1.0, smallest * len(same))
        assert all(row["p_holm"] >= row["p_value"] for row in same)


def test_variance_power_and_price_stand_beside_the_leverage(analysed: Path) -> None:
    leverage = json.loads((analysed / LEVERAGE_FILE).read_text())

    exact_match, general = (
        leverage["metrics"][name] for name in ("exact_match", "general_log_probability")
    )
    assert len(exact_match["variance"]) == len(exact_match["curves"])
    assert exact_match["variance"][-1]["num_repeats"] == 3
    assert exact_match["variance"][-1]["decoding_sd"] == pytest.approx(0.02)
    assert general["variance"][-1]["decoding_sd"] == 0
    rows = exact_match["power"]["by_task_budget"]
    assert rows and all(row["reason"] or row["smallest_difference"] > 0 for row in rows)
    assert any(row["smallest_difference"] for row in rows), rows
    assert {row["metric"] for row in leverage["price"]} == {"general_log_probability"}
    assert len(leverage["price"]) == len(general["curves"]) - 1


def test_a_run_gives_a_forecast_for_every_metric_on_test_items(analysed: Path) -> None:
    forecast = json.loads((analysed / FORECAST_FILE).read_text())

    assert forecast["horizon_factor"] == 4
    assert set(forecast["metrics"]) == {"exact_match", "label_f1", "log_probability"}
    curves = forecast["metrics"]["log_probability"]["curves"]
    assert [(curve["arm"], curve["general_budget_tokens"]) for curve in curves] == [
        ("tell", 5000),
        ("tell", 20_000),
        ("sft", None),
        ("sft_matched", 5000),
        ("sft_matched", 20_000),
    ]
    assert {curve["status"] for curve in curves} == {"ok"}
    labels = [target["label"] for target in curves[2]["targets"]]
    assert labels == [
        "what TELL reaches with 8,000 task tokens and 5,000 general tokens",
        "what TELL reaches with 8,000 task tokens and 20,000 general tokens",
    ]


def test_items_of_a_kind_that_some_cells_lack_are_refused(tmp_path: Path) -> None:
    spec = _spec()
    records = _write_run(spec, tmp_path)
    (records[2]["evaluate"] / "general_items.jsonl").unlink()

    with pytest.raises(AnalysisError, match="not the same"):
        analyse_run(records, spec, tmp_path)


def test_progress_reaches_the_end_of_every_phase(tmp_path: Path) -> None:
    spec, seen = _spec(), {}

    def note(phase: str, done: int, total: int) -> None:
        seen[phase] = (done, total)

    analyse_run(_write_run(spec, tmp_path), spec, tmp_path, note)

    assert set(seen) == {"reading predictions", "leverage", "forecast", "emergence"}
    assert all(done == total for done, total in seen.values())


def test_without_general_data_there_is_no_general_metric(tmp_path: Path) -> None:
    spec = _spec()
    records = _write_run(spec, tmp_path)
    for record in records:
        (record["evaluate"] / "general_items.jsonl").write_text("")

    assert "general_log_probability" not in analyse_run(records, spec, tmp_path)["metrics"]


def test_cells_scored_on_other_items_are_refused(tmp_path: Path) -> None:
    spec = _spec()
    records = _write_run(spec, tmp_path)
    path = records[3]["evaluate"] / "predictions.jsonl"
    path.write_text(path.read_text().replace("test-00001", "test-00099"))

    with pytest.raises(AnalysisError, match="not the same"):
        analyse_run(records, spec, tmp_path)


def test_probe_losses_of_other_items_are_refused(tmp_path: Path) -> None:
    spec = _spec()
    records = _write_run(spec, tmp_path)
    (records[1]["mix"] / "probe_items.jsonl").write_text("")

    with pytest.raises(AnalysisError, match="0 probe items"):
        analyse_run(records, spec, tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    spec = _spec()
    records = _write_run(spec, tmp_path)
    (records[0]["evaluate"] / "predictions.jsonl").unlink()

    with pytest.raises(AnalysisError, match=r"predictions\.jsonl"):
        analyse_run(records, spec, tmp_path)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"ratio": 4.14, "low": 2.9, "high": 6.02, "sft_equivalent_tokens": 8283.0},
            "With 2,000 task tokens, TELL reaches log-probability −0.54; plain SFT needs about"
            " 8,300 task tokens for that: leverage 4.1 (95 %: 2.9 to 6).",
        ),
        (
            {"ratio": 1.3, "low": 0.7, "high": None, "sft_equivalent_tokens": 2600.0},
            "leverage 1.3 (95 %: at least 0.7). The interval includes 1: no claim.",
        ),
        (
            {"ratio": 0.5, "low": None, "high": 0.8, "sft_equivalent_tokens": 1000.0},
            "leverage 0.5 (95 %: at most 0.8). TELL does not help here.",
        ),
        (
            {"censored": "above", "bound": 16.0, "low": 9.1, "sft_equivalent_tokens": 32_000.0},
            "plain SFT does not reach that with up to 32,000: leverage at least 16"
            " (95 %: at least 9.1).",
        ),
        (
            {"censored": "below", "bound": 0.25, "high": 0.3, "sft_equivalent_tokens": 500.0},
            "plain SFT reaches that with 500 already: leverage at most 0.25 (95 %: at most 0.3)."
            " TELL does not help here.",
        ),
        (
            {"censored": "undefined", "reason": "one seed: unknown", "ratio": 4.1},
            "With 2,000 task tokens leverage is undefined: one seed: unknown"
            " (this seed alone: 4.1).",
        ),
    ],
)
def test_the_verdict_says_what_was_found_and_no_more(row: dict[str, Any], sentence: str) -> None:
    verdict = verdict_sentence(_leverage([_row(**row)]))

    assert verdict[0].endswith(sentence)


def test_the_verdict_ends_with_where_leverage_ends() -> None:
    rows = [
        _row(task_budget_tokens=1000, ratio=4.0, low=2.0, high=6.0),
        _row(task_budget_tokens=8000, ratio=1.0, low=0.7, high=1.2),
        _row(task_budget_tokens=64_000, ratio=0.5, low=0.3, high=0.8),
    ]

    assert verdict_sentence(_leverage(rows))[-1] == (
        "The largest task budget with leverage shown above 1 is 1,000 tokens. Leverage is below 1"
        " from 64,000 task tokens on: TELL does not help there."
    )


def test_nothing_is_claimed_when_every_interval_includes_one() -> None:
    verdict = verdict_sentence(_leverage([_row(ratio=1.0, low=0.5, high=2.0)]))

    assert verdict[-1] == "At no task budget is leverage shown to differ from 1."


def test_without_sft_the_verdict_says_so() -> None:
    leverage = _leverage([]) | {"baselines": []}

    assert verdict_sentence(leverage) == [
        "Leverage is undefined: it compares arms tell and sft, and sft was not run."
    ]


def test_a_primary_metric_that_was_not_scored_is_named() -> None:
    leverage = _leverage([]) | {"primary_metric": "chrf"}

    assert "'chrf' (there: log_probability)" in verdict_sentence(leverage)[0]


def _row(**given: Any) -> dict[str, Any]:
    row = {
        "task_budget_tokens": 2000,
        "baseline": "best",
        "ratio": None,
        "low": None,
        "high": None,
        "bound": None,
        "confidence": 0.95,
        "censored": "none",
        "reason": None,
        "sft_equivalent_tokens": 8000.0,
        "tell_score": -0.54,
    }
    return row | given


def _leverage(rows: list[dict[str, Any]]) -> dict[str, Any]:
    metric = {"arms": {"tell": {"20000": rows}} if rows else {}}
    return {
        "primary_metric": "log_probability",
        "baselines": ["sft", "best"],
        "metrics": {"log_probability": metric},
    }


def _spec() -> ExperimentSpec:
    return ExperimentSpec.model_validate(
        {
            "name": "simulated",
            "model": {"id": "none"},
            "task": {"name": "task", "train": "train.jsonl", "test": "test.jsonl"},
            "general": ["general.jsonl"],
            "budgets": {"task_tokens": [500, 2000, 8000], "general_tokens": [5000, 20_000]},
            "arms": ["base", "sft", "sft_matched", "tell", "tell_no_anchor", "general_only"],
            "seeds": [0, 1, 2],
            "evaluation": {"metrics": ["exact_match", {"name": "label_f1", "positive": "yes"}]},
            "analysis": {"bootstrap_draws": 400},
        }
    )


def _write_run(spec: ExperimentSpec, root: Path, ratio: float = 2.0) -> list[dict[str, Any]]:
    """Outputs of all cells; TELL scores like SFT with ``ratio`` times its task tokens."""
    generator = np.random.default_rng(0)
    difficulty = generator.normal(0, 0.5, NUM_ITEMS)
    records = []
    for cell in plan_cells(spec):
        is_trained = parse_arm(cell.arm).is_trained
        factor = ratio if parse_arm(cell.arm).is_tell else 1.0
        ability = np.log(factor * (cell.task_budget_tokens or 50) / 3000) + difficulty
        nll = np.log1p(np.exp(-ability)) + generator.normal(0, 0.02, NUM_ITEMS)
        directory = root / cell.name
        directory.mkdir()
        _write_evaluation(directory, nll)
        if is_trained:
            _write_probes(directory, cell.seed)
        records.append(
            {
                "cell": cell.name,
                "arm": cell.arm,
                "task_budget_tokens": cell.task_budget_tokens,
                "general_budget_tokens": cell.general_budget_tokens,
                "seed": cell.seed,
                "ledger": {"task_tokens": cell.task_budget_tokens or 0},
                "mix": directory,
                "train": directory if is_trained else None,
                "evaluate": directory,
            }
        )
    return records


def _write_evaluation(directory: Path, nll: np.ndarray) -> None:
    rows = [
        {
            "item_id": f"test-{index:05d}",
            "stats": {
                "exact_match": [float(value < 0.7)],
                "label_f1": [index % 2, int(value < 0.7)],
                "log_probability": [-value],
            },
        }
        for index, value in enumerate(nll)
    ]
    general = [
        {"item_id": str(index), "stats": {"general_log_probability": [-value]}}
        for index, value in enumerate(nll[:8])
    ]
    scores = {"log_probability": {"score": 0.0}, "exact_match": {"score": 0.5}}
    scores["exact_match"]["repeats"] = [0.5, 0.52, 0.48]  # type: ignore[assignment]
    (directory / "scores.json").write_text(json.dumps(scores))
    _write_lines(directory / "predictions.jsonl", rows)
    _write_lines(directory / "general_items.jsonl", general)


def _write_probes(directory: Path, seed: int) -> None:
    task, general = (
        simulated_curves("step", STEPS, 6, 0.02, seed),
        simulated_curves("flat", STEPS, 3, 0.02, seed),
    )
    np.savez(directory / "probe.npz", steps=STEPS, losses=np.concatenate([task, general], axis=1))
    roles = ["task"] * 6 + ["general"] * 3
    items = [{"item_id": f"{role}-{at:05d}", "role": role} for at, role in enumerate(roles)]
    _write_lines(directory / "probe_items.jsonl", items)


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
