"""The numbers in a figure as a table, for the CSV file beside it."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tell_core.report.figures import Level, LeveragePoint, Series
from tell_core.report.forecast_figure import ForecastCurve

Value = str | float | int | None
Lines = Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class FigureData:
    """Columns and rows of what a figure shows; None is an empty field."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]

    def to_csv(self) -> str:
        """Return the table as CSV (RFC 4180), numbers with ten significant digits."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(self.columns)
        writer.writerows([_field(value) for value in row] for row in self.rows)
        return text.getvalue()


def curve_data(
    series: Iterable[Series], levels: Iterable[Level], tokens: str = "task_tokens"
) -> FigureData:
    """Tabulate curves and levels: a row per point, the score of every seed in columns of its own.

    Args:
        series: Curves, by arm.
        levels: Arms without task data; their tokens are an empty field.
        tokens: Name of the column of tokens.
    """
    curves = [
        (one.arm, point.x, point.mean, point.low, point.high, *point.seeds)
        for one in series
        for point in one.points
    ]
    flat = [(level.arm, None, level.mean, level.low, level.high) for level in levels]
    width = max((len(row) for row in curves), default=5)
    seeds = tuple(f"seed_score_{place}" for place in range(1, width - 4))
    rows = tuple((*row, *([None] * (width - len(row)))) for row in (*curves, *flat))
    return FigureData(("arm", tokens, "mean", "low", "high", *seeds), rows)


def leverage_data(lines: Mapping[str, Sequence[LeveragePoint]]) -> FigureData:
    """Tabulate leverage ratios; ``bound`` says where only a bound is known."""
    rows = tuple(
        (arm, point.budget_tokens, point.ratio, point.low, point.high, point.bound or None)
        for arm, points in lines.items()
        for point in points
    )
    columns = ("arm", "task_budget_tokens", "leverage_ratio", "low", "high", "bound")
    return FigureData(columns, rows)


def line_data(lines: Lines, columns: tuple[str, str, str]) -> FigureData:
    """Tabulate plain lines: name, x and y."""
    rows = tuple((name, x, y) for name, points in lines.items() for x, y in points)
    return FigureData(columns, rows)


def item_data(items: Iterable[tuple[str, Lines]]) -> FigureData:
    """Tabulate the loss curves of single items, by arm."""
    rows = tuple(
        (title, arm, step, loss)
        for title, lines in items
        for arm, points in lines.items()
        for step, loss in points
    )
    return FigureData(("item", "arm", "step", "loss"), rows)


def heat_data(
    names: Sequence[tuple[str, str]], losses: Sequence[Sequence[float]], steps: Sequence[int]
) -> FigureData:
    """Tabulate a heat map, a row per item with a column per probe.

    Args:
        names: Role and name of each item.
        losses: Shape (items, probes), in nats per token; NaN where nothing was measured.
        steps: Optimiser step of each probe.
    """
    rows = tuple(
        (*name, *(None if loss != loss else float(f"{loss:.5g}") for loss in row))
        for name, row in zip(names, losses, strict=True)
    )
    return FigureData(("role", "item", *(f"step_{step}" for step in steps)), rows)


def share_data(shares: Sequence[float]) -> FigureData:
    """Tabulate the share of task examples by window of the training order."""
    return FigureData(("window", "task_share"), tuple(enumerate(shares, start=1)))


def forecast_data(curve: ForecastCurve) -> FigureData:
    """Tabulate a forecast: measured points, band and back-tests, told apart by ``kind``."""
    measured = [("measured", p.x, p.mean, p.low, p.high, None) for p in curve.measured]
    band = [("forecast", p.x, p.mean, p.low, p.high, None) for p in curve.band]
    tests = [
        ("back-test", test.x, test.predicted, test.low, test.high, test.observed)
        for test in curve.backtests
    ]
    columns = ("kind", "task_tokens", "score", "low", "high", "observed")
    return FigureData(columns, (*measured, *band, *tests))


def _field(value: Value) -> str:
    if value is None:
        return ""
    return f"{value:.10g}" if isinstance(value, float) else str(value)
