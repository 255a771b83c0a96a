"""The metrics by name, and the statistics of predictions that were written to disk.

Shape letters: N items, K statistics per item.
"""

import difflib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tell_core.errors import EvaluationError, InputError
from tell_core.evaluation.base import FloatArray, MeanMetric, Metric, ScoredItem, normalised
from tell_core.evaluation.harness import harness_identity, harness_metrics
from tell_core.evaluation.labels import (
    Accuracy,
    BalancedAccuracy,
    LabelF1,
    LabelMetric,
    MacroF1,
    Mcc,
)
from tell_core.evaluation.learned import Bleurt, Comet
from tell_core.evaluation.overlap import (
    Bleu,
    CharacterErrorRate,
    Chrf,
    ChrfPlusPlus,
    Gleu,
    RougeL,
)
from tell_core.evaluation.own import OwnMetric, source_digest
from tell_core.evaluation.structured import EntityF1, JsonFieldF1, SlotF1
from tell_core.spec.model import EvaluationSpec, MetricSpec


class ExactMatch(MeanMetric):
    """Share of predictions equal to the reference.

    Compared character by character after parsing (which strips). With ``normalise``: after NFKC,
    case folding, removal of punctuation and joining of white space; if that leaves nothing of a
    text, the text itself is compared. An unparsable prediction is wrong.
    """

    name = "exact_match"
    options = frozenset({"field", "normalise"})

    def _value(self, item: ScoredItem) -> float:
        prediction, reference = item.predicted_text, self._reference(item)
        if prediction is None:
            return 0.0
        if self.spec.normalise:
            return float(normalised(prediction) == normalised(reference))
        return float(prediction == reference)


class JsonValid(MeanMetric):
    """Share of generated texts that are one JSON object and nothing else.

    Judged on the text without the constant prefix and outer white space, whatever
    ``evaluation.parse.kind`` is. An object inside other text is not valid here, though its answer
    is read and scored by the other metrics. Keys are not checked.
    """

    name = "json_valid"
    options: ClassVar[frozenset[str]] = frozenset()

    def _value(self, item: ScoredItem) -> float:
        return float(item.prediction is not None and item.prediction.is_valid_json)


class LogProbability(MeanMetric):
    """Mean over items of the gold response's log-probability per supervised token, in nats.

    Teacher-forced: no text is generated. The end-of-turn token counts. Every item weighs the
    same, whatever its length.
    """

    name = "log_probability"
    limits = (-math.inf, 0.0)
    needs_generation = False
    options: ClassVar[frozenset[str]] = frozenset()

    def _value(self, item: ScoredItem) -> float:
        return -item.nll / item.num_tokens


class LogProbabilityPerByte(MeanMetric):
    """Mean over items of the gold response's log-probability per UTF-8 byte, in nats.

    Comparable between tokenizers. The end-of-turn token adds to the log-probability but has no
    bytes; an empty response counts as one byte.
    """

    name = "log_probability_per_byte"
    limits = (-math.inf, 0.0)
    needs_generation = False
    options: ClassVar[frozenset[str]] = frozenset()

    def _value(self, item: ScoredItem) -> float:
        return -item.nll / max(1, item.num_bytes)


class GeneralLogProbability(LogProbability):
    """The log-probability per token on held-out general items: what training costs elsewhere."""

    name = "general_log_probability"
    items = "general"


class RetentionLogProbability(LogProbability):
    """The log-probability per token on the retention set: abilities that are to be kept."""

    name = "retention_log_probability"
    items = "retention"


METRICS: Mapping[str, type[Metric]] = {
    metric.name: metric
    for metric in (
        Accuracy,
        BalancedAccuracy,
        Bleu,
        Bleurt,
        CharacterErrorRate,
        Chrf,
        ChrfPlusPlus,
        Comet,
        EntityF1,
        ExactMatch,
        GeneralLogProbability,
        Gleu,
        JsonFieldF1,
        JsonValid,
        LabelF1,
        LogProbability,
        LogProbabilityPerByte,
        MacroF1,
        Mcc,
        RetentionLogProbability,
        RougeL,
        SlotF1,
    )
}


