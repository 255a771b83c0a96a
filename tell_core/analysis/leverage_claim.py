"""P6: the leverage ratio of the run, as a prediction."""

from collections.abc import Mapping
from typing import Any

from tell_core.analysis.run_cells import RunCells
from tell_core.analysis.verdicts import CLAIMS, Component, Finding, unmeasured

_CENSORED = {"above": " (at least)", "below": " (at most)"}


def leverage_above_one(run: RunCells, leverage: Mapping[str, Any]) -> Finding:
    """P6: the leverage ratio against the better SFT arm, at the smallest task budget.

    Args:
        run: The cells.
        leverage: The content of leverage.json.
    """
    metric = leverage["metrics"].get(leverage["primary_metric"], {})
    by_general = metric.get("arms", {}).get("tell", {})
    rows = [row for row in by_general.get(str(run.general_budget), ()) if row["baseline"] == "best"]
    row = next((row for row in rows if row["task_budget_tokens"] == run.task_budget), None)
    if row is None:
        return unmeasured("P6", "arms tell and sft")
    ratio = row["ratio"] if row["ratio"] is not None else row.get("bound")
    if ratio is None or row["p_value"] is None:
        return unmeasured("P6", f"a leverage ratio: {row['reason']}")
    name = f"leverage ratio{_CENSORED.get(row['censored'], '')}"
    part = Component(name, ratio, row["low"], row["high"], row["p_value"], ratio > 1)
    figure = {"ratios": rows}
    return Finding("P6", CLAIMS["P6"], (part,), remark=run.budget_words, figure=figure)
