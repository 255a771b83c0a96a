"""Section on uncertainty: where the noise comes from, and what this design can show."""

from collections.abc import Iterable, Sequence
from functools import partial

from tell_core.report import figures
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
    shortened,
)
from tell_core.report.charts import describe_lines, legend_of, make_chart
from tell_core.report.curves import (
    arm_label,
    arm_place,
    headline_general_budget,
    metrics,
    primary_metric,
)
from tell_core.report.figure_data import line_data
from tell_core.report.formats import (
    as_number,
    format_count,
    format_score,
    format_share,
    metric_title,
    plural,
    short_metric_title,
)
from tell_core.report.reading import Json, RunFiles

_COUNTS = ("items", "seeds", "repeats")
TITLE = "Uncertainty"
_SOURCES = (
    ("item_sd", "other test items"),
    ("seed_sd", "another training seed"),
    ("decoding_sd", "decoding again"),
)


def uncertainty(run: RunFiles) -> Section:
    """Show the three variances apart, the noise floor and the smallest difference to be shown."""
    names = [metric for metric in metrics(run) if _entry(run, metric).get("variance")]
    powers = [metric for metric in metrics(run) if _entry(run, metric).get("power")]
    if not names and not powers:
        return Section("uncertainty", TITLE, (missing(_NO_VARIANCE),))
    blocks: list[Block] = [Text(_INTRO)]
    primary = primary_metric(run)
    if power := _entry(run, primary).get("power"):
        blocks.append(Text(_power_sentence(primary, power)))
    blocks.append(Text(_noise_sentence(run)))
    if charts := _panels(run, primary):
        blocks.append(Panels(tuple(charts), _CAPTION))
    if powers:
        blocks.append(_power_table(run, powers))
    blocks += [
        Fold(f"Table: {metric_title(name)}", (_variance_table(name, _entry(run, name)),))
        for name in names
    ]
    return Section("uncertainty", TITLE, blocks)


def _entry(run: RunFiles, metric: str) -> Json:
    return ((run.leverage or {}).get("metrics") or {}).get(metric) or {}


def _power_sentence(metric: str, power: Json) -> str:
    """State the range of the smallest differences over the task budgets."""
    rows = power.get("by_task_budget") or ()
    known = [
        smallest
        for row in rows
        if (smallest := as_number(row.get("smallest_difference"))) is not None
    ]
    if not known:
        reasons = [power.get("reason"), *(row.get("reason") for row in rows)]
        reason = next((reason for reason in reasons if reason), "no reason recorded")
        return f"The smallest difference this design can show is unknown: {reason}."
    least, most = format_score(min(known)), format_score(max(known))
    ends = least if least == most else f"{least} to {most}, depending on the task budget"
    return (
        f"With {plural(int(power['num_seeds']), 'seed')} and "
        f"{plural(int(power['num_items']), 'test item')} the smallest difference between two arms "
        f"at one budget that this design can show is {ends} "
        f"({metric_title(metric)}; shown in "
        f"{format_share(power.get('power'))} of repeats, intervals of "
        f"{format_share(power.get('confidence'))}). Smaller true differences will mostly be missed."
    )


def _noise_sentence(run: RunFiles) -> str:
    """State the noise floor: what decoding alone moves, training and items held fixed."""
    floors = []
    for metric in metrics(run):
        rows = [row for row in _entry(run, metric).get("variance") or () if _is_repeated(row)]
        if rows:
            largest = max(row["decoding_sd"] for row in rows)
            floors.append(f"{metric_title(metric)} {format_score(largest)}")
    if not floors:
        return _NO_NOISE
    return (
        "Noise floor, the standard deviation of the score when the same model answers the same "
        f"items again (the largest of all arms and budgets): {'; '.join(floors)}."
    )


def _is_repeated(row: Json) -> bool:
    is_known = as_number(row.get("decoding_sd")) is not None
    return is_known and (as_number(row.get("num_repeats")) or 1) > 1


def _panels(run: RunFiles, metric: str) -> list[Chart]:
    """Draw each source's standard deviation by task budget, at the headline's general budget."""
    headline = headline_general_budget(run)
    rows = [
        row
        for row in _entry(run, metric).get("variance") or ()
        if row.get("task_budget_tokens") and row.get("general_budget_tokens") in (None, headline)
    ]
    lines = {key: _lines(rows, key) for key, _ in _SOURCES}
    highest = max((sd for one in lines.values() for line in one.values() for _, sd in line),
                  default=0.0)  # fmt: skip
    return [
        _panel(metric, key, title, lines[key], highest)
        for key, title in _SOURCES
        if any(sd > 0 for line in lines[key].values() for _, sd in line)
    ]


