"""Evaluation of one cell: from its trained weights and test items to predictions and scores."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tell_core.errors import EvaluationError
from tell_core.evaluation.base import SCORES_FILE, Metric, ScoredItem, items_file
from tell_core.evaluation.harness import check_harness
from tell_core.evaluation.items import ItemSet, load_items, token_limit
from tell_core.evaluation.measuring import Measured, Progress, explained_shortage, measure
from tell_core.evaluation.metrics import build_metrics
from tell_core.evaluation.parsing import parse_answer
from tell_core.evaluation.subject import Subject
from tell_core.evaluation.vllm_backend import check_vllm
from tell_core.spec.model import EvaluationSpec, ParseSpec
from tell_core.store import write_json, write_text
from tell_core.training.devices import (
    DeviceName,
    DtypeName,
    cpu_threads,
    exclusive_device,
    resolve_device,
)
from tell_core.training.models import LoadedModel

logger = logging.getLogger(__name__)


def evaluate_cell(
    *,
    model_path: str,
    revision: str | None,
    inputs: Path,
    trained: Path | None,
    evaluation: EvaluationSpec,
    out: Path,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    threads: int = 1,
    loaded: LoadedModel | None = None,
    on_progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Generate, parse and score one cell: a file per kind of items, and scores.json.

    Text is generated only if a metric looks at it; else predictions are null. Metrics and
    references are checked before the model is loaded. Which metrics' items are in which file says
    `Metric.items_file`; that of the retention set is empty where there is none.

    Args:
        model_path: Directory or hub id of the base model.
        revision: Commit, tag or branch on the hub.
        inputs: Directory of the mix stage.
        trained: Directory of the train stage; None evaluates the base model.
        evaluation: Metrics, parsing, decoding, batch size and longest answer.
        out: Directory to write into; created when missing.
        dtype: Number format, as in training; fully trained weights stay in float32.
        device: Where to compute.
        threads: CPU threads.
        loaded: The base model when it is in memory already; it is left as it was. Only its device
            counts where ``trained`` is a full model, which needs no base.
        on_progress: Called with "generating", "scoring", "scoring general", "scoring retention" or
            "running harness", items (of the harness: tasks) done and in all.

    Returns:
        The contents of scores.json: {metric: {score, signature, num_items, higher_is_better,
        repeats}}. A score without any item is null; the retention set's metric is there only where
        it has items. ``repeats`` holds the score of every repeat of the generation, the first
        being ``score``; metrics that look at no generated text have none.

    Raises:
        InputError: A metric is unknown, or does not fit the test data; or vLLM or the harness
            cannot do what is asked.
        DataError: An item, its gold response included, does not fit into the model's context.
        ModelError: The model or what was trained cannot be loaded.
        EvaluationError: ``inputs`` is incomplete, memory ran out, or the weights give no finite
            log-probability.
    """
    metrics = build_metrics(evaluation)
    sets = load_items(inputs)
    _check_items(sets["test"].rows, evaluation)
    place = resolve_device(device) if loaded is None else loaded.model.device
    subject = Subject(model_path, revision, trained, dtype, place, loaded)
    with exclusive_device(place), cpu_threads(threads), explained_shortage(evaluation):
        measured = measure(subject, sets, evaluation, _needs_text(metrics), on_progress)
        return _write_scores(sets, measured, metrics, evaluation.parse, out)


def score_measured(
    inputs: Path, measured: Measured, evaluation: EvaluationSpec, out: Path
) -> dict[str, dict[str, Any]]:
    """Score what `measuring.measure_cell` kept of a cell; writes and returns as `evaluate_cell`.

    Args:
        inputs: Directory of the mix stage that was measured.
        measured: Texts and log-probabilities.
        evaluation: Metrics and parsing.
        out: Directory to write into; created when missing.

    Raises:
        InputError: A metric is unknown, or does not fit the test data.
        EvaluationError: What was measured are not these items.
    """
    metrics = build_metrics(evaluation)
    sets = load_items(inputs)
    _check_items(sets["test"].rows, evaluation)
    _check_measured(sets, measured, evaluation, needs_text=_needs_text(metrics))
    return _write_scores(sets, measured, metrics, evaluation.parse, out)


def needs_text(evaluation: EvaluationSpec) -> bool:
    """Whether a metric looks at generated text."""
    return _needs_text(build_metrics(evaluation))


def _needs_text(metrics: Sequence[Metric]) -> bool:
    return any(metric.needs_generation for metric in metrics)


def _check_measured(
    sets: Mapping[str, ItemSet], measured: Measured, evaluation: EvaluationSpec, *, needs_text: bool
) -> None:
    wanted = {kind: len(items.rows) for kind, items in sets.items()}
    found = {kind: len(nll) for kind, nll in measured.nll.items()}
    num_texts = [len(texts) for texts in measured.texts]
    num_wanted = [wanted["test"]] * evaluation.num_repeats if needs_text else []
    if found != wanted or num_texts != num_wanted:
        raise EvaluationError(
            f"measured were {found} items with {num_texts} answers, needed are {wanted} with"
            f" {num_wanted}: they are not of one run. Measure the cell again."
        )


