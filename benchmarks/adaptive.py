"""What an adaptive run saves, and whether it reaches the full grid's conclusion.

    python benchmarks/adaptive.py RUN_DIRECTORY [--studies 200] [--widths 0.05 …]

First a recorded full grid is replayed: the adaptive runner sees only the cells it asks for. Then
studies are simulated whose true leverage is known: learning curves are sums of quanta,
sum_k p_k (1 - exp(-c p_k n)) with p_k ~ k^-1.5, TELL's with task tokens multiplied by a leverage
that falls with the budget; each training adds noise in log tokens, items add noise that all cells
share, and some of their own. Conclusion: the largest task budget with leverage shown above 1.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np

from tell_core.analysis.adaptive import Contender, Finding, Judge, contest, judge_of, next_round
from tell_core.analysis.cells import AnalysedCell, ItemStatistics
from tell_core.analysis.curves import CurvePoint
from tell_core.analysis.leverage import leverage_ratio
from tell_core.analysis.resampling import Resampling
from tell_core.evaluation.metrics import build_metrics
from tell_core.spec.arms import parse_arm
from tell_core.spec.cells import Cell, plan_cells
from tell_core.spec.loading import load_spec
from tell_core.spec.model import AnalysisSpec, ExperimentSpec
from tell_core.store import read_json

Grid = dict[tuple[str, int | None, int | None], CurvePoint]


def replay(spec: ExperimentSpec, grid: Grid, sign: float) -> tuple[set[Cell], list[str]]:
    """The cells that an adaptive run asks for, and its reasons."""
    contested = contest(spec)
    finished: dict[Cell, float] = {}
    reasons = []
    while step := next_round(contested, finished, judge_on(grid, finished, spec, sign)):
        for cell in step.cells:
            point = grid[cell.arm, cell.task_budget_tokens, cell.general_budget_tokens]
            finished[cell] = sign * float(point.select([cell.seed]).scores[0])
        reasons.append(f"{len(step.cells)} cells: {step.reason}")
    return set(finished), reasons


def judge_on(grid: Grid, finished: dict[Cell, float], spec: ExperimentSpec, sign: float) -> Judge:
    def judge(one: Contender, budget: int) -> Finding:
        seen = seen_points(grid, finished)
        return judge_of(seen, spec.analysis, higher_is_better=sign > 0)(one, budget)

    return judge


def seen_points(grid: Grid, finished: dict[Cell, float] | set[Cell]) -> list[CurvePoint]:
    seeds: dict[tuple[str, int | None, int | None], list[int]] = {}
    for cell in finished:
        key = cell.arm, cell.task_budget_tokens, cell.general_budget_tokens
        seeds.setdefault(key, []).append(cell.seed)
    return [grid[key].select(sorted(found)) for key, found in seeds.items()]


def conclusion(
    points: list[CurvePoint], analysis: AnalysisSpec, *, higher: bool
) -> tuple[int | None, float | None]:
    """Largest task budget with leverage of `tell` shown above 1, and the ratio or bound there."""
    resampling = Resampling(analysis.confidence, analysis.bootstrap_draws, analysis.seed)
    curves = [[p for p in points if p.arm == arm] for arm in ("sft", "sft_matched")]
    shown = []
    for point in points:
        if point.arm == "tell":
            found = leverage_ratio(
                point, [c for c in curves if c], resampling, higher_is_better=higher
            )
            if found.low is not None and found.low > 1:
                shown.append((point.task_budget_tokens, found.ratio or found.bound))
    return max(shown, default=(None, None))


def recorded(directory: Path) -> None:
    """Replay a finished run."""
    spec = load_spec(directory / "spec.resolved.yaml")
    manifest = read_json(directory / "manifest.json")
    stages = directory / "stages"
    cells = [
        AnalysedCell.from_record(
            record
            | {"cell": name, "mix": stages / record["mix"], "evaluate": stages / record["evaluate"],
               "train": stages / record["train"] if record["train"] else None}
        )
        for name, record in manifest["cells"].items()
    ]  # fmt: skip
    metrics = {metric.name: metric for metric in build_metrics(spec.evaluation)}
    metric = metrics[spec.analysis.primary_metric]
    resampling = Resampling(spec.analysis.confidence, spec.analysis.bootstrap_draws)
    points = ItemStatistics(cells, [metric]).points(metric, resampling)
    grid = {(p.arm, p.task_budget_tokens, p.general_budget_tokens): p for p in points}
    run, reasons = replay(spec, grid, 1.0 if metric.higher_is_better else -1.0)
    tokens = {
        name: record["ledger"]["rendered_tokens"] for name, record in manifest["cells"].items()
    }
    tuning = {arm: len(table["candidates"]) * tokens_of(table["cell"], manifest)
              for arm, table in manifest["tuning"].items()}  # fmt: skip
    used = sum(tokens[cell.name] for cell in run)
    used_tuning = sum(n for arm, n in tuning.items() if arm in contest(spec).arms)
    everything, all_tuning = sum(tokens.values()), sum(tuning.values())
    print(f"recorded grid {directory}: {len(run)} of {len(plan_cells(spec))} cells")
    for reason in reasons:
        print(f"  {reason}")
    print(f"  tokens of the cells      {used:>10,} of {everything:>10,} = {used / everything:.0%}")
    total, whole = used + used_tuning, everything + all_tuning
    print(f"  with tuning (estimated)  {total:>10,} of {whole:>10,} = {total / whole:.0%}")
    full = conclusion(points, spec.analysis, higher=metric.higher_is_better)
    seen = conclusion(seen_points(grid, run), spec.analysis, higher=metric.higher_is_better)
    print(f"  full grid: shown above 1 up to {full[0]} (ratio {full[1]})")
    print(f"  adaptive:  shown above 1 up to {seen[0]} (ratio {seen[1]})")


def tokens_of(tuning_cell: str, manifest: dict) -> int:
    """Tokens of a tuning training: those of the cell that differs from it in the seed alone."""
    stem = tuning_cell.rsplit("-s", 1)[0]
    return next(
        record["ledger"]["rendered_tokens"]
        for name, record in manifest["cells"].items()
        if name.rsplit("-s", 1)[0] == stem
    )


BUDGETS = (250, 500, 1000, 2000, 4000, 8000)
GENERAL = 20_000


def simulated_spec(num_seeds: int, target: float | None = None) -> ExperimentSpec:
    """The grid that is simulated; its names stand for nothing."""
    return ExperimentSpec.model_validate(
        {
            "name": "simulated",
            "model": {"id": "none"},
            "task": {"name": "none", "train": "none", "test": "none"},
            "general": ["none"],
            "budgets": {"task_tokens": BUDGETS, "general_tokens": GENERAL},
            "arms": ["sft", "sft_matched", "tell"],
            "seeds": list(range(num_seeds)),
            "analysis": {"bootstrap_draws": 500, "target_half_width": target},
        }
    )


def quanta_curve(tokens: np.ndarray, scale: float) -> np.ndarray:
    use = np.arange(1, 41) ** -1.5
    use /= use.sum()
    return (use * (1 - np.exp(-np.multiply.outer(tokens, use) / scale))).sum(axis=-1)


class Study:
    """A simulated task: how fast each arm learns, and how much trainings differ."""

    def __init__(self, rng: np.random.Generator, *, has_leverage: bool = True) -> None:
        self.rng = rng
        self.scale, self.noise = rng.uniform(50, 400), rng.uniform(0.05, 0.4)
        budgets = np.asarray(BUDGETS, dtype=float)
        first, ends = rng.uniform(1.5, 6.0), rng.uniform(500, 8000)
        fall = -np.log(first) / np.log(ends / budgets[0])
        matched = rng.uniform(0.7, 1.4)
        leverage = np.maximum(first * (budgets / budgets[0]) ** fall, 0.5)
        if not has_leverage:
            leverage, matched = np.ones_like(budgets), 1.0
        self.truth = dict(zip(BUDGETS, leverage / max(1.0, matched), strict=True))
        self.reach = {"sft": budgets, "sft_matched": budgets * matched, "tell": budgets * leverage}

    def grid(self, spec: ExperimentSpec) -> Grid:
        """One run of the full grid."""
        seeds = tuple(spec.seeds)
        item_draws = self.rng.normal(0, 0.01, spec.analysis.bootstrap_draws)
        grid: Grid = {}
        for arm, reach in self.reach.items():
            for budget, tokens in zip(BUDGETS, reach, strict=True):
                noise = np.exp(self.rng.normal(0, self.noise, len(seeds)))
                scores = quanta_curve(tokens * noise, self.scale)
                general = None if arm == "sft" else GENERAL
                grid[arm, budget, general] = CurvePoint(
                    arm, budget, general, np.full(len(seeds), float(budget)), seeds, scores,
                    scores[:, None] + item_draws + self.rng.normal(0, 0.003, item_draws.shape),
                    num_items=300,
                )  # fmt: skip
        return grid


def simulated(num_studies: int, num_seeds: int, target: float | None) -> None:
    """Agreement, saving and bias over many studies."""
    spec = simulated_spec(num_seeds, target)
    rng = np.random.default_rng(0)
    counts: Counter[str] = Counter()
    shares: list[float] = []
    errors: dict[str, list[float]] = {"adaptive": [], "full grid": []}
    for _ in range(num_studies):
        study = Study(rng)
        grid = study.grid(spec)
        run, _ = replay(spec, grid, 1.0)
        shares.append(cost(run) / cost(set(plan_cells(spec))))
        full = conclusion(list(grid.values()), spec.analysis, higher=True)
        other = conclusion(list(study.grid(spec).values()), spec.analysis, higher=True)
        seen = conclusion(seen_points(grid, run), spec.analysis, higher=True)
        counts["same"] += seen[0] == full[0]
        counts["near"] += abs(step_of(seen[0]) - step_of(full[0])) <= 1
        counts["same, two full grids"] += other[0] == full[0]
        counts["near, two full grids"] += abs(step_of(other[0]) - step_of(full[0])) <= 1
        for name, (budget, ratio) in (("adaptive", seen), ("full grid", full)):
            if budget is not None and ratio is not None:
                counts[f"claim, {name}"] += 1
                counts[f"false, {name}"] += study.truth[budget] <= 1
                errors[name].append(float(np.log(ratio / study.truth[budget])))
    print(f"simulated, {num_studies} studies, {num_seeds} seeds, half width wanted: {target}")
    print(
        f"  training tokens used: median {np.median(shares):.0%},"
        f" 90th percentile {np.quantile(shares, 0.9):.0%}"
    )
    for name in ("same", "near", "same, two full grids", "near, two full grids"):
        print(f"  largest budget shown above 1, {name}: {counts[name] / num_studies:.0%}")
    for name, found in errors.items():
        print(
            f"  {name}: some leverage shown in {counts[f'claim, {name}'] / num_studies:.0%},"
            f" wrongly in {counts[f'false, {name}'] / num_studies:.1%}; ratio there / truth"
            f" {np.exp(np.mean(found)):.2f} (geometric mean)"
        )


def without_leverage(num_studies: int, num_seeds: int, target: float | None) -> None:
    """How often leverage is claimed where there is none at any budget."""
    spec = simulated_spec(num_seeds, target)
    rng = np.random.default_rng(1)
    claims: Counter[str] = Counter()
    for _ in range(num_studies):
        grid = Study(rng, has_leverage=False).grid(spec)
        run, _ = replay(spec, grid, 1.0)
        for name, points in (
            ("adaptive", seen_points(grid, run)),
            ("full grid", list(grid.values())),
        ):
            claims[name] += conclusion(points, spec.analysis, higher=True)[0] is not None
    print(
        f"simulated without leverage, {num_studies} studies, {num_seeds} seeds: some claimed in"
        f" {claims['adaptive'] / num_studies:.1%} (adaptive),"
        f" {claims['full grid'] / num_studies:.1%} (full grid)"
    )


def step_of(budget: int | None) -> int:
    """Place of a budget, -1 for none."""
    return -1 if budget is None else BUDGETS.index(budget)


def cost(cells: set[Cell]) -> float:
    """Training tokens: task data, and general data or its equal in steps."""
    return float(
        sum(
            (cell.task_budget_tokens or 0) + (cell.general_budget_tokens or 0)
            for cell in cells
            if parse_arm(cell.arm).is_trained
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", help="directory of a finished run")
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument(
        "--widths", type=float, nargs="*", default=[0.02, 0.05, 0.1], help="half widths to stop at"
    )
    arguments = parser.parse_args()
    if arguments.run:
        recorded(arguments.run)
    for num_seeds, target in ((3, None), (5, None), *((5, width) for width in arguments.widths)):
        simulated(arguments.studies, num_seeds, target)
        without_leverage(arguments.studies, num_seeds, target)


if __name__ == "__main__":
    main()
