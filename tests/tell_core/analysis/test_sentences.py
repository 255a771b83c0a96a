from typing import Any

import pytest

from tell_core.analysis.sentences import forecast_sentences

LEVERAGE = {"metrics": {"exact_match": {}}}


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        (
            {"status": "needs_more", "more_tokens": 2081.0, "low": 912.0, "high": 6010.0},
            "To reach what TELL reaches with 3,840 task tokens, plain SFT needs 2,100 more task"
            " tokens than the 3,834 measured (80 %: 910 to 6,000).",
        ),
        (
            {"status": "needs_more", "more_tokens": 2081.0, "low": 912.0},
            "than the 3,834 measured (80 %: 910 or more).",
        ),
        (
            {"status": "needs_more", "more_tokens": 81.0, "low": 0.0},
            "needs 81 more task tokens than the 3,834 measured (80 %: none to beyond"
            " the forecast).",
        ),
        (
            {"status": "reached", "tokens": 1916.0, "more_tokens": 0.0, "low": 0.0, "high": 0.0},
            "Plain SFT reaches what TELL reaches with 3,840 task tokens with about 1,900 task"
            " tokens already.",
        ),
        (
            {"status": "reached", "tokens": 1916.0, "reason": "by the fitted curve alone"},
            "with about 1,900 task tokens already (by the fitted curve alone).",
        ),
        (
            {"status": "beyond_horizon"},
            "Plain SFT does not reach what TELL reaches with 3,840 task tokens within 15,000 task"
            " tokens, as far as this run can say (80 %: more than the forecast reaches).",
        ),
        (
            {"status": "beyond_horizon", "low": 4033.0},
            "as far as this run can say (80 %: 4,000 or more).",
        ),
    ],
)
def test_a_target_is_answered_in_one_sentence(target: dict[str, Any], sentence: str) -> None:
    sentences = forecast_sentences(_forecast(_curve(target)), LEVERAGE)

    assert sentences[0].endswith(sentence)


def test_then_comes_what_twice_the_data_would_bring_and_how_such_forecasts_held() -> None:
    sentences = forecast_sentences(_forecast(_curve()), LEVERAGE)

    assert sentences == [
        "With 3,800 more task tokens, plain SFT would reach exact match 0.93 (80 %: 0.9 to 0.95).",
        "Tried on larger budgets held out of this run, 7 of 9 scores lay inside their 80 %"
        " interval.",
    ]


def test_several_general_budgets_are_told_apart() -> None:
    curves = [_curve() | {"arm": "tell", "general_budget_tokens": at} for at in (5000, 9000)]

    sentences = forecast_sentences(_forecast(*curves), LEVERAGE)

    assert "TELL at 5,000 general tokens would reach" in sentences[0]
    assert "TELL at 9,000 general tokens would reach" in sentences[1]


def test_a_curve_without_a_forecast_says_why() -> None:
    curve = _curve() | {"status": "undefined", "reason": "one seed: unknown"}

    assert forecast_sentences(_forecast(curve), LEVERAGE)[0] == (
        "No forecast for plain SFT: one seed: unknown."
    )


def test_nothing_to_forecast_is_said() -> None:
    assert "none of the arms" in forecast_sentences(_forecast(), LEVERAGE)[0]
    other = _forecast() | {"primary_metric": "chrf"}
    assert "'chrf' (there: exact_match)" in forecast_sentences(other, LEVERAGE)[0]


def test_without_backtests_nothing_is_said_of_how_they_held() -> None:
    forecast = _forecast(_curve())
    forecast["metrics"]["exact_match"]["calibration"]["num_backtests"] = 0

    assert forecast_sentences(forecast, LEVERAGE)[-1] == (
        "No budget could be held out to try these forecasts."
    )


def _curve(target: dict[str, Any] | None = None) -> dict[str, Any]:
    empty = dict.fromkeys(("tokens", "more_tokens", "low", "high", "reason"))
    label = {"label": "what TELL reaches with 3,840 task tokens"}
    gains = [
        {"more_tokens": 3834.0 * (factor - 1), "task_tokens": 3834.0 * factor, "score": score}
        for factor, score in ((1.5, 0.91), (2.0, 0.93), (4.0, 0.97))
    ]
    return {
        "arm": "sft",
        "general_budget_tokens": None,
        "status": "ok",
        "reason": None,
        "max_task_tokens": 3834.0,
        "targets": [] if target is None else [empty | label | target],
        "gains": [gain | {"low": 0.9, "high": 0.95} for gain in gains],
    }


def _forecast(*curves: dict[str, Any]) -> dict[str, Any]:
    calibration = {"nominal": 0.8, "num_backtests": 9, "num_covered": 7, "coverage": 7 / 9}
    return {
        "confidence": 0.8,
        "horizon_factor": 4,
        "primary_metric": "exact_match",
        "metrics": {"exact_match": {"calibration": calibration, "curves": list(curves)}},
    }
