"""Items as metrics see them, without model and files."""

from collections.abc import Sequence
from typing import Any

from tell_core.evaluation.base import Metric, ScoredItem
from tell_core.evaluation.metrics import build_metric
from tell_core.evaluation.parsing import Answer
from tell_core.spec.model import MetricSpec

LABELS = ("yes", "no", "maybe")
TOLERANCE = 1e-9


def item(
    prediction: str | None,
    reference: str,
    *,
    nll: float = 1.0,
    num_tokens: int = 1,
    num_bytes: int = 1,
    **extra: Any,
) -> ScoredItem:
    return ScoredItem(
        "test-0", Answer(prediction, False), Answer(reference, False), extra, nll, num_tokens,
        num_bytes,
    )  # fmt: skip


def items_of(pairs: Sequence[tuple[str | None, str]]) -> list[ScoredItem]:
    return [item(prediction, reference) for prediction, reference in pairs]


def metric_of(name: str, **options: Any) -> Metric:
    defaults = {"label_f1": {"positive": "yes", "labels": LABELS}}
    return build_metric(MetricSpec(name=name, **(defaults.get(name, {}) | options)))


def score(metric: Metric, items: list[ScoredItem]) -> float:
    return metric.score_from_items(metric.statistics(metric.payloads(items)))
