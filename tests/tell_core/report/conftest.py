"""A synthetic run directory with plausible numbers: every file the report reads, nothing trained.

Scores follow two smooth curves of log task tokens (TELL worth about four times its data at the
smallest budget, less than its own at the largest) with noise by seed.
"""

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from markupsafe import Markup

from tell_core.report import charts, page, write_report

TASK_BUDGETS = (1_000, 4_000, 16_000, 64_000, 256_000)
GENERAL_BUDGETS = (60_000, 240_000)
METRICS = ("log_probability", "exact_match", "chrf", "general_log_probability")
PRICE_METRICS = ("general_log_probability", "retention_log_probability", "harness/arc/acc")
NUM_ITEMS = 80
UNKNOWN_P = {"p_value": None, "p_holm": None}
POOL_TOKENS = 180_000
PROBE_STEPS = (0, 2, 4, 8, 12, 20, 34, 58, 98, 166, 282, 480)


@dataclass(frozen=True)
class RunPlan:
    """What the synthetic run holds.

    Attributes:
        seeds: Training seeds; one makes every leverage ratio undefined.
        lead: Factor on TELL's advantage; large values put it above everything SFT reaches.
        hostile: Text put into every place that comes from data.
        rejects: Whether curation rejected anything.
        without: Files and parts left out, by name.
        general_budgets: General budgets of TELL.
        task_budgets: Task budgets of every arm with task data.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    lead: float = 1.0
    hostile: str = ""
    rejects: bool = True
    without: frozenset[str] = field(default_factory=frozenset)
    general_budgets: tuple[int, ...] = GENERAL_BUDGETS
    task_budgets: tuple[int, ...] = TASK_BUDGETS


@pytest.fixture
def build_run(tmp_path: Path) -> Callable[..., Path]:
    """Build a small run directory; keyword arguments are the fields of RunPlan."""
    small = RunPlan(seeds=(0, 1), general_budgets=(240_000,), task_budgets=(1_000, 16_000, 64_000))

    def build(**changes: Any) -> Path:
        return write_run(tmp_path / "copy-task", replace(small, **changes))

    return build


@pytest.fixture(scope="session")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every part and its report, made once; its figures are drawn in the page only."""
    run = write_run(tmp_path_factory.mktemp("report") / "copy-task", RunPlan())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "write_figure_files", lambda charts, out_dir: None)
        write_report(run)
    return run


