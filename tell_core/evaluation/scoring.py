"""Evaluation of one cell: from its trained weights and test items to predictions and scores."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn

from tell_core.data.encoding import EncodedExamples
from tell_core.errors import DataError, EvaluationError
from tell_core.evaluation.base import SCORES_FILE, FloatArray, Metric, ScoredItem, items_file
from tell_core.evaluation.generation import Counted, Decoding, Request, generate
from tell_core.evaluation.harness import check_harness, run_harness
from tell_core.evaluation.items import ItemSet, load_items, token_limit
from tell_core.evaluation.likelihood import gold_nll
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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


class Write(Protocol):
    """A model that writes answers, whichever backend it is in; see `generation.generate`."""

    def __call__(
        self,
        requests: Sequence[Request],
        decoding: Decoding,
        *,
        order_seed: int | None,
        on_progress: Counted | None,
    ) -> list[str]:
        """Texts in the order of ``requests``."""


@dataclass(frozen=True)
class _Measured:
    """What a model did with its items.

    Attributes:
        texts: Answers to the test items, a list per repeat; none when nothing was generated.
        nll: By kind of items, shape (N,): of the gold responses, in nats.
        harness: By kind of items: items of the harness.
    """

    texts: list[list[str]]
    nll: dict[str, FloatArray]
    harness: dict[str, list[ScoredItem]]


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
    with exclusive_device(place), cpu_threads(threads), _explained_shortage(evaluation):
        measured = _measure(subject, sets, evaluation, metrics, on_progress)
        started = time.perf_counter()
        scored, rows = _tables(sets, measured, evaluation.parse)
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


def _check_context(items: ItemSet, max_tokens: int | None) -> None:
    """Refuse items that are longer, gold response included, than the model takes."""
    longer = np.flatnonzero(items.examples.lengths > (max_tokens or np.inf))
    if len(longer):
        first = int(longer[0])
        raise DataError(
            f"{len(longer)} of {len(items.rows)} items do not fit into the {max_tokens} tokens that"
            f" the model takes, the first is {items.rows[first]['item_id']} with"
            f" {int(items.examples.lengths[first])} tokens, gold response included. Lower"
            " `curation.max_tokens` (with few-shot arms, `evaluation.num_shots`)."
        )


@contextmanager
def _explained_shortage(evaluation: EvaluationSpec) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EvaluationError(
            f"the GPU's memory ran out while evaluating {evaluation.batch_size} items side by"
            " side; lower `evaluation.batch_size`, the scores stay the same."
        ) from error


def _measure(
    subject: Subject,
    sets: Mapping[str, ItemSet],
    evaluation: EvaluationSpec,
    metrics: Sequence[Metric],
    on_progress: Progress | None,
) -> _Measured:
    """Have the model write, and measure what it gives the gold responses."""
    needs_text = any(metric.needs_generation for metric in metrics)
    texts: list[list[str]] = []
    if needs_text and evaluation.backend == "vllm":
        with subject.in_vllm(evaluation.batch_size) as (engine, tokenizer):
            texts = _write(engine.generate, tokenizer, sets["test"], evaluation, on_progress)
    with subject.in_memory() as (model, tokenizer):
        for items in sets.values():
            _check_context(items, getattr(model.config, "max_position_embeddings", None))
        if needs_text and evaluation.backend == "transformers":
            write = partial(
                generate,
                model,
                tokenizer,
                batch_size=evaluation.batch_size,
                device=subject.device,
            )
            texts = _write(write, tokenizer, sets["test"], evaluation, on_progress)
        nll = {
            kind: _gold_nll(
                model, items.examples, subject.device, _counted(on_progress, _phase(kind))
            )
            for kind, items in sets.items()
        }
        harness = run_harness(
            model,
            tokenizer,
            evaluation.harness,
            batch_size=evaluation.batch_size,
            on_progress=_counted(on_progress, "running harness"),
        )
    return _Measured(texts, nll, harness)


def _phase(kind: str) -> str:
    return "scoring" if kind == "test" else f"scoring {kind}"


def _counted(on_progress: Progress | None, phase: str) -> Counted | None:
    return partial(on_progress, phase) if on_progress else None


def _write(
    write: Write,
    tokenizer: PreTrainedTokenizerBase,
    items: ItemSet,
    evaluation: EvaluationSpec,
    on_progress: Progress | None,
) -> list[list[str]]:
    """Answers to the items, once per repeat.

    Drawn answers differ by their random streams; greedy ones can only differ by rounding, so that
    their batches are put together anew.
    """
    decoding = Decoding(
        stop=evaluation.stop,
        stop_ids=_turn_end_ids(tokenizer, items.examples),
        temperature=evaluation.temperature,
        top_p=evaluation.top_p,
    )
    is_drawn = evaluation.temperature > 0
    started = time.perf_counter()
    texts = [
        write(
            items.requests(evaluation, repeat),
            decoding,
            order_seed=None if is_drawn or repeat == 0 else evaluation.decoding_seed + repeat,
            on_progress=_counted(on_progress, "generating"),
        )
        for repeat in range(evaluation.num_repeats)
    ]
    num_answers = sum(map(len, texts))
    logger.info("generated %d answers in %.1f s", num_answers, time.perf_counter() - started)
    return texts


def _turn_end_ids(tokenizer: Any, examples: EncodedExamples) -> frozenset[int]:
    """Special tokens with which gold responses end: what training taught the model to stop at."""
    added = tokenizer.added_tokens_decoder.items()
    special = {id_ for id_, token in added if token.special} | set(tokenizer.all_special_ids)
    return frozenset(special & set(examples.tokens[examples.offsets[1:] - 1].tolist()))


def _gold_nll(
    model: nn.Module,
    examples: EncodedExamples,
    device: torch.device,
    on_progress: Counted | None,
) -> FloatArray:
    nll = gold_nll(model, examples, device, on_progress)
    if not np.isfinite(nll).all():
        raise EvaluationError(
            f"the log-probability of {int((~np.isfinite(nll)).sum())} of {len(nll)} gold responses"
            " is not finite: the weights overflowed or hold NaN. Train with a lower learning rate,"
            " or evaluate in float32."
        )
    return nll


def _tables(
    sets: Mapping[str, ItemSet], measured: _Measured, parse: ParseSpec
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
