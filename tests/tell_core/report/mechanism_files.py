"""Files of a run whose predictions were tested: seven with their figures, and the Q sequence."""

from pathlib import Path
from typing import Any

import numpy as np

from tell_core.store import write_json

PART = {"name": "gain <b>", "estimate": 0.3, "low": 0.1, "high": None, "p_value": 0.01,
        "is_as_predicted": True}  # fmt: skip
AGAINST = PART | {"name": "loss", "estimate": -0.2, "low": -0.3, "high": -0.1,
                  "is_as_predicted": False}  # fmt: skip
BUDGETS = (200, 350, 600, 1050, 1800, 3100, 5400, 9400)
ORDERS = ("tell_blocks(4)", "tell_task_first")


def _curves() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    place = np.log(np.repeat(BUDGETS, 2))
    items = []
    for number in range(12):
        is_step = number < 5
        middle = 6.5 + 0.1 * number
        fall = 1.8 / (1 + np.exp(5 * (place - middle))) if is_step else 2.5 - 0.2 * place
        losses = 0.2 + fall + generator.normal(0, 0.05, len(place))
        verdict, guard_share = ("step", 0.9) if is_step else ("gradual", None)
        items.append({"item": f"test-{number}", "verdict": verdict, "guard_share": guard_share,
                      "losses": losses.tolist()})  # fmt: skip
    return {"general_tokens": np.repeat(BUDGETS, 2).tolist(), "items": items}


def _survival(last: float) -> dict[str, Any]:
    steps = np.geomspace(2, 300, 12)
    shares = np.linspace(1, last, 12)
    return {"step": steps.tolist(), "unlearned": shares.tolist(), "standard_error": [0.1] * 12}


def _points(shift: float) -> list[dict[str, Any]]:
    places = np.random.default_rng(1).normal(0, 1, (30, 2))
    return [
        {"role": role, "x": float(x + shift * (role == "task")), "y": float(y)}
        for (x, y), role in zip(places, ["task", "general"] * 15, strict=True)
    ]


def _ratio(budget: int, ratio: float | None, **changes: Any) -> dict[str, Any]:
    return {
        "task_budget_tokens": budget, "ratio": ratio, "low": 1.4, "high": 4.1, "censored": "none",
        "bound": None, "baseline": "best", "reason": None,
    } | changes  # fmt: skip


def _score(metric: str, arm: str, mean: float) -> dict[str, Any]:
    return {"metric": metric, "arm": arm, "mean": mean, "low": mean - 0.1, "high": mean + 0.1}


METRICS = ("log_probability", "general_log_probability")
FIGURES: dict[str, Any] = {
    "P1": _curves(),
    "P2": {"survival": {"shared": _survival(0.2), "specific": _survival(0.6)}},
    "P3": {
        "points": [
            {"skill": f"s{n}", "frequency": 0.4 / n, "step": 9.0 * n**0.8, "is_learned": n < 9}
            for n in range(1, 11)
        ]
    },
    "P4": {
        "table": [
            {"arm": arm, "on_task_prompts": what, "has_general_data": arm != "sft", "auc": auc,
             "auc_p_value": 0.03, "score": score}
            for arm, what, auc, score in (
                ("tell", "anchor", 0.98, -0.2), ("tell_no_anchor", "none", 0.7, -0.6),
                ("tell_random_anchor", "random text", 0.8, -0.5), ("sft", "own", 0.7, -1.2),
            )
        ],
        "projections": {"tell": _points(4), "tell_no_anchor": _points(0)},
    },
    "P5": {
        "orders": [
            {"metric": metric, "arm": arm, "estimate": 0.2, "low": -0.05 + 0.1 * n, "high": 0.4,
             "p_value": 0.02}
            for metric in METRICS
            for n, arm in enumerate(ORDERS)
        ],
        "order_scores": [
            _score(metric, arm, -0.5 - 0.1 * n)
            for metric in METRICS
            for n, arm in enumerate(("tell", *ORDERS, "base"))
        ],
    },
    "P6": {
        "ratios": [
            _ratio(960, 2.4),
            _ratio(3840, None, bound=1.6, censored="above", low=1.6, high=None),
        ]
    },
    "P7": {
        "directions": [
            {"arm": arm, "from_step": step / 2, "to_step": step, "shared": 0.1, "specific": 0.3,
             "difference": 0.2, "low": 0.1, "high": 0.3, "p_value": 0.01}
            for arm in ("tell", "sft")
            for step in (2.0, 9.0, 40.0)
        ]
    },
}  # fmt: skip
VERDICTS = ("supported", "supported", "undetermined", "contradicted", "undetermined", "supported",
            "undetermined")  # fmt: skip