@pytest.fixture(scope="session")
def full_page(full_run: Path) -> str:
    """The report of the full run."""
    return (full_run / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def without_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the figures, which take most of the time, where a test looks at text only."""
    monkeypatch.setattr(charts, "to_svg", lambda draw, name: Markup("<svg></svg>"))
    monkeypatch.setattr(page, "write_figure_files", lambda charts, out_dir: None)


def write_run(root: Path, plan: RunPlan) -> Path:
    """Write every file of a finished run below ``root``."""
    root.mkdir(parents=True, exist_ok=True)
    cells = _cells(plan)
    (root / "stages").mkdir()
    if "curate" not in plan.without:
        _write_curate(root / "stages" / "curate-0123456789abcdef", plan)
    records = {name: _write_cell(root, name, cell, plan) for name, cell in cells.items()}
    _dump(root / "manifest.json", _manifest(plan, records))
    (root / "spec.resolved.yaml").write_text(yaml.safe_dump(_spec(plan), sort_keys=False))
    if "results" not in plan.without:
        _write_results(root, cells, plan)
    if "leverage" not in plan.without:
        _dump(root / "leverage.json", _leverage(cells, plan))
    if "forecast" not in plan.without:
        _dump(root / "forecast.json", _forecast(cells, plan))
    if "emergence" not in plan.without:
        _dump(root / "emergence.json", _emergence(cells))
    return root


def _cells(plan: RunPlan) -> dict[str, dict[str, Any]]:
    cells: dict[str, dict[str, Any]] = {"base-s0": _cell("base", None, None, 0)}
    for seed in plan.seeds:
        for task in plan.task_budgets:
            cells[f"sft-t{task}-s{seed}"] = _cell("sft", task, None, seed)
            for general in plan.general_budgets:
                for arm in ("sft_matched", "tell"):
                    name = f"{arm}-t{task}-g{general}-s{seed}"
                    cells[name] = _cell(arm, task, general, seed)
            last = plan.general_budgets[-1]
            cells[f"tell_no_anchor-t{task}-g{last}-s{seed}"] = _cell(
                "tell_no_anchor", task, last, seed
            )
        for general in plan.general_budgets:
            cells[f"general_only-g{general}-s{seed}"] = _cell("general_only", None, general, seed)
    return cells


def _cell(arm: str, task: int | None, general: int | None, seed: int) -> dict[str, Any]:
    return {
        "arm": arm,
        "task_budget_tokens": task,
        "general_budget_tokens": general,
        "seed": seed,
    }


def _used(cell: dict[str, Any]) -> int | None:
    """Task tokens used: a little below the budget, and never more than the pool."""
    task = cell["task_budget_tokens"]
    return None if task is None else min(int(task * 0.985), POOL_TOKENS)


def _log_probability(cell: dict[str, Any], lead: float) -> float:
    """Score of a cell without noise: a sigmoid in log10 of its worth in SFT task tokens."""
    if cell["arm"] == "base":
        return -2.62
    if cell["arm"] == "general_only":
        return -2.31
    worth = math.log10(float(_used(cell) or 1))
    gain = math.log10(cell["general_budget_tokens"] or 1) - 4.1
    boost = max(-0.35, 0.72 - 0.26 * (worth - 3)) * lead
    shift = {"tell": boost * gain, "tell_no_anchor": 0.55 * boost * gain, "sft_matched": 0.09}
    return -2.62 + 2.45 / (1 + math.exp(-2.3 * (worth + shift.get(cell["arm"], 0.0) - 4.3)))


def _score(metric: str, cell: dict[str, Any], plan: RunPlan) -> float:
    noise = np.random.default_rng(hash_of(cell, metric)).normal(0, 0.035)
    quality = _log_probability(cell, plan.lead)
    if cell["arm"] == "base":
        noise = 0.0
    if metric == "log_probability":
        return quality + noise
    if metric == "general_log_probability":
        return _general(cell) + noise / 2
    share = min(1.0, max(0.0, 1.08 * math.exp(1.3 * quality) + noise / 2))
    return share if metric == "exact_match" else 100 * share**0.6


def _general(cell: dict[str, Any]) -> float:
    if cell["arm"] == "base":
        return -1.74
    if cell["arm"].startswith("sft"):
        return -1.78 - 0.11 * math.log10(float(_used(cell) or 1) / 500)
    return -1.60 + 0.02 * math.log10((cell["general_budget_tokens"] or 1) / 60_000)


def hash_of(cell: dict[str, Any], salt: str) -> int:
    """A number that depends on the cell only, equal in every process."""
    return zlib.crc32(json.dumps([cell, salt]).encode())


def _spec(plan: RunPlan) -> dict[str, Any]:
    return {
        "name": "copy-task",
        "model": {"id": "small-llama" + plan.hostile, "revision": None},
        "task": {"name": "private cipher" + plan.hostile, "train": {"path": "task.jsonl"}},
        "budgets": {
            "task_tokens": list(plan.task_budgets),
            "general_tokens": list(plan.general_budgets),
        },
        "seeds": list(plan.seeds),
        "training": {"keep": "best_dev", "learning_rate": [0.0003, 0.001]},
        "analysis": {"confidence": 0.95, "primary_metric": "log_probability"},
    }


def _manifest(plan: RunPlan, records: dict[str, Any]) -> dict[str, Any]:
    tuning = {
        arm: {
            "cell": f"{arm}-t16000-s1000",
            "task_budget_tokens": None if arm == "general_only" else 16_000,
            "seed": 1000,
            "candidates": [
                {"learning_rate": 0.0003, "epochs": 2, "dev_loss": 1.31},
                {"learning_rate": 0.001, "epochs": 2, "dev_loss": 1.22},
            ],
            "chosen": {"learning_rate": 0.001, "epochs": 2},
        }
        for arm in ("sft", "sft_matched", "tell", "tell_no_anchor", "general_only")
    }
    return {
        "experiment": "copy-task",
        "created": "2026-03-02T10:11:12+00:00",
        "versions": {"tell": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "git_commit": "8c1f5d2f4e0b7a6c9d3e2f1a0b9c8d7e6f5a4b3c",
        "hardware": {
            "system": "Linux-6.1",
            "machine": "x86_64",
            "cpu_count": 2,
            "memory_bytes": 8_200_000_000,
            "gpus": [],
        },
        "stages": {"curate": "curate-0123456789abcdef"},
        "cells": records,
        "tuning": {} if "tuning" in plan.without else tuning,
        "commands": ["tell run runs/copy-task/spec.resolved.yaml --out runs/copy-task"],
    }


def _write_cell(root: Path, name: str, cell: dict[str, Any], plan: RunPlan) -> dict[str, Any]:
    mark = f"{hash_of(cell, name):016x}"
    mix, train, evaluate = (root / "stages" / f"{s}-{mark}" for s in ("mix", "train", "evaluate"))
    ledger = _ledger(cell)
    is_trained = cell["arm"] != "base"
    if "mix" not in plan.without:
        _write_mix(mix, cell, ledger, plan)
    if is_trained:
        _write_train(train, cell, ledger["steps"])
    evaluate.mkdir(parents=True)
    scores = {m: {"score": _score(m, cell, plan), "num_items": NUM_ITEMS} for m in METRICS}
    scores["chrf"]["signature"] = "nrefs:1|case:mixed|nc:6|nw:0"
    _dump(evaluate / "scores.json", scores)
    if "predictions" not in plan.without:
        _write_predictions(root / "predictions" / f"{name}.parquet", name, cell, plan)
    return {
        **cell,
        "mix": mix.name,
        "train": train.name if is_trained else None,
        "evaluate": evaluate.name,
        "ledger": ledger,
        "learning_rate": 0.001 if is_trained else None,
    }


def _ledger(cell: dict[str, Any]) -> dict[str, Any]:
    used, general = _used(cell) or 0, cell["general_budget_tokens"]
    mixed = 0 if cell["arm"] == "sft_matched" else general or 0
    rendered = int(1.3 * used) + mixed
    return {
        "task_budget_tokens": cell["task_budget_tokens"],
        "task_tokens": used,
        "task_available_tokens": POOL_TOKENS if used else 0,
        "task_rendered_tokens": int(1.3 * used),
        "num_task_examples": used // 42,
        "general_budget_tokens": general,
        "general_tokens": int(0.997 * mixed),
        "general_available_tokens": 3_400_000 if mixed else 0,
        "num_general_examples": mixed // 61,
        "supervised_tokens": rendered * 3 // 4,
        "rendered_tokens": rendered * 3,
        "task_epochs": 3.0 if used else 0.0,
        "steps": rendered * 3 // 900,
        "epochs": 3.0,
    }


def _write_mix(mix: Path, cell: dict[str, Any], ledger: dict[str, Any], plan: RunPlan) -> None:
    mix.mkdir(parents=True)
    _dump(mix / "ledger.json", ledger)
    _dump(mix / "samples.json", _samples(cell, plan.hostile))
    rows = [
        {
            "item_id": f"item-{i:03d}",
            "prompt": f"word: zq{i:03d}p{plan.hostile}",
            "reference": _reference(i),
            "extra": {},
        }
        for i in range(NUM_ITEMS)
    ]
    _write_lines(mix / "items.jsonl", rows)
    if cell["arm"].startswith("tell"):
        _dump(mix / "shuffle_proof.json", _proof(cell))


def _samples(cell: dict[str, Any], hostile: str) -> list[dict[str, Any]]:
    prompt = ["<|user|>", "\n", "Apply", " the", " house", " cipher", " to", " the", " word",
              ".", "\n", "word", ":", " ra", "ven", hostile]  # fmt: skip
    answer = ["se", "bwf", "o", "</s>"]
    task = [[text, False] for text in [*prompt, "\n", "<|assistant|>", "\n"] if text]
    task += [[text, True] for text in answer]
    other = [["<|user|>", False], ["\n", False], ["Reverse", False], [" mouse", False],
             ["\n", False], ["<|assistant|>", False], ["\n", False], ["es", True],
             ["uom", True], ["</s>", True]]  # fmt: skip
    samples = [{"role": "task", "pieces": task}] if cell["task_budget_tokens"] else []
    if cell["arm"] in ("tell", "tell_no_anchor", "general_only"):
        samples.append({"role": "general", "pieces": other})
    return samples


def _proof(cell: dict[str, Any]) -> dict[str, Any]:
    generator = np.random.default_rng(cell["seed"])
    share = cell["task_budget_tokens"] / (cell["task_budget_tokens"] + 2e5)
    return {
        "largest_gap": 61,
        "mean_gap": 1 / share,
        "window": 64,
        "task_share_per_window": (generator.binomial(64, share, 48) / 64).tolist(),
        "runs": 1204,
        "expected_runs": 1198.4,
        "runs_p_value": 0.43,
        "order_digest": "9f" * 32,
    }


def _write_train(train: Path, cell: dict[str, Any], steps: int) -> None:
    train.mkdir(parents=True)
    has_task = cell["task_budget_tokens"] is not None
    has_general = cell["arm"] not in ("sft", "sft_matched")
    log = [
        {
            "step": step,
            "loss": 2.4 / (1 + step / 60),
            "task_loss": 2.5 / (1 + step / 45) + 0.1 * math.sin(step) if has_task else None,
            "general_loss": 1.2 + 0.7 / (1 + step / 80) if has_general else None,
            "learning_rate": 1e-3,
            "tokens": 900,
        }
        for step in range(min(steps, 400))
    ]
    _write_lines(train / "log.jsonl", log)
    summary = {
        "steps": steps, "train_seconds": steps * 0.05, "tokens_per_second": 17_400.0,
        "supervised_tokens_per_second": 4_350.0, "padding_share": 0.08,
        "peak_memory_bytes": 612_000_000, "device": "cpu", "dtype": "float32",
        "kept_step": int(steps * 0.8), "kept_dev_loss": 0.91, "final_loss": 0.42,
    }  # fmt: skip
    _dump(train / "summary.json", summary)


def _write_predictions(path: Path, name: str, cell: dict[str, Any], plan: RunPlan) -> None:
    path.parent.mkdir(exist_ok=True)
    generator = np.random.default_rng(hash_of(cell, name))
    quality = -_log_probability(cell, plan.lead)
    losses = np.abs(quality + generator.normal(0, 0.5, NUM_ITEMS)) + 0.01
    answers = [_reference(i if loss < 1.7 else i + 7 + len(name)) for i, loss in enumerate(losses)]
    rows = [
        {
            "cell": name,
            "item_id": f"item-{i:03d}",
            "prompt_digest": f"{i:016x}",
            "reference": _reference(i),
            "prediction": answers[i] + plan.hostile,
            "parsed": answers[i] + plan.hostile,
            "scores": json.dumps({"exact_match": float(loss < 1.7), "log_probability": -loss}),
            "nll": float(loss * 5),
            "num_tokens": 5,
            "num_bytes": 9,
        }
        for i, loss in enumerate(losses)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def _reference(i: int) -> str:
    return "".join(chr(97 + (i * k + 3 * k * k) % 26) for k in range(1, 8))


def _write_results(root: Path, cells: dict[str, Any], plan: RunPlan) -> None:
    rows = [
        {
            "experiment": "copy-task",
            "cell": name,
            **cell,
            "task_tokens": _used(cell),
            "metric": metric,
            "score": _score(metric, cell, plan),
            "num_items": NUM_ITEMS,
        }
        for name, cell in cells.items()
        for metric in METRICS
    ]
    pq.write_table(pa.Table.from_pylist(rows), root / "results.parquet")


def _leverage(cells: dict[str, Any], plan: RunPlan) -> dict[str, Any]:
    return {
        "primary_metric": "log_probability",
        "confidence": 0.95,
        "baselines": ["sft", "sft_matched", "best"],
        "metrics": {
            metric: {
                "higher_is_better": True,
                "arms": {} if metric.startswith("general") else _ratios(metric, cells, plan),
                "curves": _curves(metric, cells, plan),
                "variance": _variance(metric, cells, plan),
                "power": _power(plan),
            }
            for metric in METRICS
        },
        "price": [row for metric in PRICE_METRICS for row in _price(metric, cells, plan)],
    }


def _groups(cells: dict[str, Any]) -> list[dict[str, Any]]:
    """One cell of every arm at its budgets."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for cell in cells.values():
        key = (cell["arm"], cell["task_budget_tokens"], cell["general_budget_tokens"])
        found.setdefault(key, cell)
    return list(found.values())


def _variance(metric: str, cells: dict[str, Any], plan: RunPlan) -> list[dict[str, Any]]:
    is_generated = "log_probability" not in metric
    has_seeds = len(plan.seeds) > 1
    return [
        {
            **{name: cell[name] for name in cell if name != "seed"},
            "num_items": NUM_ITEMS,
            "num_seeds": len(plan.seeds),
            "num_repeats": 3 if is_generated else 1,
            "item_sd": 0.061,
            "seed_sd": 0.044 if has_seeds and cell["arm"] != "base" else None,
            "decoding_sd": 0.012 if is_generated else 0.0,
            "reason": None if has_seeds else "one training seed",
        }
        for cell in _groups(cells)
    ]


def _power(plan: RunPlan) -> dict[str, Any]:
    has_seeds = len(plan.seeds) > 1
    reason = "no SFT and TELL with two seeds in common"
    differences = np.linspace(0.183, 0.052, len(plan.task_budgets)).tolist()
    return {
        "confidence": 0.95,
        "power": 0.8,
        "num_seeds": len(plan.seeds) if has_seeds else None,
        "num_items": NUM_ITEMS,
        "reason": None if has_seeds else reason,
        "by_task_budget": [
            {
                "task_budget_tokens": budget,
                "smallest_difference": smallest if has_seeds else None,
                "reason": None if has_seeds else reason,
            }
            for budget, smallest in zip(plan.task_budgets, differences, strict=True)
        ],
    }


def _price(metric: str, cells: dict[str, Any], plan: RunPlan) -> list[dict[str, Any]]:
    has_seeds = len(plan.seeds) > 1
    rows = []
    for cell in _groups(cells):
        if cell["arm"] != "base":
            change = (_general(cell) + 1.74) * (0.3 if metric.startswith("harness") else 1.0)
            rows.append(
                {
                    "metric": metric,
                    **{name: cell[name] for name in cell if name != "seed"},
                    "change": change,
                    "low": change - 0.02 if has_seeds else None,
                    "high": change + 0.02 if has_seeds else None,
                    "num_items": 64,
                    "num_seeds": len(plan.seeds),
                    "reason": None if has_seeds else "one training seed",
                }
            )
    return rows


def _forecast(cells: dict[str, Any], plan: RunPlan) -> dict[str, Any]:
    names = [metric for metric in METRICS if metric != "general_log_probability"]
    return {
        "confidence": 0.8,
        "horizon_factor": 4,
        "primary_metric": "log_probability",
        "metrics": {metric: _forecast_entry(metric, cells, plan) for metric in names},
    }


def _forecast_entry(metric: str, cells: dict[str, Any], plan: RunPlan) -> dict[str, Any]:
    curves = [
        _forecast_curve(metric, cell, plan)
        for cell in _groups(cells)
        if cell["arm"] in ("tell", "sft") and cell["task_budget_tokens"] == plan.task_budgets[0]
    ]
    tests = [test["is_covered"] for curve in curves for test in curve["backtests"]]
    coverage = sum(tests) / len(tests) if tests else None
    calibration = {"nominal": 0.8, "num_backtests": len(tests), "num_covered": sum(tests)}
    return {"calibration": {**calibration, "coverage": coverage}, "curves": curves}


def _forecast_curve(metric: str, cell: dict[str, Any], plan: RunPlan) -> dict[str, Any]:
    used = [_used({**cell, "task_budget_tokens": budget}) or 0 for budget in plan.task_budgets]
    curve = {
        "arm": cell["arm"],
        "general_budget_tokens": cell["general_budget_tokens"],
        "num_budgets": len(used),
        "num_seeds": len(plan.seeds),
        "max_task_tokens": float(used[-1]),
    }
    target = {"label": "a score of -0.1", "score": -0.1}
    if len(plan.seeds) == 1:
        reason = "one training seed: there is no interval"
        unknown = dict.fromkeys(("tokens", "more_tokens", "low", "high"))
        return curve | {
            "status": "undefined", "reason": reason, "gains": [], "band": [], "backtests": [],
            "targets": [{**target, **unknown, "status": "undefined", "reason": reason}],
        }  # fmt: skip
    largest = used[-1]
    band = [_guess(metric, cell, n, plan) for n in np.geomspace(used[0], 4 * largest, 41)]
    tests = [_tried(metric, cell, used, place, plan) for place in (-2, -1)]
    targets = [
        {**target, "status": "needs_more", "tokens": 1.5 * largest, "more_tokens": 0.5 * largest,
         "low": 0.2 * largest, "high": None, "reason": None},
        {"label": "the best score of any arm", "score": -0.02, "status": "beyond_horizon",
         "tokens": None, "more_tokens": None, "low": 2.0 * largest, "high": None,
         "reason": "not reached within the horizon of the forecast"},
    ]  # fmt: skip
    gains = [
        {"more_tokens": (factor - 1) * largest, **_guess(metric, cell, factor * largest, plan)}
        for factor in (1.5, 2.0, 4.0)
    ]
    return curve | {
        "status": "ok", "reason": None, "targets": targets, "gains": gains, "band": band,
        "backtests": tests,
    }  # fmt: skip


def _guess(metric: str, cell: dict[str, Any], tokens: float, plan: RunPlan) -> dict[str, float]:
    """A forecast: between scores at the budgets below and above, straight in log tokens."""
    used = [_used({**cell, "task_budget_tokens": budget}) or 1 for budget in plan.task_budgets]
    scores = [_score(metric, {**cell, "task_budget_tokens": b}, plan) for b in plan.task_budgets]
    score = float(np.interp(math.log(tokens), np.log(used), scores))
    width = 0.06 * (1 + max(0.0, math.log(tokens / used[-1]))) * max(1.0, abs(score) / 10)
    row = {"score": score, "low": score - width, "high": score + 0.8 * width}
    return {"task_tokens": float(tokens), **row}


def _tried(
    metric: str, cell: dict[str, Any], used: list[int], place: int, plan: RunPlan
) -> dict[str, Any]:
    row = _guess(metric, cell, used[place], plan)
    return row | {
        "fitted_on": [float(tokens) for tokens in used[:place]],
        "observed": row["score"] + (0.02 if place == -2 else 0.3),
        "is_covered": place == -2,
    }


def _curves(metric: str, cells: dict[str, Any], plan: RunPlan) -> list[dict[str, Any]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in cells.values():
        key = (cell["arm"], cell["task_budget_tokens"], cell["general_budget_tokens"])
        groups.setdefault(key, []).append(cell)
    curves = []
    for (arm, task, general), group in groups.items():
        scores = [_score(metric, cell, plan) for cell in group]
        spread = 1.6 * max(0.02, float(np.std(scores)))
        mean = float(np.mean(scores))
        curves.append(
            {
                "arm": arm,
                "task_budget_tokens": task,
                "general_budget_tokens": general,
                "task_tokens": _used(group[0]),
                "mean": mean,
                "low": mean - spread if len(plan.seeds) > 1 else None,
                "high": mean + spread if len(plan.seeds) > 1 else None,
                "seeds": [
                    {"seed": cell["seed"], "score": score}
                    for cell, score in zip(group, scores, strict=True)
                ],
            }
        )
    return curves


def _ratios(metric: str, cells: dict[str, Any], plan: RunPlan) -> dict[str, Any]:
    means = {
        (curve["arm"], curve["general_budget_tokens"], curve["task_budget_tokens"]): curve["mean"]
        for curve in _curves(metric, cells, plan)
    }
    arms: dict[str, Any] = {}
    for arm, budgets in (("tell", plan.general_budgets),
                         ("tell_no_anchor", plan.general_budgets[-1:])):  # fmt: skip
        for general in budgets:
            arms.setdefault(arm, {})[str(general)] = [
                _ratio(baseline, task, means[arm, general, task], general, means, plan)
                for task in plan.task_budgets
                for baseline in ("sft", "sft_matched", "best")
            ]
    return arms


def _ratio(
    baseline: str, task: int, score: float, general: int, means: dict[Any, float], plan: RunPlan
) -> dict[str, Any]:
    curves = {
        "sft": [means["sft", None, t] for t in plan.task_budgets],
        "sft_matched": [means["sft_matched", general, t] for t in plan.task_budgets],
    }
    curve = curves.get(baseline) or [max(pair) for pair in zip(*curves.values(), strict=True)]
    rising = np.maximum.accumulate(curve)
    row: dict[str, Any] = {
        "task_budget_tokens": task, "baseline": baseline, "ratio": None, "low": None,
        "high": None, "confidence": 0.95, "censored": "none", "reason": None, "bound": None,
        "sft_equivalent_tokens": None, "tell_score": score,
        "num_seeds": len(plan.seeds), "num_items": NUM_ITEMS,
        "advantage": {"difference": 0.21, "low": 0.09, "high": 0.33},
        "p_value": 0.0004, "p_holm": 0.012,
    }  # fmt: skip
    if len(plan.seeds) == 1:
        reason = "one training seed: there is no interval"
        return row | {"censored": "undefined", "ratio": 3.7, "reason": reason} | UNKNOWN_P
    if score > rising[-1]:
        reason = "SFT does not reach this score at any budget tried"
        bound = plan.task_budgets[-1] / task
        return row | {"censored": "above", "bound": bound, "low": 0.8 * bound, "reason": reason,
                      "sft_equivalent_tokens": POOL_TOKENS}  # fmt: skip
    if score < rising[0]:
        reason = "SFT is better already at its smallest budget"
        bound = plan.task_budgets[0] / task
        return row | {"censored": "below", "bound": bound, "high": 1.2 * bound, "reason": reason,
                      "sft_equivalent_tokens": plan.task_budgets[0]}  # fmt: skip
    tokens = 10 ** float(np.interp(score, rising, np.log10(plan.task_budgets)))
    ratio = tokens / task
    return row | {
        "ratio": ratio,
        "low": ratio * 0.74,
        "high": None if ratio > 4.4 else ratio * 1.4,
        "sft_equivalent_tokens": round(tokens),
    }


def _emergence(cells: dict[str, Any]) -> dict[str, Any]:
    traced = {
        name: _traced(cell)
        for name, cell in cells.items()
        if cell["arm"] != "base" and cell["seed"] == 0
    }
    return {"min_points": 8, "cells": traced, "by_arm": {}}


def _traced(cell: dict[str, Any]) -> dict[str, Any]:
    generator = np.random.default_rng(hash_of(cell, "trace"))
    speed = 2.2 if cell["arm"].startswith("tell") else 1.0
    items = [_traced_item(i, speed, generator) for i in range(40)]
    verdicts = [item["verdict"] for item in items]
    return {
        "steps": list(PROBE_STEPS),
        "items": items,
        "counts": {verdict: verdicts.count(verdict) for verdict in set(verdicts)},
    }


def _traced_item(i: int, speed: float, generator: np.random.Generator) -> dict[str, Any]:
    steps = np.log(np.array(PROBE_STEPS, dtype=float) + 1)
    midpoint = math.log(480 * (0.05 + 0.9 * generator.random()) / speed)
    kind = ["step", "step", "gradual", "flat", "undetermined"][int(generator.integers(5))]
    slope = {"step": 6.0, "gradual": 1.1, "flat": 0.0, "undetermined": 2.0}[kind]
    losses = 0.15 + 2.6 / (1 + np.exp(slope * (steps - midpoint)))
    losses = np.abs(losses + generator.normal(0, 0.04, len(steps)))
    return {
        "item": f"probe-{i:02d}",
        "role": "task" if i < 24 else "general",
        "verdict": kind,
        "delta_aicc": {"constant": 40.0, "linear": 12.0, "power": 6.0, "sigmoid": 0.0},
        "midpoint_step": math.exp(midpoint) if kind in ("step", "gradual") else None,
        "sharpness": slope if kind in ("step", "gradual") else None,
        "losses": losses.tolist(),
    }


def _write_curate(curate: Path, plan: RunPlan) -> None:
    curate.mkdir()
    rejects = {"duplicate": 31, "too_long": 4, "empty_response": 2} if plan.rejects else {}
    roles = (
        ("task", "task_train", 4464),
        ("test", "task_test", 80),
        ("small-talk", "general", 58_211),
    )
    sources = [
        {
            "name": name + plan.hostile,
            "role": role,
            "format": "prompt_response",
            "files": [{"path": f"{name}.jsonl", "sha256": "ab" * 32, "bytes": 120_000}],
            "num_read": kept + sum(rejects.values()),
            "num_kept": kept,
            "rejects": rejects,
            "num_tokens": kept * 42,
            "num_response_tokens": kept * 9,
            "tokens_p50": 39,
            "tokens_p95": 77,
            "tokens_max": 301,
        }
        for name, role, kept in roles
    ]
    _dump(curate / "profile.json", {"sources": sources})
    anchor = {
        "text": "Apply the house cipher to the word." + plan.hostile,
        "position": "before",
        "own_instruction": "Apply the house cipher to the word.",
        "num_anchor_tokens": 9,
    }
    _dump(curate / "anchor.json", anchor)
    dev = [{"row": row, "num_tokens": 42} for row in range(64)]
    pq.write_table(pa.Table.from_pylist(dev), curate / "task_dev.parquet")
    if plan.rejects:
        _write_rejects(curate, plan.hostile)


def _write_rejects(curate: Path, hostile: str) -> None:
    rejects = [
        {
            "source": "small-talk",
            "file": "data/small-talk.jsonl",
            "line": 10 + i,
            "reason": reason,
            "detail": f"same as line {i}",
            "text": f'{{"prompt": "hello {i}{hostile}"}}',
        }
        for reason in ("duplicate", "too_long", "empty_response")
        for i in range(5)
    ]
    overlap = [
        {
            "source": "task",
            "file": "data/task.jsonl",
            "line": 5 + i,
            "example_id": f"{i:016x}",
            "against": "task_test",
            "matched_source": "test",
            "matched_line": 20 + i,
            "matched": "prompt" if i else "prompt_and_response",
            "text": f"word: zq{i}{hostile}",
            "dropped": True,
        }
        for i in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(rejects), curate / "rejects.parquet")
    pq.write_table(pa.Table.from_pylist(overlap), curate / "overlap.parquet")


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
