"""Predictions of the quantization hypothesis, P1 to P3, P5 and P6: measured on a finished run.

Where a choice of budget has to be made it is the same for all and made beforehand: the smallest
task budget, at which leverage learning promises most, and the largest general budget.

Shape letters: N items, G general budgets, U observations, D draws.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from tell_core.analysis.cells import AnalysedCell, ItemStatistics, read_lines
from tell_core.analysis.curves import CurvePoint
from tell_core.analysis.emergence import MIN_GUARD_SHARE, MIN_POINTS, shape_verdicts
from tell_core.analysis.multiple import two_sided_p_value
from tell_core.analysis.registration import Split, Units, task_units
from tell_core.analysis.resampling import FloatArray, Resampling, interval, seed_deviations
from tell_core.analysis.sequence import (
    BoolArray,
    IntArray,
    LearningTimes,
    censored_regression,
    cluster_weights,
    learning_times,
    log_rank,
    rank_agreement,
    strata_of,
    survival_curve,
)
from tell_core.analysis.traces import CellTrace, read_trace
from tell_core.analysis.verdicts import Component, Finding
from tell_core.errors import AnalysisError
from tell_core.evaluation.base import PREDICTIONS_FILE, Metric
from tell_core.spec.model import ExperimentSpec

CLAIMS: Mapping[str, str] = {
    "P1": "With task data fixed, the loss of single items falls in a step as general data grows.",
    "P2": "Shared units are learned before specific ones, and more general data moves only the "
    "shared ones earlier.",
    "P3": "The more often a skill is used, the earlier it is learned: time ∝ frequency^−β.",
    "P4": "The anchor makes task data separable, and that is what the gain comes from.",
    "P5": "Extensive shuffle beats ordered data, in the score and in what is forgotten.",
    "P6": "TELL reaches the score of SFT with less task data.",
    "P7": "TELL moves the directions of specific units alone, SFT those of both groups.",
}
MIN_SEEDS = 3
MIN_LABELS = 5
MIN_GROUP_UNITS = 5
_ORDERED = ("tell_blocks", "tell_task_first", "tell_task_last")
_NUM_CLUSTER_DRAWS = 300
_NUM_NULL_DRAWS = 99
_GENERAL_METRIC = "general_log_probability"


@dataclass(frozen=True)
class RunCells:
    """The cells of a finished run and how to choose among them.

    Attributes:
        spec: The experiment.
        cells: Its cells.
        scores: Points of each metric, by metric.
        resampling: How intervals are drawn.
    """

    spec: ExperimentSpec
    cells: tuple[AnalysedCell, ...]
    scores: Mapping[str, Sequence[CurvePoint]]
    resampling: Resampling

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
        return cls(spec, tuple(cells), points, resampling)

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

    def of(self, arm: str, **budgets: int | None) -> list[AnalysedCell]:
        """Cells of an arm, at the budgets given."""
        return [
            cell
            for cell in self.cells
            if cell.arm == arm
            and all(getattr(cell, name) == value for name, value in budgets.items())
        ]

    def point(self, metric: str, arm: str) -> CurvePoint | None:
        """Scores of an arm at the smallest task budget and the largest general budget."""
        for point in self.scores.get(metric, ()):
            at_task = point.task_budget_tokens in (None, self.task_budget)
            at_general = point.general_budget_tokens in (None, self.general_budget)
            if point.arm == arm and at_task and at_general:
                return point
        return None

    def difference(self, metric: str, first: str, second: str, name: str) -> Component | None:
        """Score of one arm minus that of another, predicted to be above 0; None if one lacks.

        Seeds and items are paired.
        """
        one, other = self.point(metric, first), self.point(metric, second)
        if one is None or other is None:
            return None
        seeds = [seed for seed in one.seeds if seed in other.seeds]
        if len(seeds) < 2:
            return None
        rows = [point.select(seeds).rows(self.resampling) for point in (one, other)]
        return component_of(name, rows[0] - rows[1], self.resampling.confidence)


def component_of(name: str, rows: FloatArray, confidence: float) -> Component:
    """A measurement predicted to be above 0, from its estimate followed by its draws."""
    estimate, draws = float(rows[0]), rows[1:]
    low, high = interval(draws, draws, confidence)
    return Component(name, estimate, low, high, two_sided_p_value(draws, draws), estimate > 0)


def unmeasured(prediction: str, needs: str) -> Finding:
    """A prediction that the run cannot determine, with what it needs."""
    return Finding(prediction, CLAIMS[prediction], needs=needs)


def emergence_with_data(run: RunCells) -> Finding:
    """P1: shapes of the items' loss over the logarithm of the general budget.

    All seeds stand side by side. The first component is the share of items whose fall is a step
    that passes the guard, beyond the same share under `sft_matched`, which has the same numbers of
    steps and no general data; its interval is over items. The second asks whether as many steps
    would show if every item fell along its best smooth curve, with the residuals that it has.
    """
    told = _losses_by_general(run, "tell")
    if (needs := _needs_for_emergence(run, told)) is not None:
        return unmeasured("P1", needs)
    assert told is not None
    scale, losses, items = told
    matched = _losses_by_general(run, "sft_matched")
    if matched is None or len(matched[0]) != len(scale):
        return unmeasured("P1", "arm sft_matched at the same budgets: the control of equal steps")
    verdicts = shape_verdicts(scale, losses)
    is_step = np.array([one.is_emergent for one in verdicts], dtype=np.float64)
    control = np.array(
        [one.is_emergent for one in shape_verdicts(matched[0], matched[1])], dtype=np.float64
    )
    weights = cluster_weights(np.arange(len(is_step)), run.resampling.num_draws, 0)
    excess = component_of(
        "share of items with a step, beyond the control of equal steps",
        weights @ (is_step - control) / len(is_step),
        run.resampling.confidence,
    )
    counts = Counter(one.verdict for one in verdicts)
    remark = (
        f"{int(is_step.sum())} of {len(items)} items step with general data (in at least"
        f" {MIN_GUARD_SHARE:.0%} of the draws), {int(control.sum())} with steps alone; shapes: "
        + ", ".join(f"{number} {verdict}" for verdict, number in counts.most_common())
        + "."
    )
    return Finding(
        "P1",
        CLAIMS["P1"],
        (excess, _against_smooth(scale, losses, verdicts_share=_step_share(verdicts))),
        remark=remark,
        figure={
            "general_tokens": np.exp(scale).round().tolist(),
            "items": [
                {"item": item, "verdict": one.verdict, "guard_share": one.guard_share,
                 "losses": curve.tolist()}
                for item, one, curve in zip(items, verdicts, losses.T, strict=True)
            ],
        },
    )  # fmt: skip


def _needs_for_emergence(
    run: RunCells, told: tuple[FloatArray, FloatArray, list[str]] | None
) -> str | None:
    num_budgets = len(np.unique(told[0])) if told else 0
    seeds = {cell.seed for cell in run.of("tell")}
    if num_budgets < MIN_POINTS:
        return f"at least {MIN_POINTS} general budgets for tell; this run has {num_budgets}"
    if len(seeds) < MIN_SEEDS:
        return f"at least {MIN_SEEDS} seeds; this run has {len(seeds)}"
    return None


def _losses_by_general(run: RunCells, arm: str) -> tuple[FloatArray, FloatArray, list[str]] | None:
    """Log general tokens (P,), loss of each test item (P, N) and item names, seeds side by side."""
    cells = run.of(arm, task_budget_tokens=run.task_budget)
    cells = sorted(cells, key=lambda cell: (cell.general_budget_tokens or 0, cell.seed))
    if not cells:
        return None
    tables = [read_lines(cell.evaluated / PREDICTIONS_FILE) for cell in cells]
    losses = [[row["nll"] / row["num_tokens"] for row in table] for table in tables]
    scale = np.log([float(cell.general_budget_tokens or 1) for cell in cells])
    return scale, np.array(losses), [row["item_id"] for row in tables[0]]


def _step_share(verdicts: Sequence[Any]) -> float:
    return float(np.mean([one.verdict == "step" for one in verdicts]))


def _against_smooth(scale: FloatArray, losses: FloatArray, *, verdicts_share: float) -> Component:
    """The share of steps against what smooth falls with these residuals would show.

    The smooth curve of an item is a parabola in the log scale. The noise is that of the seeds
    around their mean, drawn by training, the same for all items, so that what the items of one
    training have in common stays common.
    """
    levels, place = np.unique(scale, return_inverse=True)
    design = np.stack([np.ones_like(scale), scale, scale**2], axis=1)
    fitted = design @ np.linalg.lstsq(design, losses, rcond=None)[0]
    means = np.stack([losses[place == k].mean(axis=0) for k in range(len(levels))])
    num_seeds = len(scale) / len(levels)
    residuals = (losses - means[place]) * np.sqrt(num_seeds / (num_seeds - 1))
    generator = np.random.default_rng(0)
    shares = []
    for _ in range(_NUM_NULL_DRAWS):
        drawn = residuals[generator.integers(len(scale), size=len(scale))]
        shares.append(_step_share(shape_verdicts(scale, fitted + drawn, is_guarded=False)))
    excess = verdicts_share - np.array(shares)
    p_value = (1 + int((excess <= 0).sum())) / (1 + len(shares))
    low, high = np.quantile(excess, [0.025, 0.975])
    return Component(
        "share of steps, beyond smooth curves with the same noise",
        float(excess.mean()),
        float(low),
        float(high),
        min(1.0, 2 * p_value),
        bool(excess.mean() > 0),
    )


def shared_before_specific(run: RunCells, split: Split) -> Finding:
    """P2: learning times of shared and specific units of the task under TELL.

    Log-rank test stratified by base loss over all general budgets, and the interaction of group
    and general budget in a censored regression of log time. Units are tokens where they were
    traced; whole items are drawn, and seeds from Student's t. The log-rank test knows these
    trainings alone, so the first p-value is the larger of its own and that of the regression.
    """
    found = _observations(run, split)
    if isinstance(found, str):
        return unmeasured("P2", found)
    observed, is_shared, log_general = found
    times = observed.times
    test = log_rank(times, is_shared, strata_of(times.base_losses), observed.clusters)
    needs = None
    try:
        ratio = group_effect(observed, is_shared, log_general, run.resampling)
        components = [ratio._replace(p_value=max(test.p_value, ratio.p_value))]
        if len(np.unique(log_general)) < 3:
            needs = "at least 3 general budgets for its second half: what more general data moves"
        else:
            components.append(_interaction(observed, is_shared, log_general, run.resampling))
    except AnalysisError as error:
        return unmeasured("P2", str(error))
    last = log_general == log_general.max()
    curves = {
        name: survival_curve(times.select(last & chosen))
        for name, chosen in (("shared", is_shared), ("specific", ~is_shared))
    }
    return Finding(
        "P2",
        CLAIMS["P2"],
        tuple(components),
        needs=needs,
        remark=(
            f"Log-rank z = {test.z:.1f}; {int(is_shared.sum())} observations of shared and"
            f" {int((~is_shared).sum())} of specific units, split registered as {split.digest}."
        ),
        figure={"survival": curves, "groups": split.counts()},
    )


class Observations(NamedTuple):
    """Learning times of the units of several trainings, side by side.

    Attributes:
        times: U learning times.
        clusters: Shape (U,). Which observations are drawn together.
        seeds: Shape (U,). Seed of the training.
    """

    times: LearningTimes
    clusters: IntArray
    seeds: IntArray


def _observations(run: RunCells, split: Split) -> tuple[Observations, BoolArray, FloatArray] | str:
    """Times of all shared and specific units in all TELL cells, or what is missing for that.

    With it whether each is shared, and its log general tokens.
    """
    parts: list[tuple[LearningTimes, Any, Any, FloatArray]] = []
    cells = _traced(run.of("tell", task_budget_tokens=run.task_budget))
    if (needs := _needs_seeds(cells)) is not None:
        return needs
    for cell, trace in cells:
        units = task_units(trace)
        groups = split.of(units.names)
        chosen = (groups == "shared") | (groups == "specific")
        times = learning_times(units.steps, units.losses).select(chosen)
        log_general = np.full(int(chosen.sum()), np.log(cell.general_budget_tokens or 1))
        parts.append((times, groups[chosen] == "shared", units.items[chosen], log_general))
    counts = Counter(parts[0][1].tolist())
    if min(counts[True], counts[False]) < MIN_GROUP_UNITS:
        return (
            f"at least {MIN_GROUP_UNITS} shared and {MIN_GROUP_UNITS} specific units of the task;"
            f" the registered split has {counts[True]} and {counts[False]}"
        )
    times = _joined([part[0] for part in parts])
    shared, items, log_general = (
        np.concatenate([part[place] for part in parts]) for place in (1, 2, 3)
    )
    seeds = np.repeat([cell.seed for cell, _ in cells], [len(part[1]) for part in parts])
    return Observations(times, items, seeds), shared, log_general


def _traced(cells: Sequence[AnalysedCell]) -> list[tuple[AnalysedCell, CellTrace]]:
    found = [(cell, read_trace(cell)) for cell in cells]
    return [(cell, trace) for cell, trace in found if trace is not None]


def _needs_seeds(cells: Sequence[tuple[AnalysedCell, Any]]) -> str | None:
    """What is missing for a spread of seeds; without one trainings pass for copies of another."""
    if not cells:
        return "trained cells of arm tell"
    num_seeds = len({cell.seed for cell, _ in cells})
    if num_seeds < MIN_SEEDS:
        return f"at least {MIN_SEEDS} seeds of tell; this run has {num_seeds}"
    return None


def _joined(parts: Sequence[LearningTimes]) -> LearningTimes:
    return LearningTimes(
        *(
            np.concatenate(columns)
            for columns in zip(*(vars(p).values() for p in parts), strict=True)
        )
    )


def group_effect(
    observed: Observations, is_shared: BoolArray, log_general: FloatArray, resampling: Resampling
) -> Component:
    """Log of the time of specific units over that of shared ones, at equal base loss.

    Args:
        observed: U observations; items are drawn together.
        is_shared: Shape (U,).
        log_general: Shape (U,). Log general tokens of the training.
        resampling: How the interval is drawn.

    Raises:
        AnalysisError: A seed does not determine the effect.
    """
    columns = [np.ones(len(is_shared)), ~is_shared, np.log(observed.times.base_losses)]
    if np.ptp(log_general) > 0:  # a single general budget is the intercept once more
        columns.append(log_general)
    design = np.stack(columns, axis=1).astype(np.float64)
    name = "log learning time of specific minus shared units"
    return _coefficient(name, observed, design, 1, resampling)


def _interaction(
    observed: Observations, is_shared: BoolArray, log_general: FloatArray, resampling: Resampling
) -> Component:
    """By how much more the shared units' log time falls per unit of log general data."""
    centred = log_general - log_general.mean()
    log_base = np.log(observed.times.base_losses)
    columns = [np.ones(len(centred)), ~is_shared, log_base, centred, ~is_shared * centred]
    design = np.stack(columns, axis=1).astype(np.float64)
    name = "change of log time with log general data, specific minus shared"
    return _coefficient(name, observed, design, 4, resampling)


