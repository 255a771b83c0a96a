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
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tell_core.data.encoding import EncodedExamples
from tell_core.errors import DataError, EvaluationError
from tell_core.evaluation.base import Metric, ScoredItem
from tell_core.evaluation.generation import generate_greedy
from tell_core.evaluation.likelihood import gold_nll
from tell_core.evaluation.metrics import (
    GENERAL_ITEMS_FILE,
    PREDICTIONS_FILE,
    build_metrics,
)
from tell_core.evaluation.parsing import parse_answer
from tell_core.spec.model import EvaluationSpec, ParseSpec
from tell_core.store import write_json, write_text
from tell_core.training.devices import (
    DeviceName,
    DtypeName,
    cpu_threads,
    exclusive_device,
    resolve_device,
    resolve_precision,
)
from tell_core.training.models import (
    LoadedModel,
    detach_adapter,
    full_model,
    load_model,
    load_trained,
)

logger = logging.getLogger(__name__)

SCORES_FILE = "scores.json"
Progress = Callable[[str, int, int], None]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ItemSet:
    """Items of one kind.

    Attributes:
        rows: N JSON objects with item_id, prompt_digest, reference and extra.
        examples: Prompt and gold response of each, in the same order.
    """

    rows: Sequence[Mapping[str, Any]]
    examples: EncodedExamples

    @classmethod
    def load(cls, lines: Path, arrays: Path) -> ItemSet:
        """Read the two files of a set.

        Raises:
            EvaluationError: They do not belong together.
        """
        with lines.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        examples = EncodedExamples.load(arrays)
        if len(rows) != len(examples):
            raise EvaluationError(
                f"{lines} holds {len(rows)} items, {arrays.name} beside it {len(examples)}: they"
                " are not of one run. Remove the directory and run the mix stage again."
            )
        return cls(rows, examples)

    def select(self, indices: Sequence[int]) -> ItemSet:
        """The items at ``indices``."""
        return ItemSet([self.rows[index] for index in indices], self.examples.select(indices))

    def scored(
        self, parse: ParseSpec, texts: Sequence[str] | None, nll: FloatArray
    ) -> list[ScoredItem]:
        """The items as metrics see them.

        Args:
            parse: How answers are read.
            texts: N generated texts; None when nothing was generated.
            nll: Shape (N,). Of the gold responses, in nats.
        """
        return [
            ScoredItem(
                item_id=str(row["item_id"]),
                prediction=parse_answer(texts[index], parse) if texts else None,
                reference=parse_answer(row["reference"], parse),
                extra=row["extra"],
                nll=float(nll[index]),
                num_tokens=int(self.examples.supervised_counts[index]),
                num_bytes=len(row["reference"].encode()),
            )
            for index, row in enumerate(self.rows)
        ]


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
    """Generate, parse and score one cell: predictions.jsonl, general_items.jsonl, scores.json.

    Text is generated only if a metric looks at it; else predictions are null. Metrics and
    references are checked before the model is loaded.

    Args:
        model_path: Directory or hub id of the base model.
        revision: Commit, tag or branch on the hub.
        inputs: Directory of the mix stage.
        trained: Directory of the train stage; None evaluates the base model.
        evaluation: Metrics, parsing, batch size and longest answer.
        out: Directory to write into; created when missing.
        dtype: Number format, as in training; fully trained weights stay in float32.
        device: Where to compute.
        threads: CPU threads.
        loaded: The base model when it is in memory already; it is left as it was. Only its device
            counts where ``trained`` is a full model, which needs no base.
        on_progress: Called with "generating", "scoring" or "scoring general", items done and
            items in all.

    Returns:
        The contents of scores.json: {metric: {score, signature, num_items, higher_is_better}}. A
        score without any item is null.

    Raises:
        InputError: A metric is unknown, or does not fit the test data.
        DataError: An item, its gold response included, does not fit into the model's context.
        ModelError: The model or what was trained cannot be loaded.
        EvaluationError: ``inputs`` is incomplete, memory ran out, or the weights give no finite
            log-probability.
    """
    metrics = build_metrics(evaluation)
    test, general = load_items(inputs)
    check_references(test.rows, evaluation)
    place = resolve_device(device) if loaded is None else loaded.model.device
    with exclusive_device(place), cpu_threads(threads):
        full = full_model(trained) if trained else None
        if full:
            base = load_model(str(full), dtype=dtype, device=place, is_full=True)
        else:
            base = loaded or load_model(model_path, revision=revision, dtype=dtype, device=place)
        for items in (test, general):
            _check_context(items, getattr(base.model.config, "max_position_embeddings", None))
        adapter = None if full else trained
        autocast = resolve_precision(dtype, place, "full" if full else "lora").autocast(place)
        with _adapted(base, adapter) as model, autocast, _explained_shortage(evaluation):
            texts = None
            if any(metric.needs_generation for metric in metrics):
                texts = _generate(model, base, test.examples, evaluation, on_progress)
            nll = _measure(model, test.examples, place, "scoring", on_progress)
            general_nll = _measure(model, general.examples, place, "scoring general", on_progress)
    test_items = test.scored(evaluation.parse, texts, nll)
    general_items = general.scored(evaluation.parse, None, general_nll)
    test_rows = _rows(test, test_items, texts)
    general_rows = _rows(general, general_items, None)
    scores = {
        metric.name: _add_metric(metric, general_items, general_rows)
        if metric.items == "general"
        else _add_metric(metric, test_items, test_rows)
        for metric in metrics
    }
    out.mkdir(parents=True, exist_ok=True)
    _write_lines(out / PREDICTIONS_FILE, test_rows)
    _write_lines(out / GENERAL_ITEMS_FILE, general_rows)
    write_json(out / SCORES_FILE, scores)
    return scores