def row(name: str, verdict: str, **changes: Any) -> dict[str, Any]:
    """One row of predictions.json."""
    parts = [PART, AGAINST] if verdict == "contradicted" else [PART, PART | {"name": "second"}]
    return {
        "prediction": name, "claim": f"claim of {name}", "measure": "gain <b>", "estimate": 0.3,
        "low": 0.1, "high": None, "p_value": 0.01, "p_holm": 0.04, "verdict": verdict,
        "reason": "the null is not excluded: gain" if verdict == "undetermined" else None,
        "remark": f"remark on {name}", "components": parts, "figure": FIGURES.get(name, {}),
    } | changes  # fmt: skip


def sequence(num_units: int = 40) -> dict[str, Any]:
    """A sequence.json: the first unit is known, the last is not learned by every training."""
    generator = np.random.default_rng(2)
    groups = ["known", *generator.choice(["shared", "specific"], num_units - 1).tolist()]
    times = [9.0 if group == "shared" else 60.0 for group in groups]
    times = (np.array(times) * np.exp(generator.normal(0, 0.5, num_units))).tolist()
    agreement = {"kendall": 0.62, "kendall_low": 0.55, "kendall_high": 0.7, "spearman": 0.8,
                 "num_pairs": 3, "num_units": num_units - 1}  # fmt: skip
    return {
        "confidence": 0.95, "task_budget_tokens": 480, "general_budget_tokens": 9400,
        "units": [f"dev-{n}/1" for n in range(num_units)], "groups": groups,
        "within_arm": {"tell": agreement, "sft": None}, "with_tell": {"sft": agreement},
        "arms": {
            "tell": {"num_seeds": 3, "last_step": 300, "lost_share": 0.06, "order": _order(times)},
            "sft": {"num_seeds": 1, "last_step": 80, "lost_share": 0.0,
                    "order": _order([80.0] * num_units)},
        },
    }  # fmt: skip


def _order(times: list[float]) -> list[dict[str, Any]]:
    ranks = np.argsort(np.argsort(times[1:])) + 1.0
    rows = [
        {"rank": float(rank), "low": max(1.0, rank - 2), "high": rank + 2.0, "learned_share": 1.0,
         "step": step, "step_low": step / 1.5, "step_high": step * 1.5}
        for rank, step in zip(ranks, times[1:], strict=True)
    ]  # fmt: skip
    rows[-1] |= {"learned_share": 2 / 3, "step_high": None}
    return [dict.fromkeys(rows[0]), *rows]


def write_mechanism(run: Path, rows: list[dict[str, Any]] | None = None) -> None:
    """Write predictions.json and sequence.json into a run directory."""
    names = [f"P{number}" for number in range(1, 8)]
    tested = rows or [row(name, verdict) for name, verdict in zip(names, VERDICTS, strict=True)]
    (run / "quanta").mkdir(exist_ok=True)
    content = {"task_budget_tokens": 480, "general_budget_tokens": 9400, "predictions": tested}
    write_json(run / "quanta" / "predictions.json", content)
    write_json(run / "quanta" / "sequence.json", sequence())