def _coefficient(
    name: str,
    observed: Observations,
    design: FloatArray,
    place: int,
    resampling: Resampling,
    sign: float = 1.0,
) -> Component:
    """One coefficient of a censored regression of log time.

    Clusters are drawn with replacement, and seeds from Student's t, as everywhere.
    """

    def fitted(weights: FloatArray) -> float:
        chosen = weights > 0
        times = observed.times.select(chosen)
        fit = censored_regression(
            times.log_times, design[chosen], times.is_learned, weights[chosen]
        )
        return sign * float(fit.coefficients[place])

    drawn = cluster_weights(observed.clusters, _NUM_CLUSTER_DRAWS, resampling.seed)
    estimate, by_clusters = fitted(drawn[0]), []
    for weights in drawn[1:]:
        try:
            by_clusters.append(fitted(weights))
        except AnalysisError:
            continue  # a draw without one of the groups says nothing
    seeds = np.unique(observed.seeds)
    per_seed = np.array([fitted((observed.seeds == seed).astype(np.float64)) for seed in seeds])
    deviations = np.array(by_clusters) - np.mean(by_clusters)
    deviations += (
        seed_deviations(len(seeds), resampling._replace(num_draws=len(deviations))) @ per_seed
    )
    return component_of(
        name, np.concatenate([[estimate], estimate + deviations]), resampling.confidence
    )


