"""Adaptive runs: find where leverage ends without running the whole grid.

The question of a run is up to which task budget TELL needs less task data than the best SFT. A
full grid answers it at every budget with every seed. Here cells are run in rounds, and each round
is decided by what the earlier ones gave:

1. The first seed at the middle and the largest task budget. Of several TELL arms and general
   budgets (*contenders*) the better half goes on.
2. Bisection, still with one seed, between the largest budget at which the contender beats every
   baseline and the smallest at which it does not. It takes leverage to fall with the budget.
3. The budget found is confirmed: all other seeds there for the best contender, and for the baseline
   that was better, which is needed at the next larger budget too. If the interval of the leverage
   ratio does not lie above 1, the next smaller budget is tried.

   With `analysis.target_half_width` the seeds come one by one from the third on, and end when the
   interval of the score difference is narrow enough. That looks at its width alone, never at
   whether it lies above 0. But seeds that agree by chance make it narrow, and an interval that
   stands because it is narrow misses the truth more often. So it has to be narrow enough even if
   seeds scatter as much as these few allow (upper 80 % bound of their standard deviation).

The decisions in 1 and 2 rest on single seeds and only choose where to look; what is claimed rests
on the intervals of 3, and those are the ordinary ones. Which cells
were left out is part of the result. How often this agrees with the full grid, and how often it
claims leverage where there is none, is measured in ``benchmarks/adaptive.py``.

Every round follows from the finished cells alone, so that an interrupted run goes on as it would
have.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

from scipy import stats

from tell_core.analysis.cells import AnalysedCell, ItemStatistics
from tell_core.analysis.curves import CurvePoint
from tell_core.analysis.leverage import leverage_ratio
from tell_core.analysis.resampling import Resampling
from tell_core.errors import SpecError
from tell_core.evaluation.metrics import build_metrics
from tell_core.spec.arms import SFT_ARMS, parse_arm
from tell_core.spec.cells import Cell, plan_cells, short_count
from tell_core.spec.model import AnalysisSpec, ExperimentSpec

Scores = Mapping[Cell, float]
_FIRST_LOOK = 3
_SURE_OF_SPREAD = 0.8


@dataclass(frozen=True)
class Round:
    """Cells to run next.

    Attributes:
        cells: The cells, none of them finished.
        reason: Why these, for people.
    """

    cells: tuple[Cell, ...]
    reason: str


@dataclass(frozen=True, order=True)
class Contender:
    """A TELL arm at one general budget."""

    arm: str
    general_budget_tokens: int | None


class Finding(NamedTuple):
    """What the finished seeds say of a contender at a task budget, against the best baseline.

    Attributes:
        low: Lower end of the interval of the leverage ratio; None where it is open.
        half_width: Half the interval of the score difference, in units of the primary metric;
            None where it is open.
    """

    low: float | None
    half_width: float | None


Judge = Callable[[Contender, int], Finding]


def contest(spec: ExperimentSpec) -> ExperimentSpec:
    """The experiment with only the arms that can change its answer.

    Raises:
        SpecError: There is no TELL arm, or no SFT arm to compare it with.
    """
    arms = [parse_arm(name) for name in spec.arms]
    if not any(arm.is_tell for arm in arms) or not any(arm.name in SFT_ARMS for arm in arms):
        raise SpecError(
            "an adaptive run compares arm `tell` with `sft` or `sft_matched`; `arms` has only"
            f" {', '.join(spec.arms)}. Add them, or run without --adaptive."
        )
    kept = [a.name for a in arms if a.is_tell or a.name in SFT_ARMS or not a.is_trained]
    return spec.model_copy(update={"arms": tuple(kept)})


def round_after(spec: ExperimentSpec, records: Iterable[Mapping[str, Any]]) -> Round | None:
    """The next round by the scores of finished cells, read from disk.

    Args:
        spec: The experiment, from `contest`.
        records: What `CellOutcome.record` gives for each finished cell.

    Raises:
        AnalysisError: A file is missing or damaged.
    """
    cells = [AnalysedCell.from_record(record) for record in records]
    if not cells:
        return next_round(spec, {}, _no_judge)
    metric = next(
        one for one in build_metrics(spec.evaluation) if one.name == spec.analysis.primary_metric
    )
    points = ItemStatistics(cells, [metric]).points(metric, Resampling.of(spec.analysis))
    sign = 1.0 if metric.higher_is_better else -1.0
    scores = {
        Cell(point.arm, point.task_budget_tokens, point.general_budget_tokens, seed): sign * score
        for point in points
        for seed, score in zip(point.seeds, point.scores.tolist(), strict=True)
    }
    judge = judge_of(points, spec.analysis, higher_is_better=metric.higher_is_better)
    return next_round(spec, scores, judge)


def _no_judge(one: Contender, budget: int) -> Finding:
    raise AssertionError(f"nothing of {one} has run yet at {budget}")


def next_round(spec: ExperimentSpec, scores: Scores, judge: Judge) -> Round | None:
    """The cells to run next, or None when the question is answered or nothing is left to run.

    Args:
        spec: The experiment, from `contest`.
        scores: Score of the primary metric of every finished cell, higher is better.
        judge: What the finished cells say at a budget.
    """
    race = _Race(spec, scores)
    return (
        race.coarse()
        or next(filter(None, (race.bisect(one) for one in race.leaders)), None)
        or _confirm(race, judge)
    )


def judge_of(
    points: Iterable[CurvePoint], analysis: AnalysisSpec, *, higher_is_better: bool
) -> Judge:
    """The judge that `next_round` needs.

    Args:
        points: Scores of the finished cells on the primary metric.
        analysis: How intervals are made.
        higher_is_better: Direction of the metric.
    """
    resampling = Resampling.of(analysis)
    known = {(p.arm, p.task_budget_tokens, p.general_budget_tokens): p for p in points}

    def judge(one: Contender, budget: int) -> Finding:
        general = one.general_budget_tokens
        tell = known[one.arm, budget, general]
        curves = [
            [point for (name, _, g), point in known.items() if name == arm and g in (None, general)]
            for arm in SFT_ARMS
        ]
        estimate = leverage_ratio(
            tell, [c for c in curves if c], resampling, higher_is_better=higher_is_better
        )
        low, high = estimate.advantage.low, estimate.advantage.high
        width = None if low is None or high is None else high - low
        return Finding(estimate.low, None if width is None else width / 2)

    return judge


def left_out(spec: ExperimentSpec, finished: Iterable[Cell]) -> tuple[Cell, ...]:
    """Cells of the full grid that an adaptive run did not need."""
    done = set(finished)
    return tuple(cell for cell in plan_cells(spec) if cell not in done)


@dataclass(frozen=True)
class _Race:
    """What the finished cells say with the first seed."""

    spec: ExperimentSpec
    scores: Scores

    @property
    def budgets(self) -> tuple[int, ...]:
        return self.spec.budgets.task_tokens

    @cached_property
    def contenders(self) -> tuple[Contender, ...]:
        tells = [name for name in self.spec.arms if parse_arm(name).is_tell]
        return tuple(Contender(arm, g) for arm in tells for g in self.spec.budgets.general_tokens)

    @cached_property
    def leaders(self) -> tuple[Contender, ...]:
        """The better half of the contenders by their mean score at the coarse budgets."""
        places = self._coarse_budgets()
        return self._best(self.contenders, places)[: (len(self.contenders) + 1) // 2]

    @cached_property
    def winner(self) -> Contender:
        """The best leader at all budgets that every leader was run at."""
        places = [b for b in self.budgets if all(self.has_run(one, b) for one in self.leaders)]
        return self._best(self.leaders, places)[0]

    def _best(
        self, contenders: Sequence[Contender], budgets: Sequence[int]
    ) -> tuple[Contender, ...]:
        def total(one: Contender) -> float:
            return sum(self.score(one.arm, budget, one) for budget in budgets)

        return tuple(sorted(contenders, key=total, reverse=True))

    def _coarse_budgets(self) -> tuple[int, ...]:
        last = len(self.budgets) - 1
        return tuple(self.budgets[at] for at in sorted({last // 2, last}))

    def coarse(self) -> Round | None:
        """The first seed at two budgets, and the arms that need no training."""
        first = self.spec.seeds[:1]
        untrained = [
            cell
            for cell in plan_cells(self.spec)
            if not parse_arm(cell.arm).is_trained and cell.seed in first
        ]
        cells = chain(
            untrained,
            *(
                self.cells(one, budget, first)
                for budget in self._coarse_budgets()
                for one in self.contenders
            ),
        )
        return self.round(cells, "one seed at the middle and the largest task budget")

    def bisect(self, one: Contender) -> Round | None:
        """The budget half way between where the contender wins and where it does not."""
        low, high = self.bracket(one)
        if high - low <= 1:
            return None
        budget = self.budgets[(low + high) // 2]
        reason = (
            f"one seed at {short_count(budget)} task tokens: where does {one.arm} stop winning?"
        )
        return self.round(self.cells(one, budget, self.spec.seeds[:1]), reason)

    def bracket(self, one: Contender) -> tuple[int, int]:
        """Places of the largest budget won (or -1), and of the smallest lost above it (or K)."""
        run = [at for at, budget in enumerate(self.budgets) if self.has_run(one, budget)]
        won = [at for at in run if self.margin(one, self.budgets[at]) > 0]
        low = max(won, default=-1)
        return low, min((at for at in run if at > low), default=len(self.budgets))

    def margin(self, one: Contender, budget: int) -> float:
        """Score above the better baseline at the same budget, first seed."""
        return self.score(one.arm, budget, one) - max(
            self.score(arm, budget, one) for arm in self.baselines
        )

    def better_baseline(self, one: Contender, budget: int) -> str:
        """The better of the SFT arms at a budget, first seed."""
        return max(self.baselines, key=lambda arm: self.score(arm, budget, one))

    @property
    def baselines(self) -> tuple[str, ...]:
        return tuple(arm for arm in SFT_ARMS if arm in self.spec.arms)

    def has_run(self, one: Contender, budget: int) -> bool:
        return all(cell in self.scores for cell in self.cells(one, budget, self.spec.seeds[:1]))

    def score(self, arm: str, budget: int, one: Contender) -> float:
        return self.scores[cell_of(arm, budget, one, self.spec.seeds[0])]

    def cells(self, one: Contender, budget: int, seeds: Sequence[int]) -> list[Cell]:
        """A contender and all its baselines at one budget."""
        return [
            cell_of(arm, budget, one, seed) for seed in seeds for arm in (*self.baselines, one.arm)
        ]

    def round(self, cells: Iterable[Cell], reason: str) -> Round | None:
        missing = tuple(dict.fromkeys(cell for cell in cells if cell not in self.scores))
        return Round(missing, reason) if missing else None


def cell_of(arm: str, budget: int, one: Contender, seed: int) -> Cell:
    """The cell of a contender, or of one of its baselines."""
    general = None if arm == "sft" else one.general_budget_tokens
    return Cell(arm, budget, general, seed)


def _confirm(race: _Race, judge: Judge) -> Round | None:
    """More seeds where the winner was last ahead; without success there, one budget lower."""
    one = race.winner
    if len(race.spec.seeds) < 2:
        return None
    start = max(race.bracket(one)[0], 0)
    for at in range(start, -1, -1):
        budget = race.budgets[at]
        if first := race.round(race.cells(one, budget, race.spec.seeds[:1]), _reason(one, budget)):
            return first
        if more := _more_seeds(race, one, at, judge):
            return more
        low = judge(one, budget).low
        if low is not None and low > 1:
            return None
    return None


def _more_seeds(race: _Race, one: Contender, at: int, judge: Judge) -> Round | None:
    """Seeds still wanted at a budget: all at once, or one by one until the interval is narrow."""
    seeds, target = race.spec.seeds, race.spec.analysis.target_half_width
    budget = race.budgets[at]
    baseline = race.better_baseline(one, budget)
    reason = _reason(one, budget)
    for num_seeds in [len(seeds)] if target is None else _looks(len(seeds)):
        cells = _evidence(race, one, at, baseline, seeds[:num_seeds])
        if more := race.round(cells, reason):
            return more
        width = judge(one, budget).half_width
        if target is not None and width is not None and width * _caution(num_seeds) <= target:
            return None
        reason = f"{_reason(one, budget)}: {_shown_width(width)}, wanted {target}"
    return None


def _looks(num_seeds: int) -> range:
    return range(min(_FIRST_LOOK, num_seeds), num_seeds + 1)


def _caution(num_seeds: int) -> float:
    """How much wider the interval may be by what so few seeds know of their own spread."""
    freedom = num_seeds - 1
    return math.sqrt(freedom / stats.chi2.ppf(1 - _SURE_OF_SPREAD, freedom))


def _shown_width(width: float | None) -> str:
    return "no interval yet" if width is None else f"half the interval is {width:.3g}"


def _evidence(
    race: _Race, one: Contender, at: int, baseline: str, seeds: Sequence[int]
) -> list[Cell]:
    """The winner at a budget; the baseline there and at the next larger (else smaller) one."""
    last = len(race.budgets) - 1
    places = sorted({at, at + 1 if at < last else max(at - 1, 0)})
    return [
        cell
        for seed in seeds
        for cell in (
            cell_of(one.arm, race.budgets[at], one, seed),
            *(cell_of(baseline, race.budgets[place], one, seed) for place in places),
        )
    ]


def _reason(one: Contender, budget: int) -> str:
    return f"more seeds of {one.arm} and its best baseline at {short_count(budget)} task tokens"
