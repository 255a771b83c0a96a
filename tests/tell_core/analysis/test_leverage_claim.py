"""P6: the leverage ratio at the chosen budgets."""

from tell_core.analysis.leverage_claim import leverage_above_one
from tell_core.analysis.verdicts import judge

BEST = {"task_budget_tokens": 480, "baseline": "best", "ratio": 3.0, "low": 2.0, "high": 4.0,
        "p_value": 0.001, "censored": "none", "reason": None, "bound": None,
        "advantage": {"difference": 0.5, "low": 0.2, "high": 0.8}}  # fmt: skip
WITHOUT_CURVE = BEST | {"baseline": "sft_matched", "ratio": None, "p_value": None,
                        "censored": "undefined"}  # fmt: skip


def leverage_of(*rows: dict) -> dict:
    return {
        "primary_metric": "log_probability",
        "metrics": {"log_probability": {"arms": {"tell": {"9400": list(rows)}}}},
    }


def test_leverage_is_read_at_the_chosen_budgets(quantum_run) -> None:
    other = BEST | {"task_budget_tokens": 960, "ratio": 1.5}

    (judged,) = judge([leverage_above_one(quantum_run[0], leverage_of(other, BEST))], 0.95)

    assert (judged["verdict"], judged["estimate"], judged["low"]) == ("supported", 3.0, 2.0)


def test_the_difference_that_gives_the_p_value_stands_beside_the_ratio(quantum_run) -> None:
    finding = leverage_above_one(quantum_run[0], leverage_of(BEST))

    ratio, difference = finding.components
    assert difference.estimate == 0.5
    assert difference.p_value == ratio.p_value == 0.001
    assert "its p is that of their difference" in finding.remark


def test_sft_without_a_curve_has_to_be_beaten_at_equal_tokens(quantum_run) -> None:
    run = quantum_run[0]

    finding = leverage_above_one(run, leverage_of(WITHOUT_CURVE, BEST))

    *_, matched = finding.components
    assert matched.name.endswith("tell minus sft_matched")
    assert matched == run.difference("log_probability", "tell", "sft_matched", matched.name)
    assert finding.p_value == max(part.p_value for part in finding.components)
    assert "sft_matched was not run at enough task budgets" in finding.remark


def test_less_than_sft_contradicts(quantum_run) -> None:
    worse = BEST | {"ratio": 0.4, "low": 0.2, "high": 0.8,
                    "advantage": {"difference": -0.5, "low": -0.8, "high": -0.2}}  # fmt: skip

    (judged,) = judge([leverage_above_one(quantum_run[0], leverage_of(worse))], 0.95)

    assert judged["verdict"] == "contradicted"