def time_by_frequency(run: RunCells, curated: Path | None) -> Finding:
    """P3: censored regression of the learning time of general items on their use frequency.

    The frequency is the share of the curated general data that has the item's value in
    `analysis.quantum_column`; items of one value are drawn together, and seeds from Student's t.
    """
    column = run.spec.analysis.quantum_column
    if column is None:
        return unmeasured("P3", "`analysis.quantum_column`: the column that names an item's skill")
    frequencies = _frequencies(curated, column)
    cells = run.of(
        "tell", task_budget_tokens=run.task_budget, general_budget_tokens=run.general_budget
    )
    traced = _traced(cells)
    if (needs := _needs_seeds(traced)) is not None:
        return unmeasured("P3", needs)
    parts = [_labelled_times(cell, trace, column, frequencies) for cell, trace in traced]
    labels = {label for _, found in parts for label in found}
    if len(labels) < MIN_LABELS:
        return unmeasured(
            "P3", f"held-out general items of at least {MIN_LABELS} skills with something to learn;"
            f" this run has {len(labels)}",
        )  # fmt: skip
    times = _joined([part[0] for part in parts])
    named = [label for _, found in parts for label in found]
    log_p = np.log([frequencies[label] for label in named])
    design = np.stack([np.ones(len(named)), log_p], axis=1)
    seeds = np.repeat([cell.seed for cell, _ in traced], [len(found) for _, found in parts])
    observed = Observations(times, np.unique(named, return_inverse=True)[1], seeds)
    try:
        beta = _coefficient("β", observed, design, 1, run.resampling, sign=-1.0)
    except AnalysisError as error:
        return unmeasured("P3", str(error))
    points = zip(named, np.exp(log_p), np.expm1(times.log_times), times.is_learned, strict=True)
    return Finding(
        "P3",
        CLAIMS["P3"],
        (beta,),
        remark=f"{len(named)} observations of {len(labels)} skills in general data.",
        figure={
            "points": [
                {"skill": label, "frequency": float(p), "step": float(step), "is_learned": bool(ok)}
                for label, p, step, ok in points
            ]
        },
    )


