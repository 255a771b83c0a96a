"""Section on scaling: whether losses fall as power laws, and the slope that skills predict."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from tell_core.report.blocks import (
    Block,
    Chart,
    Entry,
    Panels,
    Section,
    Table,
    Text,
    missing,
    shortened,
)
from tell_core.report.charts import legend_of, make_chart
from tell_core.report.curves import arm_label, arm_place
from tell_core.report.figure_data import FigureData
from tell_core.report.figures import Point
from tell_core.report.formats import (
    MISSING,
    as_number,
    format_count,
    format_score,
    format_score_interval,
    format_share,
    plural,
)
from tell_core.report.reading import Json, RunFiles, read_optional_json
from tell_core.report.scaling_figure import ScalingCurve, finite_k_curve, scaling_curves

TITLE = "Scaling"
MAX_DRAWN = 4
_KINDS = {
    "steps": ("Over steps", "Optimiser step + 1"),
    "task_tokens": ("Over task budgets", "Task tokens"),
    "general_tokens": ("Over general budgets", "General tokens"),
}
_STATUSES = ("power law", "another curve", "undetermined")
_ITEMS = {"task": "task items", "general": "general items"}


def scaling(run: RunFiles) -> Section:
    """Show every curve with its fit, a log-log figure per kind, and the finite-K slopes."""
    found: Json | None = read_optional_json(run.root / "quanta" / "scaling.json")
    if not found:
        return Section("scaling", TITLE, (missing(_NOT_MEASURED),))
    rows: list[Json] = found["curves"]
    blocks: list[Block] = [Text(_summary(rows)), Text(_intro(found), "note")]
    for kind in _KINDS:
        charts = [*_charts(kind, rows), *_finite_k_charts(kind, found["finite_k"])]
        if charts:
            is_first = not any(isinstance(block, Panels) for block in blocks)
            blocks.append(Panels(tuple(charts), _CAPTION if is_first else ""))
    if rows:
        blocks.append(_table(rows))
    blocks += _finite_k(found["finite_k"])
    return Section("scaling", TITLE, blocks)


def _summary(rows: Sequence[Json]) -> str:
    counts = {name: sum(row["status"] == name for row in rows) for name in _STATUSES}
    return (
        f"Of {plural(len(rows), 'curve')} of the mean loss, {counts['power law']} fall as a power "
        f"law with offset, {counts['another curve']} are described better by another curve, and "
        f"{counts['undetermined']} are undetermined."
    )


def _intro(found: Json) -> str:
    return (
        f"A power law is claimed where, with at least {found['min_points']} points and two seeds, "
        "it leads a constant, a line in the logarithm, an exponential and a logistic curve by 4 in "
        "AICc, and the interval of its exponent has two ends. The interval is the wider of that "
        "over seeds and that over residuals. Curves over steps: probe items, at "
        f"{format_count(found['task_budget_tokens'])} task and "
        f"{format_count(found['general_budget_tokens'])} general tokens; over budgets: items not "
        "seen in training, after it."
    )


def _charts(kind: str, rows: Sequence[Json]) -> Iterator[Chart]:
    """A chart for each role that has curves of this kind, its first arms only."""
    title, x_label = _KINDS[kind]
    for role, items in _ITEMS.items():
        mine = [row for row in rows if (row["kind"], row["role"]) == (kind, role) and row["points"]]
        mine.sort(key=lambda row: arm_place(row["arm"]))
        curves = [_as_curve(row) for row in mine[:MAX_DRAWN]]
        if not curves:
            continue
        draw = partial(scaling_curves, curves, x_label=x_label, y_label="Nats per token")
        yield make_chart(
            f"{title}: {items}",
            f"scaling-{kind}-{role}",
            draw,
            _data(mine),
            " ".join(f"{arm_label(row['arm'])}: {_claim(row)}." for row in mine[:MAX_DRAWN]),
            legend=tuple(
                replace(key, dashes=None) for key in legend_of([curve.arm for curve in curves])
            ),
        )


def _as_curve(row: Json) -> ScalingCurve:
    points = tuple(
        Point(point["x"], point["mean"], as_number(point["low"]), as_number(point["high"]))
        for point in row["points"]
    )
    law = None
    if row["exponent"] is not None:
        law = (float(row["offset"]), float(row["amplitude"]), float(row["exponent"]))
    return ScalingCurve(row["arm"], points, law, row["status"] == "power law")


def _data(rows: Sequence[Json]) -> FigureData:
    points = [(row["arm"], point) for row in rows for point in row["points"]]
    return FigureData(
        ("arm", "x", "mean", "low", "high"),
        tuple((arm, p["x"], p["mean"], p["low"], p["high"]) for arm, p in points),
    )


def _claim(row: Json) -> str:
    """The exponent, or why there is none to claim."""
    if row["status"] != "power law":
        return f"{row['status']}, for {row['reason']}"
    return f"exponent {format_score(row['exponent'])} {_interval(row)}"


def _interval(row: Json) -> str:
    return format_score_interval(row["low"], row["high"]) or MISSING


def _table(rows: Sequence[Json]) -> Table:
    columns = ("Over", "Arm", "Items", "Points", "Seeds", "Exponent", "Interval", "Offset",
               "Verdict", "Why")  # fmt: skip
    entries = tuple(
        (
            Entry(row["kind"].replace("_", " ")),
            Entry(arm_label(row["arm"])),
            Entry(row["role"]),
            Entry(format_count(row["num_points"])),
            Entry(format_count(row["num_seeds"])),
            Entry(format_score(row["exponent"]), value=as_number(row["exponent"])),
            Entry(_interval(row)),
            Entry(format_score(row["offset"]), value=as_number(row["offset"])),
            Entry(row["status"]),
            Entry(row["reason"] or f"leads by {format_score(_lead(row))} in AICc"),
        )
        for row in rows
    )
    numeric = frozenset(columns[3:8])
    return shortened(Table("Power laws with offset", columns, entries, numeric))


def _lead(row: Json) -> float:
    """AICc of the best rival above that of the power law."""
    deltas: Json = row["delta_aicc"]
    return float(min(value for name, value in deltas.items() if name != "power law"))


def _finite_k(found: Json) -> list[Block]:
    if found["reason"]:
        return [missing(f"No slope can be predicted from finitely many skills: {found['reason']}.")]
    refused = [row for row in found["arms"] if row["reason"]]
    measured = [row for row in found["arms"] if not row["reason"]]
    blocks: list[Block] = []
    if measured:
        num_known = measured[0]["num_known"]
        known = f" {plural(num_known, 'skill')} known before training left out." * (num_known > 0)
        blocks += [_finite_k_table(measured), Text(_FINITE_K_NOTE + known, "note")]
        if reason := measured[0]["asymptotic_reason"]:
            blocks.append(Text(f"No limit for infinitely many skills is stated: {reason}.", "note"))
    blocks += [
        missing(f"{arm_label(row['arm'])}: no slope is predicted: {row['reason']}.")
        for row in refused
    ]
    return blocks


def _finite_k_table(rows: Sequence[Json]) -> Table:
    columns = ("Arm", "Skills", "β", "Measured slope", "Predicted, finite K", "Difference",
               "Interval", "K → ∞", "Left at the end", "Left, predicted")  # fmt: skip
    entries = tuple(
        (
            Entry(arm_label(row["arm"])),
            Entry(format_count(row["num_quanta"])),
            Entry(format_score(row["beta"]["mean"]), value=as_number(row["beta"]["mean"])),
            Entry(format_score(row["slope"]["mean"]), value=as_number(row["slope"]["mean"])),
            Entry(format_score(row["predicted_slope"]["mean"])),
            Entry(format_score(row["difference"]["mean"], signed=True)),
            Entry(format_score_interval(row["difference"]["low"], row["difference"]["high"],
                                        signed=True) or MISSING),
            Entry(format_score(row["asymptotic_slope"])),
            Entry(format_share(row["left"])),
            Entry(format_share(row["predicted_left"])),
        )
        for row in rows
    )  # fmt: skip
    title = "Log-log slope of the mean loss of general items over steps"
    return Table(title, columns, entries, frozenset(columns[1:]))


def _finite_k_charts(kind: str, found: Json) -> Iterator[Chart]:
    """The finite-K curve of the first arm, beside the curves over steps."""
    row = next((row for row in found["arms"] if not row["reason"]), None)
    if kind != "steps" or row is None:
        return
    points = [(point["x"], point["measured"], point["predicted"]) for point in row["points"]]
    yield make_chart(
        f"{arm_label(row['arm'])}: general items, finite K",
        "scaling-finite-k",
        partial(finite_k_curve, row["arm"], points),
        FigureData(("step_plus_1", "measured", "predicted"), tuple(points)),
        f"Slope {format_score(row['slope']['mean'])} measured, "
        f"{format_score(row['predicted_slope']['mean'])} predicted from "
        f"{plural(row['num_quanta'], 'skill')}.",
    )


_NOT_MEASURED = (
    "How losses scale was not measured on this run. `tell quanta predictions` with the run "
    "directory does so and draws this report again."
)
_CAPTION = (
    "Means with intervals over seeds, both axes logarithmic. Lines: the fitted power law with "
    "offset, dotted where it is not claimed. At most four arms are drawn; the table and the "
    "figure's CSV file have all."
)
_FINITE_K_NOTE = (
    "Predicted from the use of each skill in the general data, the exponent β of learning time on "
    "use, the scatter of learning times and the sharpness of single falls; the height of the curve "
    "is not predicted and was brought to the measured one. Slopes are taken from the first item "
    "learned to the last probe, over items that had something to learn. A skill is what the column "
    "says, a composition being one of its own. A unit that counts as "
    "learned, at half of its loss before training, is taken to fall on to nothing: where more is "
    "left at the end than predicted, it did not. K → ∞ is the limit for "
    "infinitely many skills, −α / (β (1 + α)); at finite K it is off by 0.07 to 0.25 even where "
    "the theory holds."
)