def build_metric(spec: MetricSpec) -> Metric:
    """The metric that ``spec`` names.

    Raises:
        InputError: There is no such metric, or an option is set that it does not have.
    """
    kind = _metric_kind(spec.name)
    fields = MetricSpec.model_fields.items()
    given = {name for name, field in fields if getattr(spec, name) != field.default} - {"name"}
    ignored = sorted(given - kind.options)
    if ignored:
        takes = ", ".join(f"`{name}`" for name in sorted(kind.options)) or "no options"
        raise InputError(
            f"metric {spec.name!r} has no use for `{ignored[0]}`; it takes {takes}. Remove"
            f" `{ignored[0]}`."
        )
    metric = kind(spec)
    if metric.name != spec.name and metric.name in METRICS:
        raise InputError(
            f"metric {spec.name!r} would be called {metric.name!r}, which is one of this program's"
            " own; give your function another name"
        )
    return metric


def _metric_kind(name: str) -> type[Metric]:
    if ":" in name:
        return OwnMetric
    if name not in METRICS:
        near = difflib.get_close_matches(name.lower(), METRICS, n=1, cutoff=0.0)
        raise InputError(
            f"there is no metric {name!r}; did you mean {near[0]!r}? Metrics:"
            f" {', '.join(sorted(METRICS))}; or module:function for one of your own"
        )
    return METRICS[name]


def build_metrics(evaluation: EvaluationSpec) -> tuple[Metric, ...]:
    """The metrics asked for, the log-probabilities, which are always there, and the harness's.

    Reads no data, so that a wrong specification is found before anything runs.

    Raises:
        InputError: As `build_metric`; a metric is asked for twice; or a metric over labels meets
            answers that are whole JSON objects.
    """
    asked = [build_metric(spec) for spec in evaluation.metrics]
    over_labels = [metric.name for metric in asked if isinstance(metric, LabelMetric)]
    if over_labels and evaluation.parse.kind == "json" and evaluation.parse.field is None:
        raise InputError(
            f"metric {over_labels[0]!r} compares labels, but `evaluation.parse` reads whole JSON"
            " objects: add the key that holds the label, `parse: {kind: json, field: ...}`"
        )
    always = (LogProbability, GeneralLogProbability, RetentionLogProbability)
    names = {metric.name for metric in asked}
    metrics = (
        *asked,
        *(kind(MetricSpec(name=kind.name)) for kind in always if kind.name not in names),
        *harness_metrics(evaluation.harness),
    )
    repeated = [name for name, count in Counter(m.name for m in metrics).items() if count > 1]
    if repeated:
        raise InputError(f"metric {repeated[0]!r} is asked for twice; its scores share one name")
    return metrics


def metric_identity(evaluation: EvaluationSpec) -> dict[str, Any]:
    """What a score depends on beside the specification: code and task files of the user's.

    Returns:
        Plain JSON: sha256 of the source file of each metric of the user's own, and what
        `harness_identity` says; empty parts are left out.

    Raises:
        InputError: A metric's module is not there.
    """
    own = {spec.name: source_digest(spec.name) for spec in evaluation.metrics if ":" in spec.name}
    parts = {"metrics": own, "harness": harness_identity(evaluation.harness)}
    return {name: part for name, part in parts.items() if part}


def metric_statistics(metric: Metric, rows: Sequence[Mapping[str, Any]]) -> FloatArray:
    """Per-item statistics, shape (N, K), from rows that `evaluate_cell` wrote.

    Args:
        metric: Built from the same MetricSpec as in the evaluation.
        rows: Rows of ``metric.items_file``; each has ``stats``, a mapping from metric name to
            payload.

    Raises:
        EvaluationError: A row has no statistics of this metric.
    """
    try:
        return metric.statistics([row["stats"][metric.name] for row in rows])
    except KeyError as error:
        raise EvaluationError(
            f"the predictions hold no statistics of metric {metric.name!r}; they were written for"
            " other metrics. Evaluate again with this one in the specification."
        ) from error
