"""The Q sequence in the report: when each unit of the task is learned, and how far orders agree."""

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median

from tell_core.report import mechanism_figures
from tell_core.report.blocks import (
    Block,
    Chart,
    Entry,
    Fold,
    LegendKey,
    Panels,
    Table,
    Text,
    shortened,
)
from tell_core.report.charts import make_chart
from tell_core.report.curves import arm_label, arm_place
from tell_core.report.figure_data import FigureData
from tell_core.report.formats import (
    as_number,
    format_count,
    format_score,
    format_share,
    plural,
)
from tell_core.report.mechanism_figures import GROUP_LOOKS, SequenceRow
from tell_core.report.reading import Json

MAX_UNITS = 150  # of a timeline: more lines than pixels between them say no more
MAX_ARMS = 4
_LEAD = ("tell", "sft_matched", "sft")  # drawn first where there are more arms than room
_INTRO = (
    "The Q sequence is the order in which the units of the task (response tokens, or whole items "
    "where no tokens were traced) are learned: the step at which the loss of a unit is first at "
    "most half of what it was before training; it may rise again. {task} task and {general} "
    "general tokens. {counts}"
)
_CAPTION = (
    "Each line is a unit, from the one that {lead} learns first (top) to the last, in the same "
    "order in every panel: a panel with the same order falls from left to right too. "
    "Horizontal bars are intervals over seeds (Student). Hollow: not learned in at least one "
    "training; its time is a lower bound.{thinned}"
)
_COLUMNS = ("place", "unit", "group", "rank", "rank_low", "rank_high", "step", "step_low",
            "step_high", "learned_share")  # fmt: skip


def q_sequence(sequence: Json | None) -> list[Block]:
    """Draw the learning orders of sequence.json; nothing where there are none.

    Args:
        sequence: The content of the file, or None. A file of an earlier version, which has no
            times, counts as none.
    """
    arms: dict[str, Json] = (sequence or {}).get("arms") or {}
    if sequence is None or not arms or "groups" not in sequence:
        return []
    lead = min(arms, key=arm_place)
    rows = {arm: _rows(sequence, entry["order"]) for arm, entry in arms.items()}
    order = [row.unit for row in sorted(rows[lead], key=lambda row: row.rank)]
    if not order:
        return [_folded([Text("Every unit of the task was known before training.")])]
    shown = sorted(arms, key=lambda arm: (arm not in _LEAD, arm_place(arm)))[:MAX_ARMS]
    charts = tuple(_timeline(arm, rows[arm], order, arms[arm]["last_step"]) for arm in shown)
    thinned = f" {MAX_UNITS} of {len(order):,} units are drawn." if len(order) > MAX_UNITS else ""
    intro = _INTRO.format(
        task=format_count(sequence["task_budget_tokens"]),
        general=format_count(sequence["general_budget_tokens"]),
        counts=_counts(arm_label(lead), rows[lead]),
    )
    return [
        _folded(
            [
                Text(intro),
                Panels(charts, _CAPTION.format(lead=arm_label(lead), thinned=thinned)),
                _agreement(sequence, arms),
                Fold("The sequence, unit by unit", (_unit_table(lead, rows[lead], order),)),
            ]
        )
    ]


def _folded(blocks: Sequence[Block]) -> Fold:
    return Fold("The Q sequence: in which order the task is learned", blocks, is_open=True)


def _rows(sequence: Json, order: Sequence[Json]) -> list[SequenceRow]:
    """The units of an arm that had something to learn."""
    groups = sequence["groups"] or [None] * len(sequence["units"])
    return [
        SequenceRow(unit=unit, group=group or "unknown", **one)
        for unit, group, one in zip(sequence["units"], groups, order, strict=True)
        if one["rank"] is not None
    ]


def _counts(label: str, rows: Sequence[SequenceRow]) -> str:
    """When the groups are learned, in words."""
    parts = []
    for group in GROUP_LOOKS:
        mine = [row for row in rows if row.group == group]
        late = sum(row.is_censored for row in mine)
        if mine:
            step = format_count(median(row.step for row in mine))
            words = f"{plural(len(mine), f'{group} unit')}, median step {step}"
            parts.append(f"{words}, {late:,} not learned in every training")
    return f"{label}: {'; '.join(parts)}."