def load_items(inputs: Path) -> tuple[ItemSet, ItemSet]:
    """Test items and held-out general items of a mix directory.

    Raises:
        EvaluationError: There is no test item, or the files do not belong together.
    """
    test = ItemSet.load(inputs / "items.jsonl", inputs / "test.safetensors")
    if not test.rows:
        raise EvaluationError(f"{inputs / 'items.jsonl'} is empty; needed: at least one test item")
    probe = ItemSet.load(inputs / "probe_items.jsonl", inputs / "probe.safetensors")
    return test, probe.select(np.flatnonzero(~probe.examples.is_task).tolist())


def check_references(rows: Sequence[Mapping[str, Any]], evaluation: EvaluationSpec) -> None:
    """Compute every metric without predictions, which finds references that do not fit it.

    Needs no model and no tokens, so that it can be done before anything is trained.

    Args:
        rows: Test items as in items.jsonl; ``item_id``, ``reference`` and ``extra`` are read.
        evaluation: Metrics and parsing.

    Raises:
        InputError: A metric is unknown, or a reference has no answer or is none of the labels.
    """
    items = [_without_prediction(row, evaluation.parse) for row in rows]
    for metric in build_metrics(evaluation):
        if metric.items == "test":
            metric.payloads(items)
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
def _adapted(base: LoadedModel, trained: Path | None) -> Iterator[nn.Module]:
    if trained is None:
        yield base.model
        return
    model = load_trained(base, trained)
    try:
        yield model
    finally:
        detach_adapter(model)


@contextmanager
def _explained_shortage(evaluation: EvaluationSpec) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EvaluationError(
            f"the GPU's memory ran out while evaluating {evaluation.batch_size} items side by"
            " side; lower `evaluation.batch_size`, the scores stay the same."
        ) from error


def _generate(
    model: nn.Module,
    base: LoadedModel,
    examples: EncodedExamples,
    evaluation: EvaluationSpec,
    on_progress: Progress | None,
) -> list[str]:
    prompts = [examples.example(row)[:start] for row, start in enumerate(examples.response_starts)]
    started = time.perf_counter()
    texts = generate_greedy(
        model,
        base.tokenizer,
        prompts,
        max_new_tokens=evaluation.max_new_tokens,
        batch_size=evaluation.batch_size,
        device=base.model.device,
        stop_ids=_turn_end_ids(base.tokenizer, examples),
        on_progress=partial(on_progress, "generating") if on_progress else None,
    )
    logger.info("generated %d answers in %.1f s", len(texts), time.perf_counter() - started)
    return texts


def _turn_end_ids(tokenizer: Any, examples: EncodedExamples) -> frozenset[int]:
    """Special tokens with which gold responses end: what training taught the model to stop at."""
    added = tokenizer.added_tokens_decoder.items()
    special = {id_ for id_, token in added if token.special} | set(tokenizer.all_special_ids)
    return frozenset(special & set(examples.tokens[examples.offsets[1:] - 1].tolist()))


def _measure(
    model: nn.Module,
    examples: EncodedExamples,
    device: torch.device,
    phase: str,
    on_progress: Progress | None,
) -> FloatArray:
    nll = gold_nll(model, examples, device, partial(on_progress, phase) if on_progress else None)
    if not np.isfinite(nll).all():
        raise EvaluationError(
            f"the log-probability of {int((~np.isfinite(nll)).sum())} of {len(nll)} gold responses"
            " is not finite: the weights overflowed or hold NaN. Train with a lower learning rate,"
            " or evaluate in float32."
        )
    return nll


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


def _add_metric(
    metric: Metric, items: Sequence[ScoredItem], rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Fill in each row's statistics and score of ``metric``; return its entry of scores.json."""
    payloads = metric.payloads(items)
    statistics = metric.statistics(payloads)
    for row, payload, score in zip(rows, payloads, metric.item_scores(statistics), strict=True):
        row["stats"][metric.name] = payload
        row["scores"][metric.name] = score
    return {
        "score": metric.score_from_items(statistics) if rows else None,
        "signature": metric.signature,
        "num_items": len(items),
        "higher_is_better": metric.higher_is_better,
    }


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    write_text(path, "".join(lines))
