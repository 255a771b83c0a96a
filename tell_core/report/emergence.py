"""Section on emergence: how the loss of single items fell, and the shape each curve was given."""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from tell_core.analysis.emergence import VERDICTS
from tell_core.report import figures
from tell_core.report.blocks import Block, Chart, Entry, Panels, Section, Table, Text, missing
from tell_core.report.charts import legend_of, make_chart
from tell_core.report.curves import arm_label, arm_place, headline_general_budget
from tell_core.report.figure_data import heat_data, item_data
from tell_core.report.formats import (
    as_number,
    format_count,
    format_score,
    format_share,
    format_short_tokens,
    plural,
)
from tell_core.report.palette import Palette
from tell_core.report.reading import CellRecord, Json, RunFiles
from tell_core.spec.arms import SFT_ARMS

_VERDICT_COLUMNS = tuple(verdict.capitalize() for verdict in VERDICTS)
MAX_HEAT_ROWS = 120
MAX_ITEMS = 12
MAX_HEAT_MAPS = 4


def emergence(run: RunFiles) -> Section:
    """Show per-item loss curves as heat maps and small multiples, and shares of verdicts."""
    title = "Emergence, item by item"
    cells: dict[str, Json] = (run.emergence or {}).get("cells") or {}
    traced = [cell for cell in run.cells if (cells.get(cell.name) or {}).get("items")]
    if not traced:
        return Section("emergence", title, (missing(_NO_EMERGENCE),))
    least = format_count((run.emergence or {}).get("min_points"))
    blocks: list[Block] = [Text(_INTRO.format(least=least)), _verdict_table(traced, cells)]
    shown = shown_cells(run, traced)
    loss_range = _loss_range(shown, cells)
    heat_maps = [_heat_map(cell, cells[cell.name], loss_range) for cell in _for_heat_maps(shown)]
    blocks.append(Panels(tuple(heat_maps), caption=_HEAT_CAPTION))
    if multiples := _small_multiples(shown, cells):
        blocks.append(multiples)
    return Section("emergence", title, blocks)


