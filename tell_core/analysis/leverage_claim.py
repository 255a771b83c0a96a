"""P6: the leverage ratio of the run, as a prediction."""

from collections.abc import Mapping, Sequence
from typing import Any

from tell_core.analysis.run_cells import RunCells
from tell_core.analysis.verdicts import CLAIMS, Component, Finding, unmeasured

_CENSORED = {"above": " (at least)", "below": " (at most)"}
_REMARK = (
    "The ratio is 1 where scores at equal task tokens are equal: its p is that of their difference,"
    " which is the second part."
)


def leverage_above_one(run: RunCells, leverage: Mapping[str, Any]) -> Finding:
    """P6: the leverage ratio against the better SFT arm, at the smallest task budget.

    A ratio has no p-value of its own. It has that of the difference of the scores at equal task
    tokens, which stands beside it as the second part. An SFT arm that was run at too few task
    budgets to have a curve is in no ratio; TELL has to beat its score as well.

    Args:
        run: The cells.
        leverage: The content of leverage.json.
    """
    metric = leverage["metrics"].get(leverage["primary_metric"], {})
    by_general = metric.get("arms", {}).get("tell", {})
    everywhere: Sequence[Any] = by_general.get(str(run.general_budget), ())
    here = {
        row["baseline"]: row for row in everywhere if row["task_budget_tokens"] == run.task_budget
    }
    if (best := here.get("best")) is None:
        return unmeasured("P6", "arms tell and sft")
    ratio = best["ratio"] if best["ratio"] is not None else best.get("bound")
    if ratio is None or best["p_value"] is None:
        return unmeasured("P6", f"a leverage ratio: {best['reason']}")
    without_curve = [
        arm for arm, row in here.items() if arm != "best" and row["censored"] == "undefined"
    ]
    parts = (*_against_best(best, ratio, leverage["primary_metric"]),
             *_against_others(run, leverage["primary_metric"], without_curve))  # fmt: skip
    remark = f"{run.budget_words} {_REMARK}"
    if without_curve:
        remark += (
            f" {' and '.join(without_curve)} was not run at enough task budgets to have a curve:"
            " the ratio knows nothing of it."
        )
    figure = {"ratios": [row for row in everywhere if row["baseline"] == "best"]}
    return Finding("P6", CLAIMS["P6"], parts, remark=remark, figure=figure)


def _against_best(row: Mapping[str, Any], ratio: float, metric: str) -> tuple[Component, ...]:
    """The ratio and the difference of scores, both with the p-value of the latter."""
    advantage, p_value = row["advantage"], row["p_value"]
    return (
        Component(
            f"leverage ratio{_CENSORED.get(row['censored'], '')}",
            ratio, row["low"], row["high"], p_value, advantage["difference"] > 0,
        ),
        Component(
            f"{metric}: how much better tell is than SFT at equal task tokens",
            advantage["difference"], advantage["low"], advantage["high"], p_value,
            advantage["difference"] > 0,
        ),
    )  # fmt: skip


def _against_others(run: RunCells, metric: str, arms: Sequence[str]) -> list[Component]:
    """Differences from SFT arms that no ratio knows of."""
    found = [run.difference(metric, "tell", arm, f"{metric}: tell minus {arm}") for arm in arms]
    return [part for part in found if part is not None]