def _write_scores(
    sets: Mapping[str, ItemSet],
    measured: Measured,
    metrics: Sequence[Metric],
    parse: ParseSpec,
    out: Path,
) -> dict[str, dict[str, Any]]:
    """Compute every metric; write a file per kind of items, and scores.json."""
    started = time.perf_counter()
    scored, rows = _tables(sets, measured, parse)
    scores = {
        metric.name: _add_metric(metric, scored[metric.items], rows[metric.items])
        for metric in metrics
        if rows[metric.items] or metric.items != "retention"
    }
    logger.info("computed %d metrics in %.2f s", len(scores), time.perf_counter() - started)
    out.mkdir(parents=True, exist_ok=True)
    for kind, lines in rows.items():
        _write_lines(out / items_file(kind), lines)
    write_json(out / SCORES_FILE, scores)
    return scores


def check_references(rows: Sequence[Mapping[str, Any]], evaluation: EvaluationSpec) -> None:
    """Find what would make the evaluation fail, before anything is trained.

    Every metric is computed without predictions, which finds references that do not fit it; every
    item's token limit is read; vLLM and the harness's tasks are looked for. Needs no model and no
    tokens.

    Args:
        rows: Test items as in items.jsonl; ``item_id``, ``reference`` and ``extra`` are read.
        evaluation: Metrics, parsing and decoding.

    Raises:
        InputError: A metric is unknown, a reference has no answer or is none of the labels, an
            item has no usable limit, or something is asked for that is not installed.
    """
    _check_items(rows, evaluation)
    if evaluation.backend == "vllm":
        check_vllm()
    check_harness(evaluation.harness)


def _check_items(rows: Sequence[Mapping[str, Any]], evaluation: EvaluationSpec) -> None:
    items = [_without_prediction(row, evaluation.parse) for row in rows]
    for row in rows:
        token_limit(row, evaluation)
    for metric in build_metrics(evaluation):
        if metric.items == "test":
            metric.check_references(items)
        column = metric.spec.field
        num_missing = sum(column not in item.extra for item in items) if column else 0
        if num_missing:
            logger.warning(
                "metric %s: %d of %d test items have no column %r; their response is the reference",
                metric.name, num_missing, len(items), column,
            )  # fmt: skip


def _without_prediction(row: Mapping[str, Any], parse: ParseSpec) -> ScoredItem:
    reference = str(row["reference"])
    return ScoredItem(
        item_id=str(row["item_id"]),
        prediction=None,
        reference=parse_answer(reference, parse),
        extra=row["extra"],
        nll=0.0,
        num_tokens=1,
        num_bytes=len(reference.encode()),
        prompt=str(row.get("prompt", "")),
    )


def _tables(
    sets: Mapping[str, ItemSet], measured: Measured, parse: ParseSpec
) -> tuple[dict[str, list[list[ScoredItem]]], dict[str, list[dict[str, Any]]]]:
    """By kind of items: the items as metrics see them, a list per repeat; and rows of its file."""
    scored: dict[str, list[list[ScoredItem]]] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for kind, items in sets.items():
        repeats = measured.texts if kind == "test" else []
        nll = measured.nll[kind]
        scored[kind] = [items.scored(parse, texts, nll) for texts in repeats] or [
            items.scored(parse, None, nll)
        ]
        rows[kind] = _rows(items, scored[kind][0], repeats[0] if repeats else None)
    for kind, found in measured.harness.items():
        scored[kind], rows[kind] = [found], _harness_rows(found)
    return scored, rows


def _rows(
    items: ItemSet, scored: Sequence[ScoredItem], texts: Sequence[str] | None
) -> list[dict[str, Any]]:
    """What is known of each item; `_add_metric` fills in ``scores`` and ``stats``."""
    return [
        {
            "item_id": item.item_id,
            "prompt_digest": row["prompt_digest"],
            "reference": row["reference"],
            "prediction": texts[index] if texts else None,
            "parsed": item.predicted_text,
            "scores": {},
            "nll": item.nll,
            "num_tokens": item.num_tokens,
            "num_bytes": item.num_bytes,
            "stats": {},
        }
        for index, (row, item) in enumerate(zip(items.rows, scored, strict=True))
    ]


def _harness_rows(items: Sequence[ScoredItem]) -> list[dict[str, Any]]:
    """The same for items of the harness, of which less is known."""
    return [
        {
            "item_id": item.item_id,
            "reference": item.reference.value,
            "prediction": item.predicted_text,
            "scores": {},
            "stats": {},
        }
        for item in items
    ]


def _add_metric(
    metric: Metric, repeats: Sequence[Sequence[ScoredItem]], rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Fill in each row's statistics and score of ``metric``; return its entry of scores.json."""
    payloads = metric.payloads(repeats[0])
    statistics = metric.statistics(payloads)
    for row, payload, score in zip(rows, payloads, metric.item_scores(statistics), strict=True):
        row["stats"][metric.name] = payload
        row["scores"][metric.name] = score
    entry: dict[str, Any] = {
        "score": metric.score_from_items(statistics) if rows else None,
        "signature": metric.signature,
        "num_items": len(rows),
        "higher_is_better": metric.higher_is_better,
    }
    if metric.needs_generation:
        others = [metric.statistics(metric.payloads(items)) for items in repeats[1:]]
        entry["repeats"] = [entry["score"], *map(metric.score_from_items, others)]
    return entry


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    write_text(path, "".join(lines))
