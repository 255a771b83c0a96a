"""How often forecasts hold on simulated curves of families that the forecast does not know.

python -m tests.tell_core.analysis.calibration --studies 40
"""

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tell_core.analysis.forecast import MeasuredCurve, Target, forecast_curve
from tell_core.analysis.resampling import FloatArray
from tell_core.spec.model import AnalysisSpec
from tests.tell_core.analysis.growing import FAMILIES, NUM_MEASURED, Growing, expected, simulate

FIRST_SEED = 1000
BACKTESTS = ("3 budgets", "4 budgets")
AHEAD = ("twice", "four times")
TOKENS = "tokens needed"
COLUMNS = (*BACKTESTS, *AHEAD, TOKENS)
_LEAST_CLIMB = 0.05  # of the range, from the largest budget to the target


def covered(family: str, seeds: Iterable[int]) -> dict[str, list[bool]]:
    """Whether forecasts covered, by back-tests on so many budgets and by how far ahead.

    A forecast ahead is made from all five budgets, of scores that no run would know. The tokens
    needed are those of the score that the curve without noise has at twice the largest budget,
    where that is a climb. Curves without a forecast do not count.
    """
    found: dict[str, list[bool]] = {name: [] for name in COLUMNS}
    for seed in seeds:
        study, truth = simulate(family, seed), expected(family, seed)
        scores = study.scores[:, :NUM_MEASURED]
        curve = MeasuredCurve(
            "sft", None, study.tokens[:NUM_MEASURED], scores, study.limits, 1.0, 0.0
        )
        target = Target("twice the largest budget", float(truth[NUM_MEASURED]))
        entry = forecast_curve(curve, [target], AnalysisSpec())
        if entry["status"] != "ok":
            continue
        for test in entry["backtests"]:
            found[f"{len(test['fitted_on'])} budgets"].append(test["is_covered"])
        later = study.scores[:, NUM_MEASURED:].mean(axis=0)
        for name, row, score in zip(AHEAD, entry["gains"][1:], later, strict=True):
            found[name].append(row["low"] - 1e-9 <= score <= row["high"] + 1e-9)
        if np.diff(truth)[NUM_MEASURED - 1] >= _LEAST_CLIMB * _range(study, truth):
            found[TOKENS].append(_holds(entry["targets"][0], study.tokens[NUM_MEASURED - 1]))
    return found


def _range(study: Growing, truth: FloatArray) -> float:
    low, high = study.limits
    return high - low if np.isfinite(low) else float(high - truth[0])


def _holds(target: Mapping[str, Any], more_tokens: float) -> bool:
    """Whether the interval of further tokens holds the true number; None is infinite."""
    low, high = (np.inf if target[end] is None else target[end] for end in ("low", "high"))
    return bool(low <= more_tokens <= high)


def main() -> None:
    """Print the shares by family, and of all together."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=40)
    seeds = range(FIRST_SEED, FIRST_SEED + parser.parse_args().studies)
    by_family = {family: covered(family, seeds) for family in FAMILIES}
    together = {
        name: [value for found in by_family.values() for value in found[name]] for name in COLUMNS
    }
    print("family", "back-tests", *COLUMNS, sep="\t")
    for family, found in (by_family | {"all": together}).items():
        tests = [value for name in BACKTESTS for value in found[name]]
        shares = [np.mean(tests), *(np.mean(found[name]) for name in COLUMNS)]
        print(family, *(f"{share:.3f}" for share in shares), sep="\t")
    print(sum(len(together[name]) for name in BACKTESTS), "back-tests,", end=" ")
    print(sum(len(together[name]) for name in AHEAD), "forecasts ahead,", end=" ")
    print(len(together[TOKENS]), "numbers of tokens")


if __name__ == "__main__":
    main()