def _frequencies(curated: Path | None, column: str) -> dict[str, float]:
    """Share of the curated general data of each value of a column."""
    if curated is None or not (curated / "general.parquet").is_file():
        return {}
    extras = pq.read_table(curated / "general.parquet", columns=["extra"])["extra"].to_pylist()
    counts = Counter(_label(json.loads(extra), column) for extra in extras)
    return {label: count / len(extras) for label, count in counts.items() if label}


def _label(extra: Mapping[str, Any], column: str) -> str:
    value = extra.get(column, "")
    return " > ".join(map(str, value)) if isinstance(value, list) else str(value)


def _labelled_times(
    cell: AnalysedCell, trace: CellTrace, column: str, frequencies: Mapping[str, float]
) -> tuple[LearningTimes, list[str]]:
    """Learning times of the general items that have something to learn and a known frequency."""
    labels = [
        _label(item["extra"], column) for item in read_lines(cell.mixed / "probe_items.jsonl")
    ]
    times = learning_times(trace.steps, trace.losses)
    has_label = np.array([label in frequencies for label in labels])
    chosen = has_label & ~trace.is_task & ~times.was_known
    return times.select(chosen), [labels[place] for place in np.flatnonzero(chosen)]


def shuffle_beats_order(run: RunCells) -> Finding:
    """P5: score of `tell` minus that of an arm with ordered data, and likewise what is kept."""
    arms = dict.fromkeys(cell.arm for cell in run.cells if cell.arm.startswith(_ORDERED))
    if not arms:
        return unmeasured(
            "P5", "an arm with ordered data: tell_blocks(4), tell_task_first or ..last"
        )
    arm, metric = next(iter(arms)), run.spec.analysis.primary_metric
    parts = (
        run.difference(metric, "tell", arm, f"{metric}: tell minus {arm}"),
        run.difference(_GENERAL_METRIC, "tell", arm, f"{_GENERAL_METRIC}: tell minus {arm}"),
    )
    found = tuple(part for part in parts if part is not None)
    if not found:
        return unmeasured("P5", f"tell and {arm} at equal budgets with at least 2 seeds")
    return Finding("P5", CLAIMS["P5"], found, remark=_budget_words(run))


