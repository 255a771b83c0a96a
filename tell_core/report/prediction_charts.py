"""Figures behind the predictions P1 to P7, from the numbers in predictions.json."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from tell_core.report import mechanism_figures
from tell_core.report.blocks import Block, Chart, Entry, Panels, Table
from tell_core.report.charts import describe_leverage, make_chart
from tell_core.report.curves import arm_label, leverage_points
from tell_core.report.figure_data import FigureData, leverage_data
from tell_core.report.figures import LeveragePoint, leverage_by_budget
from tell_core.report.formats import (
    as_number,
    format_score,
    format_score_interval,
    plural,
    short_metric_title,
)
from tell_core.report.reading import Json

MAX_ITEM_LINES = 120


def number_entry(value: object) -> Entry:
    """A table's entry for a number that may be missing."""
    number = as_number(value)
    return Entry("–" if number is None else format_score(number), value=number)


def figures_of(row: Json) -> Iterator[Block]:
    """Yield the figures and tables behind one prediction, where its numbers are there."""
    figure: Json = row.get("figure") or {}
    if figure.get("items"):
        yield _alone(_item_chart(figure))
    if figure.get("survival"):
        yield _alone(_survival_chart(figure["survival"]))
    if figure.get("points"):
        yield _alone(_frequency_chart(figure["points"]))
    if figure.get("table"):
        yield _anchor_table(figure["table"])
        yield Panels(tuple(_projections(figure["projections"])), caption=_PROJECTION_CAPTION)
    if figure.get("orders"):
        yield Panels(tuple(_order_charts(figure["orders"])), caption=_ORDER_CAPTION)
        yield _order_table(figure["order_scores"])
    if points := leverage_points(figure.get("ratios") or ()):
        yield _alone(_ratio_chart(points))
    if figure.get("directions"):
        yield Panels(tuple(_direction_charts(figure["directions"])), caption=_DIRECTION_CAPTION)


def _alone(chart: Chart) -> Panels:
    """A small figure by itself, no wider than it would be beside others."""
    return Panels((chart,))


def _item_chart(figure: Json) -> Chart:
    budgets = figure["general_tokens"]
    steps: list[list[tuple[float, float]]] = []
    others: list[list[tuple[float, float]]] = []
    rows: list[tuple[str, str, float, float]] = []
    for item in figure["items"]:
        points = _means(budgets, item["losses"])
        (steps if (item["guard_share"] or 0) >= 0.8 else others).append(points)
        rows += [(item["item"], item["verdict"], x, y) for x, y in points]
    others = others[: max(0, MAX_ITEM_LINES - len(steps))]
    return make_chart(
        "P1: loss of single test items by general data, task data fixed",
        "prediction-1",
        partial(mechanism_figures.items_by_general_data, steps, others),
        FigureData(("item", "verdict", "general_tokens", "loss"), tuple(rows)),
        f"{plural(len(steps), 'item')} with a step, {plural(len(others), 'other')} shown.",
        caption="Mean over seeds. Strong lines: items whose fall is a step that passes the guard.",
    )


def _means(budgets: Sequence[float], losses: Sequence[float]) -> list[tuple[float, float]]:
    """Mean over the seeds at each budget."""
    found: dict[float, list[float]] = defaultdict(list)
    for budget, loss in zip(budgets, losses, strict=True):
        found[budget].append(loss)
    return [(budget, sum(values) / len(values)) for budget, values in sorted(found.items())]


def _survival_chart(survival: Json) -> Chart:
    curves = {
        name: [(0.0, 1.0), *zip(curve["step"], curve["unlearned"], strict=True)]
        for name, curve in survival.items()
    }
    rows = tuple((name, x, y) for name, points in curves.items() for x, y in points)
    words = "; ".join(
        f"{name}: {format_score(points[-1][1])} not learned at the end"
        for name, points in curves.items()
    )
    return make_chart(
        "P2: shared and specific units of the task not yet learned",
        "prediction-2",
        partial(mechanism_figures.survival_curves, curves),
        FigureData(("group", "step", "unlearned"), rows),
        f"{words}.",
        caption="Kaplan-Meier, TELL at the largest general budget, all seeds.",
    )


def _frequency_chart(points: Sequence[Json]) -> Chart:
    places: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for point in points:
        places[point["is_learned"]].append((point["frequency"], 1 + point["step"]))
    return make_chart(
        "P3: when general items are learned, by the use of their skill",
        "prediction-3",
        partial(mechanism_figures.times_by_frequency, places[True], places[False]),
        FigureData(
            ("skill", "frequency", "step", "is_learned"),
            tuple((p["skill"], p["frequency"], p["step"], int(p["is_learned"])) for p in points),
        ),
        f"{len(places[True])} observations learned, {len(places[False])} not by the last step.",
        caption="Hollow: not learned by the last step.",
    )


