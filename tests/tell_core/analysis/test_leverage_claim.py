"""P6: the leverage ratio at the chosen budgets."""

from tell_core.analysis.leverage_claim import leverage_above_one
from tell_core.analysis.verdicts import judge


def test_leverage_is_read_at_the_chosen_budgets(quantum_run) -> None:
    row = {"task_budget_tokens": 480, "baseline": "best", "ratio": 3.0, "low": 2.0, "high": 4.0,
           "p_value": 0.001, "censored": "none", "reason": None, "bound": None}  # fmt: skip
    leverage = {
        "primary_metric": "log_probability",
        "metrics": {"log_probability": {"arms": {"tell": {"9400": [row]}}}},
    }

    (judged,) = judge([leverage_above_one(quantum_run[0], leverage)], 0.95)

    assert (judged["verdict"], judged["estimate"], judged["low"]) == ("supported", 3.0, 2.0)
