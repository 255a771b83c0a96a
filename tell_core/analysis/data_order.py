"""P5: extensive shuffle against task and general data in an order."""

from typing import Any

from tell_core.analysis.curves import CurvePoint, curve_row
from tell_core.analysis.run_cells import RunCells
from tell_core.analysis.verdicts import CLAIMS, Component, Finding, unmeasured

ORDERED = ("tell_blocks", "tell_task_first", "tell_task_last")
GENERAL_METRIC = "general_log_probability"


def shuffle_beats_order(run: RunCells) -> Finding:
    """P5: score of `tell` minus that of each arm with ordered data, and likewise what is kept.

    What is kept is the log-probability of held-out general responses. There are two parts for each
    ordered arm that the run has, and all must be above 0.
    """
    arms = list(dict.fromkeys(cell.arm for cell in run.cells if cell.arm.startswith(ORDERED)))
    if not arms:
        return unmeasured(
            "P5", "an arm with ordered data: tell_blocks(4), tell_task_first or ..last"
        )
    parts: list[Component] = []
    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    for metric in (run.spec.analysis.primary_metric, GENERAL_METRIC):
        for arm in arms:
            part = run.difference(metric, "tell", arm, f"{metric}: tell minus {arm}")
            if part is None:
                missing.append(f"{metric} of {arm}")
                continue
            parts.append(part)
            rows.append({"metric": metric, "arm": arm, **part._asdict()})
    needs = None
    if missing:
        needs = f"{', '.join(missing)} beside tell, at equal budgets and with at least 2 seeds"
    figure = {"orders": rows, "order_scores": _scores(run, arms)}
    return Finding("P5", CLAIMS["P5"], tuple(parts), needs, run.budget_words, figure)


def _scores(run: RunCells, arms: list[str]) -> list[dict[str, Any]]:
    """Score and general score of every arm, and of the base model, which has forgotten nothing."""
    found: list[tuple[str, CurvePoint]] = []
    for metric in (run.spec.analysis.primary_metric, GENERAL_METRIC):
        points = ((metric, run.point(metric, arm)) for arm in ("tell", *arms, "base"))
        found += [(name, point) for name, point in points if point is not None]
    return [
        {"metric": metric, **curve_row(point, run.resampling, run.metrics[metric].limits)}
        for metric, point in found
    ]