def _anchor_table(rows: Sequence[Json]) -> Table:
    return Table(
        caption="P4: anchor and general data, two by two, with a random text as control",
        columns=("Arm", "On task prompts", "General data", "AUC of states", "p", "Score"),
        rows=tuple(
            (
                Entry(arm_label(row["arm"])),
                Entry(row["on_task_prompts"]),
                Entry("yes" if row["has_general_data"] else "no"),
                number_entry(row["auc"]),
                number_entry(row["auc_p_value"]),
                number_entry(row["score"]),
            )
            for row in rows
        ),
        numeric=frozenset({"AUC of states", "p", "Score"}),
    )


def _projections(projections: dict[str, Any]) -> Iterator[Chart]:
    for arm, points in projections.items():
        places: dict[str, list[tuple[float, float]]] = {"task": [], "general": []}
        for point in points:
            places[point["role"]].append((point["x"], point["y"]))
        yield make_chart(
            f"Hidden states: {arm_label(arm)}",
            f"projection-{arm}",
            partial(mechanism_figures.state_projection, places["task"], places["general"]),
            FigureData(("role", "x", "y"), tuple((p["role"], p["x"], p["y"]) for p in points)),
            f"{len(places['task'])} task and {len(places['general'])} general prompts.",
        )


def _order_charts(rows: Sequence[Json]) -> Iterator[Chart]:
    """A chart per metric: the score with shuffle minus that with each order."""
    columns = ("metric", "arm", "difference", "low", "high", "p_value")
    for metric in dict.fromkeys(row["metric"] for row in rows):
        mine = [row for row in rows if row["metric"] == metric]
        differences = [
            (arm_label(row["arm"]), row["estimate"], row["low"], row["high"]) for row in mine
        ]
        words = "; ".join(f"{label}: {format_score(mean)}" for label, mean, _, _ in differences)
        yield make_chart(
            f"P5: {short_metric_title(metric).lower()}, TELL minus ordered data",
            f"prediction-5-{metric}",
            partial(mechanism_figures.differences, differences),
            FigureData(
                columns,
                tuple(
                    (metric, row["arm"], row["estimate"], row["low"], row["high"], row["p_value"])
                    for row in mine
                ),
            ),
            f"TELL minus {words}.",
        )


def _order_table(rows: Sequence[Json]) -> Table:
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    scores = {(row["arm"], row["metric"]): row for row in rows}
    arms = dict.fromkeys(row["arm"] for row in rows)
    return Table(
        caption="P5: scores with shuffle, with each order, and before training",
        columns=("Arm", *map(short_metric_title, metrics)),
        rows=tuple(
            (Entry(arm_label(arm)), *(_score_entry(scores.get((arm, m), {})) for m in metrics))
            for arm in arms
        ),
        numeric=frozenset(map(short_metric_title, metrics)),
    )


def _score_entry(row: Json) -> Entry:
    ends = format_score_interval(row.get("low"), row.get("high"))
    return Entry(
        f"{format_score(row.get('mean'))} {ends}".strip(), value=as_number(row.get("mean"))
    )


def _ratio_chart(points: Sequence[LeveragePoint]) -> Chart:
    lines = {"tell": points}
    return make_chart(
        "P6: leverage ratio by task budget, against the better SFT",
        "prediction-6",
        partial(leverage_by_budget, lines),
        leverage_data(lines),
        f"Leverage ratio by task budget. {describe_leverage(lines)}",
        caption="The line at 1 is no leverage; hollow markers are bounds, arrows open ends. "
        "The verdict is on the smallest task budget, the leftmost.",
    )


def _direction_charts(rows: Sequence[Json]) -> Iterator[Chart]:
    """A chart per arm: cosines of its movement with the descent of either group, by step."""
    columns = ("from_step", "to_step", "shared", "specific", "difference", "low", "high", "p_value")
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        curves = {
            group: [(row["to_step"], row[group]) for row in mine]
            for group in ("shared", "specific")
        }
        means = {name: sum(y for _, y in points) / len(points) for name, points in curves.items()}
        yield make_chart(
            f"P7: where the weights move, {arm_label(arm)}",
            f"prediction-7-{arm}",
            partial(mechanism_figures.cosines_by_step, curves),
            FigureData(columns, tuple(tuple(row[name] for name in columns) for row in mine)),
            f"Mean cosine {format_score(means['shared'])} with the descent of shared and "
            f"{format_score(means['specific'])} with that of specific units.",
        )


_DIRECTION_CAPTION = (
    "Cosine of the weights' movement between two probes with the way down the groups' losses; mean "
    "over seeds, drawn at the end of each interval. The figure's table has intervals and "
    "uncorrected p-values of the difference."
)
_PROJECTION_CAPTION = (
    "State of the last prompt token after half of the blocks, first seed; circles are task "
    "prompts, triangles general ones."
)
_ORDER_CAPTION = (
    "Mean over seeds, with an interval over seeds and test items. Right of the line, shuffled data "
    "are better; the log-probability of general data says what is kept of the base model."
)
