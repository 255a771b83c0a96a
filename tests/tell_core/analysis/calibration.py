"""How often forecasts hold on simulated curves of families that the forecast does not know.

python -m tests.tell_core.analysis.calibration --studies 40
"""

import argparse
from collections.abc import Iterable

import numpy as np

from tell_core.analysis.forecast import MeasuredCurve, forecast_curve
from tell_core.spec.model import AnalysisSpec
from tests.tell_core.analysis.growing import FAMILIES, NUM_MEASURED, simulate

FIRST_SEED = 1000
BACKTESTS = ("3 budgets", "4 budgets")
AHEAD = ("twice", "four times")


def covered(family: str, seeds: Iterable[int]) -> dict[str, list[bool]]:
    """Whether forecasts covered, by back-tests on so many budgets and by how far ahead.

    A forecast ahead is made from all five budgets, of scores that no run would know.
    """
    found: dict[str, list[bool]] = {name: [] for name in (*BACKTESTS, *AHEAD)}
    for seed in seeds:
        study = simulate(family, seed)
        scores = study.scores[:, :NUM_MEASURED]
        curve = MeasuredCurve(
            "sft", None, study.tokens[:NUM_MEASURED], scores, study.limits, 1.0, 0.0
        )
        entry = forecast_curve(curve, [], AnalysisSpec())
        for test in entry["backtests"]:
            found[f"{len(test['fitted_on'])} budgets"].append(test["is_covered"])
        truth = study.scores[:, NUM_MEASURED:].mean(axis=0)
        for name, row, score in zip(AHEAD, entry["gains"][1:], truth, strict=True):
            found[name].append(row["low"] - 1e-9 <= score <= row["high"] + 1e-9)
    return found


def main() -> None:
    """Print the shares by family, and of all together."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=40)
    seeds = range(FIRST_SEED, FIRST_SEED + parser.parse_args().studies)
    by_family = {family: covered(family, seeds) for family in FAMILIES}
    names = (*BACKTESTS, *AHEAD)
    together = {
        name: [value for found in by_family.values() for value in found[name]] for name in names
    }
    print("family", "back-tests", *names, sep="\t")
    for family, found in (by_family | {"all": together}).items():
        tests = [value for name in BACKTESTS for value in found[name]]
        shares = [np.mean(tests), *(np.mean(found[name]) for name in names)]
        print(family, *(f"{share:.3f}" for share in shares), sep="\t")
    print(sum(len(together[name]) for name in BACKTESTS), "back-tests,", end=" ")
    print(sum(len(together[name]) for name in AHEAD), "forecasts ahead")


if __name__ == "__main__":
    main()
