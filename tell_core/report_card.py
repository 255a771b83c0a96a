"""The report card of a registered model: what it is, what it can do, what it cost, how to redo it.

Everything is read from the finished run; nothing is computed here but counts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

import pyarrow.parquet as pq

from tell_core.analysis.summary import verdict_sentence
from tell_core.data.curation import curation_inputs
from tell_core.evaluation.metrics import metric_identity
from tell_core.pipeline import (
    STAGE_VERSIONS,
    CellOutcome,
    Stage,
    base_digest,
    number_format,
    renderer_of,
)
from tell_core.spec.arms import parse_arm
from tell_core.spec.model import ExperimentSpec
from tell_core.store import MARKER, read_json

NOT_STATED = "not stated"
_WEIGHTS = ".safetensors"
_GAP = "\u00a0" * 3
_SETTINGS = ("task_budget_tokens", "general_budget_tokens")


def report_card(
    spec: ExperimentSpec,
    root: Path,
    curated: Stage,
    outcomes: Sequence[CellOutcome],
    chosen: CellOutcome,
) -> dict[str, Any]:
    """The content of report_card.json for the cell that is to be registered.

    Args:
        spec: The experiment.
        root: Its run directory, analysed.
        curated: Its data.
        outcomes: All finished cells.
        chosen: The trained cell.
    """
    leverage, manifest = read_json(root / "leverage.json"), read_json(root / "manifest.json")
    return {
        "experiment": spec.name,
        "task": spec.task.name,
        "cell": chosen.cell.name,
        "arm": chosen.cell.arm,
        "seed": chosen.cell.seed,
        "primary_metric": spec.analysis.primary_metric,
        "base_model": spec.model.id,
        "base_revision": spec.model.revision,
        "base_digest": base_digest(spec.model.id, spec.model.revision),
        "renderer_digest": renderer_of(spec).digest,
        "scores": read_json(chosen.evaluated.path / "scores.json"),
        "answer": verdict_sentence(leverage),
        "leverage": leverage_rows(leverage, chosen),
        "price": price_rows(leverage, chosen),
        "noise": seed_noise(spec.analysis.primary_metric, outcomes, chosen),
        "ledger": read_json(chosen.mixed.path / "ledger.json"),
        "data": _data_rows(spec, curated.path),
        "contamination": contamination(curated.path),
        "licences": _licences(spec),
        "reproduce": _reproduce(spec, manifest, curated, chosen),
    }


def leverage_rows(leverage: Mapping[str, Any], chosen: CellOutcome) -> list[dict[str, Any]]:
    """Leverage on the primary metric at the cell's budgets, against each SFT arm and the best.

    Of the cell's own arm where that is a TELL arm, else of arm `tell`: what the other way of
    training would have given at this budget.
    """
    cell = chosen.cell
    arm = cell.arm if parse_arm(cell.arm).is_tell else "tell"
    by_general = leverage["metrics"].get(leverage["primary_metric"], {}).get("arms", {})
    return [
        {"arm": arm, "general_budget_tokens": int(general), **row}
        for general, rows in by_general.get(arm, {}).items()
        for row in rows
        if row["task_budget_tokens"] == cell.task_budget_tokens
        and cell.general_budget_tokens in (None, int(general))
    ]


def price_rows(leverage: Mapping[str, Any], chosen: CellOutcome) -> list[dict[str, Any]]:
    """Change of other abilities against the base model, of the cell's arm at its budgets."""
    cell = chosen.cell
    return [
        row
        for row in leverage["price"]
        if row["arm"] == cell.arm
        and all(row[name] in (None, getattr(cell, name)) for name in _SETTINGS)
    ]


def seed_noise(metric: str, outcomes: Sequence[CellOutcome], chosen: CellOutcome) -> dict[str, Any]:
    """How far the score of such a training scatters over seeds.

    Returns:
        ``metric``, the ``scores`` of all seeds of the cell's arm at its budgets, and their
        standard deviation ``sd``, None with a single seed.
    """
    group = [
        read_json(outcome.evaluated.path / "scores.json")[metric]["score"]
        for outcome in outcomes
        if outcome.cell.arm == chosen.cell.arm
        and all(getattr(outcome.cell, n) == getattr(chosen.cell, n) for n in _SETTINGS)
    ]
    return {"metric": metric, "scores": group, "sd": stdev(group) if len(group) > 1 else None}


def contamination(curated: Path) -> dict[str, Any]:
    """What curation found of the test items in the training data, and the verdict in words."""
    overlap = _against_test(curated / "overlap.parquet", ("dropped",))
    num_removed = sum(row["dropped"] for row in overlap)
    num_left = len(overlap) - num_removed
    num_flagged = len(_against_test(curated / "flagged.parquet", ()))
    if num_left:
        verdict = f"contaminated: {num_left} training examples stand in the test set or hold it"
    else:
        verdict = "clean: no training example is known to stand in the test set"
    return {
        "verdict": verdict,
        "num_removed": num_removed,
        "num_left": num_left,
        "num_flagged": num_flagged,
    }