def _timeline(
    arm: str, rows: Sequence[SequenceRow], order: Sequence[str], last_step: float
) -> Chart:
    places = {unit: place for place, unit in enumerate(order, start=1)}
    known = sorted((row for row in rows if row.unit in places), key=lambda row: places[row.unit])
    drawn = [(places[row.unit], row) for row in _thinned(known)]
    return make_chart(
        arm_label(arm),
        f"q-sequence-{arm}",
        partial(mechanism_figures.learning_timeline, drawn, last_step),
        FigureData(_COLUMNS, tuple(_fields(places[row.unit], row) for row in known)),
        _counts("Units by step of learning", rows),
        legend=_legend(rows),
    )


def _thinned(rows: Sequence[SequenceRow]) -> list[SequenceRow]:
    """At most MAX_UNITS rows, evenly spaced."""
    step = max(1.0, len(rows) / MAX_UNITS)
    return [rows[int(place * step)] for place in range(min(len(rows), MAX_UNITS))]


def _fields(place: int, row: SequenceRow) -> tuple[str | float | int | None, ...]:
    return (place, row.unit, row.group, row.rank, row.low, row.high, row.step, row.step_low,
            row.step_high, row.learned_share)  # fmt: skip


def _legend(rows: Sequence[SequenceRow]) -> tuple[LegendKey, ...]:
    found = {row.group for row in rows}
    return tuple(
        LegendKey(label, colour, None, marker, place=place)
        for place, (group, (colour, marker, label)) in enumerate(GROUP_LOOKS.items())
        if group in found
    )


def _agreement(sequence: Json, arms: Mapping[str, Json]) -> Table:
    numeric = ("Seeds", "Units", "Lost again", "Kendall's τ between its seeds", "Spearman's ρ",
               "τ with the seeds of TELL", "ρ with TELL")  # fmt: skip
    return Table(
        caption="Agreement of learning orders: mean over pairs of trainings, with the least and "
        "greatest pair (1 is the same order, 0 none, −1 the opposite). Lost again: of the units "
        "learned, those above half of their loss before training at the last probe",
        columns=("Arm", *numeric),
        rows=tuple(
            _agreement_row(
                arm, arms[arm], sequence["within_arm"].get(arm), sequence["with_tell"].get(arm)
            )
            for arm in sorted(arms, key=arm_place)
        ),
        numeric=frozenset(numeric),
    )


def _agreement_row(
    arm: str, entry: Json, within: Json | None, with_tell: Json | None
) -> tuple[Entry, ...]:
    units = (within or with_tell or {}).get("num_units")
    return (
        Entry(arm_label(arm)),
        Entry(str(entry["num_seeds"])),
        Entry(format_count(units)),
        Entry(format_share(entry["lost_share"]), value=as_number(entry["lost_share"])),
        *(entry for found in (within, with_tell) for entry in (_kendall(found), _spearman(found))),
    )


def _kendall(found: Json | None) -> Entry:
    if not found:
        return Entry("–")
    ends = f"{format_score(found['kendall_low'])} to {format_score(found['kendall_high'])}"
    pairs = plural(int(found["num_pairs"]), "pair")
    return Entry(format_score(found["kendall"]), found["kendall"], f"{ends}, {pairs}")


def _spearman(found: Json | None) -> Entry:
    return Entry(format_score(found["spearman"]), found["spearman"]) if found else Entry("–")


def _unit_table(lead: str, rows: Sequence[SequenceRow], order: Sequence[str]) -> Table:
    by_unit = {row.unit: row for row in rows}
    numeric = ("Place", "Mean place over seeds", "Step", "Learned in")
    table = Table(
        caption=f"Units in the order of {arm_label(lead)}; a unit is named item/token",
        columns=("Place", "Unit", "Group", *numeric[1:]),
        rows=tuple(_unit_row(place, by_unit[unit]) for place, unit in enumerate(order, start=1)),
        numeric=frozenset(numeric),
    )
    return shortened(table)


def _unit_row(place: int, row: SequenceRow) -> tuple[Entry, ...]:
    at_least = "≥ " if row.is_censored else ""
    return (
        Entry(str(place)),
        Entry(row.unit),
        Entry(row.group),
        Entry(f"{row.rank:,.1f}{_ends(row.low, row.high)}", value=row.rank),
        Entry(f"{at_least}{row.step:,.1f}{_ends(row.step_low, row.step_high)}", value=row.step),
        Entry(format_share(row.learned_share)),
    )


def _ends(low: float | None, high: float | None) -> str:
    if as_number(low) is None:
        return ""
    return f" [{low:,.1f}, {'∞' if high is None else f'{high:,.1f}'}]"