def _lines(rows: Iterable[Json], key: str) -> dict[str, list[tuple[float, float]]]:
    """Return (task budget, standard deviation) of each arm."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: (arm_place(row["arm"]), row["task_budget_tokens"])):
        if (spread := as_number(row.get(key))) is not None:
            lines.setdefault(row["arm"], []).append((row["task_budget_tokens"], spread))
    return lines


def _panel(
    metric: str,
    key: str,
    title: str,
    lines: dict[str, list[tuple[float, float]]],
    highest: float,
) -> Chart:
    label = f"Standard deviation, {_unit(metric)}"
    return make_chart(
        f"Spread with {title}",
        f"spread-{metric}-{key}",
        partial(figures.spread_by_budget, lines, y_label=label, highest=highest),
        line_data(lines, ("arm", "task_budget_tokens", key)),
        f"{label}. {describe_lines(lines, 'task budget')}",
        legend=legend_of(lines),
    )


def _unit(metric: str) -> str:
    return "nats" if metric.endswith("log_probability") else short_metric_title(metric)


def _power_table(run: RunFiles, names: Sequence[str]) -> Table:
    columns = ("Metric", "Task budget", "Smallest difference", "Seeds", "Items", "Power",
               "Confidence")  # fmt: skip
    rows = tuple(
        (
            Entry(metric_title(name)),
            Entry(format_count(row.get("task_budget_tokens"))),
            Entry(format_score(row.get("smallest_difference")),
                  value=as_number(row.get("smallest_difference")),
                  remark=str(row.get("reason") or "")),
            Entry(format_count(power.get("num_seeds"))),
            Entry(format_count(power.get("num_items"))),
            Entry(format_share(power.get("power"))),
            Entry(format_share(power.get("confidence"))),
        )
        for name in names
        for power in (_entry(run, name)["power"],)
        for row in power.get("by_task_budget") or ({"reason": power.get("reason")},)
    )  # fmt: skip
    caption = "Smallest difference between two arms at one budget that this design can show"
    return shortened(Table(caption, columns, rows, frozenset(columns[1:])))


def _variance_table(metric: str, entry: Json) -> Table:
    columns = ("Arm", "Task budget", "General budget", "Items drawn", "Seed", "Decoding",
               "Items", "Seeds", "Repeats")  # fmt: skip
    rows = tuple(
        (
            Entry(arm_label(str(row["arm"]))),
            Entry(format_count(row.get("task_budget_tokens"))),
            Entry(format_count(row.get("general_budget_tokens"))),
            *(_spread_entry(row, key) for key, _ in _SOURCES),
            *(
                Entry(format_count(row.get(f"num_{what}")))
                for what in ("items", "seeds", "repeats")
            ),
        )
        for row in sorted(entry["variance"], key=_order)
    )
    caption = f"Standard deviation of one training's score, {metric_title(metric)}"
    return shortened(Table(caption, columns, rows, frozenset(columns[1:])))


def _spread_entry(row: Json, key: str) -> Entry:
    spread = as_number(row.get(key))
    reason = str(row.get("reason") or "") if spread is None else ""
    return Entry(format_score(spread), value=spread, remark=reason)


def _order(row: Json) -> tuple[tuple[int, str], int, int]:
    return (
        arm_place(str(row["arm"])),
        row.get("general_budget_tokens") or 0,
        row.get("task_budget_tokens") or 0,
    )


_NO_VARIANCE = (
    "The sources of uncertainty were not taken apart in this run: its analysis is missing or older "
    "than this section."
)
_NO_NOISE = (
    "Noise floor: not measured, as every answer was decoded once; set evaluation.num_repeats to 2 "
    "or more to measure it. Log-probabilities need no decoding and have no such noise."
)
_INTRO = (
    "One training's score would be another with other test items of the same kind, with another "
    "training seed, or with the answers decoded again. Each is shown alone, as the standard "
    "deviation of one training's score; the intervals of this report hold seeds and items together."
)
_CAPTION = "Standard deviation of one training's score by task budget, both figures on one scale."