def shown_cells(run: RunFiles, cells: Sequence[CellRecord]) -> list[CellRecord]:
    """Choose one cell per arm: middle task budget, headline general budget, first seed."""
    budgets = sorted({c.task_budget_tokens for c in cells if c.task_budget_tokens is not None})
    middle = budgets[len(budgets) // 2] if budgets else None
    headline = headline_general_budget(run)
    chosen: dict[str, CellRecord] = {}
    for cell in sorted(cells, key=lambda cell: cell.seed):
        fits_task = cell.task_budget_tokens in (None, middle)
        if fits_task and cell.general_budget_tokens in (None, headline):
            chosen.setdefault(cell.arm, cell)
    return sorted(chosen.values(), key=lambda cell: arm_place(cell.arm))


def cell_title(cell: CellRecord) -> str:
    """Name a cell for people: ``TELL · 4k task · 40k general · seed 0``."""
    parts = [arm_label(cell.arm)]
    if cell.task_budget_tokens is not None:
        parts.append(f"{format_short_tokens(cell.task_budget_tokens)} task")
    if cell.general_budget_tokens is not None:
        parts.append(f"{format_short_tokens(cell.general_budget_tokens)} general")
    return " · ".join([*parts, f"seed {cell.seed}"])


def _for_heat_maps(shown: Sequence[CellRecord]) -> list[CellRecord]:
    """Keep the arms that the argument rests on, then others while there is room."""
    ranked = sorted(shown, key=lambda cell: cell.arm not in ("tell", "sft", "general_only"))
    return sorted(ranked[:MAX_HEAT_MAPS], key=lambda cell: arm_place(cell.arm))


def _verdict_table(traced: Sequence[CellRecord], cells: dict[str, Json]) -> Table:
    counts: dict[tuple[str, str], Counter[str]] = {}
    for cell in traced:
        for item in cells[cell.name]["items"]:
            key = (cell.arm, str(item.get("role", "task")))
            counts.setdefault(key, Counter())[str(item.get("verdict"))] += 1
    rows = [
        (
            Entry(arm_label(arm)),
            Entry(role),
            Entry(format_count(total := sum(found.values())), value=total),
            *(_share_entry(found[verdict], total) for verdict in VERDICTS),
        )
        for (arm, role), found in sorted(
            counts.items(), key=lambda item: (arm_place(item[0][0]), item[0][1] != "task")
        )
    ]
    return Table(
        caption="Shape of the loss curve: share and number of curves (items × cells)",
        columns=("Arm", "Items of", "Curves", *_VERDICT_COLUMNS),
        rows=tuple(rows),
        numeric=frozenset({"Curves", *_VERDICT_COLUMNS}),
    )


def _share_entry(count: int, total: int) -> Entry:
    share = count / total if total else 0.0
    return Entry(f"{format_share(share)} ({count:,})", share=share)


def _heat_map(cell: CellRecord, traced: Json, loss_range: tuple[float, float]) -> Chart:
    items = sorted(traced["items"], key=_order_of)[:MAX_HEAT_ROWS]
    losses = [[_or_nan(loss) for loss in item["losses"]] for item in items]
    num_task = sum(item.get("role", "task") == "task" for item in items)
    draw = partial(figures.loss_heat_map, losses, num_task, traced["steps"], loss_range=loss_range)
    names = [(str(item.get("role", "task")), str(item.get("item"))) for item in items]
    return make_chart(
        f"Loss by item: {cell_title(cell)}",
        f"heat-{cell.name}",
        draw,
        heat_data(names, losses, traced["steps"]),
        _heat_words(losses, num_task, traced["steps"]),
    )


def _heat_words(losses: Sequence[Sequence[float]], num_task: int, steps: Sequence[int]) -> str:
    """Say what a heat map shows: the mean loss of either role at the first and the last probe."""
    parts = []
    for role, rows in (("task item", losses[:num_task]), ("general item", losses[num_task:])):
        pairs = [(row[0], row[-1]) for row in rows if row[0] == row[0] and row[-1] == row[-1]]
        if pairs:
            begin, end = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
            parts.append(
                f"mean loss of {plural(len(rows), role)} {format_score(begin)} at the first probe, "
                f"{format_score(end)} at the last"
            )
    return f"{plural(len(steps), 'probe')}; {'; '.join(parts)} (nats per token)."


def _order_of(item: Json) -> tuple[bool, float, float]:
    """Task items first; within a role those that fall early first, never-falling ones last."""
    midpoint = as_number(item.get("midpoint_step"))
    losses = [loss for loss in map(as_number, item["losses"]) if loss is not None]
    last = losses[-1] if losses else 0.0
    is_general = item.get("role", "task") != "task"
    return (is_general, midpoint if midpoint is not None else float("inf"), last)


def _loss_range(shown: Iterable[CellRecord], cells: dict[str, Json]) -> tuple[float, float]:
    """Return the range that holds all but the 2 % lowest and highest losses of the maps."""
    losses = sorted(
        loss
        for cell in shown
        for item in cells[cell.name]["items"]
        for loss in map(as_number, item["losses"])
        if loss is not None
    )
    if not losses:
        return 0.0, 1.0
    cut = int(0.02 * len(losses))
    return losses[cut], losses[-1 - cut]


def _small_multiples(shown: Sequence[CellRecord], cells: dict[str, Json]) -> Chart | None:
    """Draw single items under TELL and SFT: the sharpest steps first, then other verdicts."""
    lead = next((cell for cell in shown if cell.arm == "tell"), shown[0] if shown else None)
    if lead is None:
        return None
    others = [cell for cell in shown if cell.arm in SFT_ARMS]
    chosen = _chosen_items(cells[lead.name]["items"])
    panels = [(_item_title(item), _lines_of(item, (lead, *others), cells)) for item in chosen]
    panels = [(title, lines) for title, lines in panels if lines]
    if not panels:
        return None
    verdicts = Counter(str(item.get("verdict")) for item in chosen)
    counted = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    return make_chart(
        f"Single task items: {cell_title(lead)}, and SFT at the same budget",
        "items",
        partial(_draw_items, panels, 4),
        item_data(panels),
        f"Loss by optimiser step of {plural(len(panels), 'item')}, by shape: {counted}.",
        narrow=partial(_draw_items, panels, 2),
        caption="Loss in nats per token by optimiser step, the arms on the same item.",
        legend=legend_of([cell.arm for cell in (lead, *others)]),
    )


def _draw_items(panels: Any, columns: int, palette: Palette) -> Figure:
    return figures.item_curves(panels, palette, columns=columns)


def _chosen_items(items: Sequence[Json]) -> list[Json]:
    """Take task items of every verdict in turn, the sharpest of each first."""
    ranked = {
        verdict: sorted(
            (i for i in items if i.get("verdict") == verdict and i.get("role", "task") == "task"),
            key=lambda item: -(as_number(item.get("sharpness")) or 0.0),
        )
        for verdict in VERDICTS
    }
    rounds = range(max((len(group) for group in ranked.values()), default=0))
    mixed = [group[place] for place in rounds for group in ranked.values() if place < len(group)]
    chosen = mixed[:MAX_ITEMS]
    return sorted(chosen, key=lambda item: VERDICTS.index(item["verdict"]))


def _item_title(item: Json) -> str:
    name = str(item.get("item"))
    return f"{item.get('verdict')} · {name if len(name) <= 18 else name[:17] + '…'}"


def _lines_of(
    item: Json, shown: Iterable[CellRecord], cells: dict[str, Json]
) -> dict[str, list[tuple[float, float]]]:
    lines = {}
    for cell in shown:
        traced = cells[cell.name]
        same = next((one for one in traced["items"] if one.get("item") == item.get("item")), None)
        points = _points(traced["steps"], same["losses"]) if same else []
        if points:
            lines[cell.arm] = points
    return lines


def _points(steps: Iterable[Any], losses: Iterable[Any]) -> list[tuple[float, float]]:
    pairs = zip(map(as_number, steps), map(as_number, losses), strict=False)
    return [(step, loss) for step, loss in pairs if step is not None and loss is not None]


def _or_nan(value: object) -> float:
    number = as_number(value)
    return float("nan") if number is None else number


_NO_EMERGENCE = (
    "No per-item curves were analysed in this run (emergence.json is missing or empty). They need "
    "trained arms with probe losses at enough steps."
)
_INTRO = (
    "During training the loss of fixed probe items was measured at {least} or more steps, and a "
    "shape was fitted to the curve of each item on its own. “Step” is one sharp drop, “gradual” a "
    "smooth fall, “flat” no change shown, “rising” a growing loss; a verdict other than flat is "
    "given only where it leads clearly (AICc difference of at least 4)."
)
_HEAT_CAPTION = (
    "Each row is one probe item, each column one probe step (logarithmically spaced); dark is high "
    "loss. Rows are ordered by when the item's loss fell."
)