def leverage_above_one(run: RunCells, leverage: Mapping[str, Any]) -> Finding:
    """P6: the leverage ratio against the better SFT arm, on a logarithmic scale."""
    metric = leverage["metrics"].get(leverage["primary_metric"], {})
    rows = metric.get("arms", {}).get("tell", {}).get(str(run.general_budget), [])
    row = next(
        (
            row
            for row in rows
            if row["baseline"] == "best" and row["task_budget_tokens"] == run.task_budget
        ),
        None,
    )
    if row is None:
        return unmeasured("P6", "arms tell and sft")
    ratio = row["ratio"] if row["ratio"] is not None else row.get("bound")
    if ratio is None or row["p_value"] is None:
        return unmeasured("P6", f"a leverage ratio: {row['reason']}")
    censored = {"above": " (at least)", "below": " (at most)"}.get(row["censored"], "")
    part = Component(
        f"leverage ratio{censored}", ratio, row["low"], row["high"], row["p_value"], ratio > 1
    )
    figure = {"rows": [one for one in rows if one["baseline"] == "best"]}
    return Finding("P6", CLAIMS["P6"], (part,), remark=_budget_words(run), figure=figure)


def _budget_words(run: RunCells) -> str:
    return f"At {run.task_budget:,} task and {run.general_budget:,} general tokens."