def weight_digests(trained: Path) -> dict[str, str]:
    """sha256 of each file of weights that a training left, by its name in the stage."""
    files = read_json(trained / MARKER)["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(_WEIGHTS)}


def card_markdown(card: Mapping[str, Any]) -> str:
    """The report card for people, as Markdown."""
    redo = card["reproduce"]
    parts = [
        f"# {card['experiment']}: {card['cell']}",
        f"Task `{card['task']}`, arm `{card['arm']}`, seed {card['seed']}; base model"
        f" `{_model_name(card['base_model'])}` (digest `{card['base_digest'][:12]}`).",
        "## Answer of the experiment\n\n" + "\n".join(f"- {line}" for line in card["answer"]),
        "## Scores on the test set\n\n"
        + _table(
            ("metric", "score", "items"),
            [(name, _number(e["score"]), e["num_items"]) for name, e in card["scores"].items()],
        ),
        "## Leverage at these budgets\n\n" + _leverage_table(card["leverage"]),
        "## Price in other abilities\n\n" + _price_table(card["price"]),
        "## Budgets\n\n" + _ledger_table(card["ledger"]),
        "## Data\n\n"
        + _table(
            ("role", "source", "examples", "tokens", "digest", "licence"),
            [
                (
                    row["role"],
                    row["name"],
                    f"{row['num_examples']:,}",
                    f"{row['num_tokens']:,}",
                    ", ".join(digest[:12] for digest in row["sha256"]) or "hub",
                    row["licence"],
                )
                for row in card["data"]
            ],
        ),
        f"Base model's licence: {_escaped(card['licences']['base_model'])}.",
        f"**Contamination:** {card['contamination']['verdict']};"
        f" {card['contamination']['num_removed']} removed before,"
        f" {card['contamination']['num_flagged']} flagged for a person to judge.",
        f"## How to reproduce\n\n`{redo['command']}`, at commit `{redo['git_commit']}` with "
        + ", ".join(f"{name} {version}" for name, version in redo["versions"].items() if version)
        + "; or, from the registry alone, `tell replay` with this version's URI.",
    ]
    return "\n\n".join(parts) + "\n"


def _model_name(model: str) -> str:
    """A hub id as it is; of a directory the name, as its place differs from machine to machine."""
    return Path(model).name if Path(model).is_absolute() else model


def _against_test(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path, columns=["against", *columns]).to_pylist()
    return [row for row in rows if row["against"] == "task_test"]


def _data_rows(spec: ExperimentSpec, curated: Path) -> list[dict[str, Any]]:
    licences = _licences(spec)["sources"]
    return [
        {
            "role": source["role"],
            "name": source["name"],
            "num_examples": source["num_kept"],
            "num_tokens": source["num_tokens"],
            "sha256": [file["sha256"] for file in source["files"] if file.get("sha256")],
            "licence": licences.get(f"{source['role']}/{source['name']}", NOT_STATED),
        }
        for source in read_json(curated / "profile.json")["sources"]
    ]


def _licences(spec: ExperimentSpec) -> dict[str, Any]:
    task = spec.task
    named = [("task_train", task.train), ("task_test", task.test)]
    named += [("task_dev", task.dev)] if task.dev else []
    named += [("general", source) for source in spec.general]
    named += [("retention", source) for source in spec.retention]
    return {
        "base_model": spec.model.licence or NOT_STATED,
        "sources": {f"{role}/{s.name}": s.licence or NOT_STATED for role, s in named},
    }


def _reproduce(
    spec: ExperimentSpec, manifest: Mapping[str, Any], curated: Stage, chosen: CellOutcome
) -> dict[str, Any]:
    assert chosen.trained is not None and chosen.settings is not None, "the cell is trained"
    stages = (curated, chosen.mixed, chosen.trained, chosen.evaluated)
    return {
        "command": manifest["commands"][0],
        "git_commit": manifest["git_commit"] or "unknown",
        "versions": manifest["versions"],
        "hardware": manifest["hardware"],
        "number_format": number_format(spec),
        "settings": chosen.settings._asdict(),
        "stages": {stage.name: stage.fingerprint for stage in stages},
        "stage_versions": STAGE_VERSIONS,
        "inputs": curation_inputs(spec),
        "metric_sources": metric_identity(spec.evaluation).get("metrics", {}),
        "weights": weight_digests(chosen.trained.path),
    }


def _leverage_table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "Undefined at these budgets: the run has no TELL arm with a baseline there."
    return _table(
        ("arm", "against", "leverage", "interval", "task tokens"),
        [
            (
                row["arm"],
                row["baseline"],
                _bound(row),
                _interval(row["low"], row["high"]),
                f"{row['task_budget_tokens']:,}",
            )
            for row in rows
        ],
    )


def _bound(row: Mapping[str, Any]) -> str:
    if row["censored"] == "undefined":
        return "undefined"
    sign = {"above": "≥ ", "below": "≤ "}.get(row["censored"], "")
    return sign + _number(row["ratio"] if row["bound"] is None else row["bound"])


def _price_table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "Not measured: the run holds out no general data."
    return _table(
        ("metric", "change against the base model", "interval", "items"),
        [
            (
                row["metric"],
                _number(row["change"]),
                _interval(row["low"], row["high"]),
                row["num_items"],
            )
            for row in rows
        ],
    )


def _ledger_table(ledger: Mapping[str, Any]) -> str:
    shown = [(n, v) for n, v in ledger.items() if isinstance(v, int | float) and v is not None]
    return _table(("", "count"), [(name.replace("_", " "), f"{v:,g}") for name, v in shown])


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; MLflow's page sets columns without a gap, so the cells bring one."""
    cells = [[_escaped(str(cell)) + _GAP for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]])


def _escaped(text: str) -> str:
    """Text that is data, not Markdown or HTML."""
    for sign, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "'")):
        text = text.replace(sign, safe)
    return " ".join(text.split())


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _interval(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return "–"
    if high is None:
        return f"at least {_number(low)}"
    return f"at most {_number(high)}" if low is None else f"{_number(low)} to {_number(high)}"
