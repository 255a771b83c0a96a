"""The cells of a finished run, and how the predictions choose and compare them.

Where a choice of budget has to be made it is the same for all and made beforehand: the smallest
task budget, at which leverage learning promises most, and the largest general budget.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tell_core.analysis.cells import AnalysedCell, ItemStatistics
from tell_core.analysis.curves import CurvePoint
from tell_core.analysis.multiple import two_sided_p_value
from tell_core.analysis.resampling import FloatArray, Resampling, interval
from tell_core.analysis.traces import CellTrace, read_trace
from tell_core.analysis.verdicts import Component
from tell_core.evaluation.base import Metric
from tell_core.spec.model import ExperimentSpec

MIN_SEEDS = 3
MIN_GROUP_UNITS = 5


@dataclass(frozen=True)
class RunCells:
    """The cells of a finished run and how to choose among them.

    Attributes:
        spec: The experiment.
        cells: Its cells.
        scores: Points of each metric, by metric.
        resampling: How intervals are drawn.
        metrics: The metrics, by name.
    """

    spec: ExperimentSpec
    cells: tuple[AnalysedCell, ...]
    scores: Mapping[str, Sequence[CurvePoint]]
    resampling: Resampling
    metrics: Mapping[str, Metric] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        spec: ExperimentSpec,
        cells: Sequence[AnalysedCell],
        metrics: Sequence[Metric],
    ) -> "RunCells":
        """Read the scores of all cells.

        Raises:
            AnalysisError: A file is missing, or cells were scored on different items.
        """
        resampling = Resampling.of(spec.analysis)
        statistics = ItemStatistics(cells, metrics)
        points = {
            metric.name: statistics.points(metric, resampling) for metric in statistics.metrics
        }
        by_name = {metric.name: metric for metric in statistics.metrics}
        return cls(spec, tuple(cells), points, resampling, by_name)

    @property
    def task_budget(self) -> int | None:
        """The smallest task budget of the TELL cells."""
        budgets = [c.task_budget_tokens for c in self.of("tell") if c.task_budget_tokens]
        return min(budgets, default=None)

    @property
    def general_budget(self) -> int | None:
        """The largest general budget of the TELL cells."""
        budgets = [c.general_budget_tokens for c in self.of("tell") if c.general_budget_tokens]
        return max(budgets, default=None)

    @property
    def budget_words(self) -> str:
        """The budgets at which one was chosen."""
        return f"At {self.task_budget:,} task and {self.general_budget:,} general tokens."

    def of(self, arm: str, **budgets: int | None) -> list[AnalysedCell]:
        """Cells of an arm, at the budgets given."""
        return [
            cell
            for cell in self.cells
            if cell.arm == arm
            and all(getattr(cell, name) == value for name, value in budgets.items())
        ]

    def is_chosen(self, one: AnalysedCell | CurvePoint) -> bool:
        """Whether it is at the smallest task and largest general budget, as far as it has any."""
        at_task = one.task_budget_tokens in (None, self.task_budget)
        return at_task and one.general_budget_tokens in (None, self.general_budget)

    def point(self, metric: str, arm: str) -> CurvePoint | None:
        """Scores of an arm at the budgets chosen for all."""
        points = (p for p in self.scores.get(metric, ()) if p.arm == arm and self.is_chosen(p))
        return next(points, None)

    def difference(self, metric: str, first: str, second: str, name: str) -> Component | None:
        """Score of one arm minus that of another, predicted to be the better; None if one lacks.

        Seeds and items are paired.
        """
        one, other = self.point(metric, first), self.point(metric, second)
        if one is None or other is None:
            return None
        seeds = [seed for seed in one.seeds if seed in other.seeds]
        if len(seeds) < 2:
            return None
        rows = [point.select(seeds).rows(self.resampling) for point in (one, other)]
        part = component_of(name, rows[0] - rows[1], self.resampling.confidence)
        if self.metrics[metric].higher_is_better:
            return part
        return part._replace(is_as_predicted=part.estimate < 0)


def component_of(name: str, rows: FloatArray, confidence: float) -> Component:
    """A measurement predicted to be above 0, from its estimate followed by its draws."""
    estimate, draws = float(rows[0]), rows[1:]
    low, high = interval(draws, draws, confidence)
    return Component(name, estimate, low, high, two_sided_p_value(draws, draws), estimate > 0)


def traced(cells: Sequence[AnalysedCell]) -> list[tuple[AnalysedCell, CellTrace]]:
    """The trained ones of some cells, with the losses over their training."""
    found = [(cell, read_trace(cell)) for cell in cells]
    return [(cell, trace) for cell, trace in found if trace is not None]


def needs_seeds(cells: Sequence[tuple[AnalysedCell, CellTrace]]) -> str | None:
    """What is missing for a spread of seeds; without one trainings pass for copies of another."""
    if not cells:
        return "trained cells of arm tell"
    num_seeds = len({cell.seed for cell, _ in cells})
    if num_seeds < MIN_SEEDS:
        return f"at least {MIN_SEEDS} seeds of tell; this run has {num_seeds}"
    return None