def learning_orders(run: RunCells) -> dict[str, Any]:
    """Rank agreement of the learning orders of task units: over the seeds of an arm, between arms.

    Cells at the smallest task budget and the largest general budget; `general_only` has no task.
    """
    by_arm: dict[str, list[LearningTimes]] = {}
    names: tuple[str, ...] = ()
    for cell in run.cells:
        at_task = cell.task_budget_tokens == run.task_budget
        at_general = cell.general_budget_tokens in (None, run.general_budget)
        trace = read_trace(cell) if at_task and at_general else None
        if trace is not None:
            units: Units = task_units(trace)
            names = units.names
            by_arm.setdefault(cell.arm, []).append(learning_times(units.steps, units.losses))
    return {
        "units": list(names),
        "within": {arm: _agreement(found, found) for arm, found in by_arm.items()},
        "with_tell": {
            arm: _agreement(found, by_arm.get("tell", []))
            for arm, found in by_arm.items()
            if arm != "tell"
        },
        "times": by_arm,
    }


def _agreement(
    first: Sequence[LearningTimes], second: Sequence[LearningTimes]
) -> dict[str, float | int] | None:
    """Mean agreement over all pairs of different trainings, each pair once."""
    pairs = combinations(first, 2) if first is second else product(first, second)
    found = [agreement for a, b in pairs if (agreement := rank_agreement(a, b)) is not None]
    if not found:
        return None
    return {
        "kendall": float(np.mean([one.kendall for one in found])),
        "spearman": float(np.mean([one.spearman for one in found])),
        "num_pairs": len(found),
    }
