"""Section on the mechanism: the predictions of the quantization hypothesis and their verdicts."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from tell_core.report import mechanism_figures
from tell_core.report.blocks import (
    Block,
    Chart,
    Entry,
    Fold,
    Panels,
    Section,
    Table,
    Text,
    missing,
)
from tell_core.report.charts import make_chart
from tell_core.report.curves import arm_label
from tell_core.report.figure_data import FigureData
from tell_core.report.formats import as_number, format_count, format_score, plural
from tell_core.report.reading import Json, RunFiles, read_optional_json

MAX_ITEM_LINES = 120
_TITLE = "The mechanism: seven predictions"
_NOT_TESTED = (
    "The predictions of the quantization hypothesis were not tested on this run. "
    "`tell quanta predictions` with the run directory does so and draws this report again."
)
_INTRO = (
    "The quantization hypothesis reads leverage as the learning of discrete skills (quanta) in the "
    "order of their use. Each prediction that follows from it was fixed beforehand, with the cells "
    "it is read from: {task} task and {general} general tokens where one budget has to be chosen. "
    "p is corrected over the predictions that could be tested (Holm). Undetermined means that "
    "these numbers say nothing either way."
)


def mechanism(run: RunFiles) -> Section:
    """Show verdicts, what each rests on, and the figures behind them."""
    tested = read_optional_json(run.root / "quanta" / "predictions.json")
    if not tested:
        return Section("mechanism", _TITLE, (missing(_NOT_TESTED),))
    intro = _INTRO.format(
        task=format_count(tested["task_budget_tokens"]),
        general=format_count(tested["general_budget_tokens"]),
    )
    rows: list[Json] = tested["predictions"]
    blocks: list[Block] = [Text(intro), _verdicts(rows)]
    if parts := _parts(rows):
        blocks.append(Fold("What each verdict rests on", (parts, *_remarks(rows))))
    blocks += [block for row in rows for block in _figures(row)]
    return Section("mechanism", _TITLE, blocks)


def _verdicts(rows: Sequence[Json]) -> Table:
    return Table(
        caption="Predictions and verdicts",
        columns=("", "Prediction", "Verdict", "Estimate", "Interval", "p (Holm)", "Why"),
        rows=tuple(
            (
                Entry(row["prediction"]),
                Entry(row["claim"]),
                Entry(row["verdict"]),
                _number(row["estimate"]),
                Entry(_interval(row)),
                _number(row["p_holm"]),
                Entry(_why(row)),
            )
            for row in rows
        ),
        numeric=frozenset({"Estimate", "Interval", "p (Holm)"}),
    )


def _why(row: Json) -> str:
    reason, measure = row.get("reason"), row.get("measure")
    if reason and not row["components"]:
        return f"needs {reason}"
    return str(reason or measure or "")


def _parts(rows: Sequence[Json]) -> Table | None:
    parts = [(row["prediction"], part) for row in rows for part in row["components"]]
    if not parts:
        return None
    return Table(
        caption="Measurements",
        columns=("", "Measurement", "Estimate", "Interval", "p", "As predicted"),
        rows=tuple(
            (
                Entry(name),
                Entry(part["name"]),
                _number(part["estimate"]),
                Entry(_interval(part)),
                _number(part["p_value"]),
                Entry("yes" if part["is_as_predicted"] else "no"),
            )
            for name, part in parts
        ),
        numeric=frozenset({"Estimate", "Interval", "p"}),
    )


def _remarks(rows: Sequence[Json]) -> Iterator[Text]:
    for row in rows:
        if row["remark"]:
            yield Text(f"{row['prediction']}: {row['remark']}", tone="note")


def _number(value: object) -> Entry:
    number = as_number(value)
    return Entry("–" if number is None else format_score(number), value=number)


def _interval(part: Json) -> str:
    low, high = as_number(part.get("low")), as_number(part.get("high"))
    if low is None and high is None:
        return "–"
    ends = ("−∞" if low is None else format_score(low), "∞" if high is None else format_score(high))
    return f"[{ends[0]}, {ends[1]}]"


def _figures(row: Json) -> Iterator[Block]:
    """The figures of one prediction, where its numbers are there."""
    figure: Json = row.get("figure") or {}
    if figure.get("items"):
        yield _item_chart(figure)
    if figure.get("survival"):
        yield _survival_chart(figure["survival"])
    if figure.get("points"):
        yield _frequency_chart(figure["points"])
    if figure.get("table"):
        yield _anchor_table(figure["table"])
        yield Panels(tuple(_projections(figure["projections"])), caption=_PROJECTION_CAPTION)
    if figure.get("directions"):
        yield Panels(tuple(_direction_charts(figure["directions"])), caption=_DIRECTION_CAPTION)


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
                _number(row["auc"]),
                _number(row["auc_p_value"]),
                _number(row["score"]),
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
