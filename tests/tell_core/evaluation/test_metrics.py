"""Metrics against their references: sacreBLEU, scikit-learn, and the plain definitions."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF
from sklearn import metrics as sk

from tell_core.errors import EvaluationError, InputError
from tell_core.evaluation.base import Metric, ScoredItem, normalised
from tell_core.evaluation.labels import LabelMetric
from tell_core.evaluation.metrics import METRICS, build_metric, build_metrics, metric_statistics
from tell_core.evaluation.overlap import edit_distance
from tell_core.evaluation.parsing import Answer, parse_answer
from tell_core.spec.model import EvaluationSpec, MetricSpec, ParseSpec

LABELS = ("yes", "no", "maybe")
TOLERANCE = 1e-9
few = settings(max_examples=40, deadline=None)

words = st.sampled_from(["a", "ab", "(ab)", "the", "cat.", "sat", "!", "-", "Ísland,", "5.5", "' "])
sentences = st.lists(words, max_size=9).map(" ".join)
text_pairs = st.lists(st.tuples(sentences, sentences), min_size=1, max_size=6)
label_pairs = st.lists(
    st.tuples(st.sampled_from([*LABELS, "other", None]), st.sampled_from(LABELS)),
    min_size=1,
    max_size=30,
)


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


def items_of(pairs: list[tuple[str | None, str]]) -> list[ScoredItem]:
    return [item(prediction, reference) for prediction, reference in pairs]


def metric_of(name: str, **options: Any) -> Metric:
    defaults = {"label_f1": {"positive": "yes", "labels": LABELS}}
    return build_metric(MetricSpec(name=name, **(defaults.get(name, {}) | options)))


def score(metric: Metric, items: list[ScoredItem]) -> float:
    return metric.score_from_items(metric.statistics(metric.payloads(items)))


@few
@given(text_pairs)
def test_bleu_equals_sacrebleu(pairs: list[tuple[str, str]]) -> None:
    predictions, references = zip(*pairs, strict=True)

    expected = BLEU().corpus_score(list(predictions), [list(references)]).score

    assert score(metric_of("bleu"), items_of(pairs)) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(("name", "word_order"), [("chrf", 0), ("chrf++", 2)])
@few
@given(pairs=text_pairs)
def test_chrf_equals_sacrebleu(name: str, word_order: int, pairs: list[tuple[str, str]]) -> None:
    predictions, references = zip(*pairs, strict=True)

    expected = CHRF(word_order=word_order).corpus_score(list(predictions), [list(references)]).score

    assert score(metric_of(name), items_of(pairs)) == pytest.approx(expected, abs=TOLERANCE)


@given(st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), min_size=1, max_size=4))
def test_bleu_and_chrf_equal_sacrebleu_on_any_text(pairs: list[tuple[str, str]]) -> None:
    predictions, references = map(list, zip(*pairs, strict=True))

    for name, oracle in (("bleu", BLEU()), ("chrf++", CHRF(word_order=2))):
        expected = oracle.corpus_score(predictions, [references]).score
        assert score(metric_of(name), items_of(pairs)) == pytest.approx(expected, abs=TOLERANCE)


def test_signatures_are_sacrebleus() -> None:
    signatures = {name: metric_of(name).signature for name in ("bleu", "chrf", "chrf++")}

    assert "tok:13a" in str(signatures["bleu"])
    assert "nc:6|nw:0" in str(signatures["chrf"])
    assert "nc:6|nw:2" in str(signatures["chrf++"])


SKLEARN: dict[str, Callable[[list[str], list[str]], float]] = {
    "accuracy": sk.accuracy_score,
    "mcc": sk.matthews_corrcoef,
    "balanced_accuracy": lambda gold, found: float(
        np.mean([np.mean([f == g for f, g in zip(found, gold, strict=True) if g == label])
                 for label in set(gold)])
    ),
    "macro_f1": lambda gold, found: sk.f1_score(
        gold, found, labels=sorted(set(gold)), average="macro", zero_division=0
    ),
    "label_f1": lambda gold, found: sk.f1_score(
        gold, found, labels=["yes"], average="macro", zero_division=0
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SKLEARN)
@pytest.mark.filterwarnings("ignore::UserWarning")
@few
@given(pairs=label_pairs)
def test_label_metrics_equal_scikit_learn(name: str, pairs: list[tuple[str | None, str]]) -> None:
    metric = metric_of(name, labels=LABELS)
    gold = [reference for _, reference in pairs]
    found = [label if label in LABELS else "no label" for label, _ in pairs]

    expected = SKLEARN[name](gold, found)

    assert score(metric, items_of(pairs)) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.filterwarnings("ignore::UserWarning")
@few
@given(label_pairs)
def test_balanced_accuracy_equals_scikit_learn_on_known_labels(
    pairs: list[tuple[str | None, str]],
) -> None:
    gold = [reference for _, reference in pairs]
    known = [(label if label in gold else gold[0], reference) for label, reference in pairs]

    expected = sk.balanced_accuracy_score(gold, [label for label, _ in known])

    assert score(metric_of("balanced_accuracy"), items_of(known)) == pytest.approx(expected)


@given(st.text(max_size=12), st.text(max_size=12))
def test_edit_distance_equals_its_definition(first: str, second: str) -> None:
    row = list(range(len(second) + 1))
    for i, character in enumerate(first, start=1):
        previous, row[0] = row[0], i
        for j, other in enumerate(second, start=1):
            previous, row[j] = (
                row[j],
                min(row[j] + 1, row[j - 1] + 1, previous + (character != other)),
            )

    assert edit_distance(first, second) == row[-1]


@given(st.text("ab", max_size=200), st.text("ab", max_size=200))
def test_edit_distance_of_long_texts_is_symmetric_and_bounded(first: str, second: str) -> None:
    distance = edit_distance(first, second)

    assert distance == edit_distance(second, first)
    assert abs(len(first) - len(second)) <= distance <= max(len(first), len(second))


any_items = st.lists(
    st.builds(
        item,
        st.sampled_from([*LABELS, "other words", None]),
        st.sampled_from(LABELS),
        nll=st.floats(0, 50),
        num_tokens=st.integers(1, 9),
        num_bytes=st.integers(0, 9),
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("name", sorted(METRICS))
@few
@given(items=any_items, data=st.data())
def test_weights_score_as_if_items_were_repeated(
    name: str, items: list[ScoredItem], data: st.DataObject
) -> None:
    metric = metric_of(name)
    statistics = metric.statistics(metric.payloads(items))
    counts = data.draw(st.lists(st.integers(0, 3), min_size=len(items), max_size=len(items)))
    assume(any(counts))

    repeated = metric.score_from_items(np.repeat(statistics, counts, axis=0))

    weighted = metric.scores_from_weights(statistics, np.asarray([counts, [1] * len(items)]))
    assert weighted[0] == pytest.approx(repeated, abs=TOLERANCE)
    assert weighted[1] == pytest.approx(metric.score_from_items(statistics), abs=TOLERANCE)


@pytest.mark.parametrize("name", sorted(METRICS))
@few
@given(items=any_items)
def test_scores_are_finite_and_do_not_depend_on_the_order_of_items(
    name: str, items: list[ScoredItem]
) -> None:
    metric = metric_of(name)

    forward, backward = score(metric, items), score(metric, items[::-1])

    assert math.isfinite(forward)
    assert forward == pytest.approx(backward, abs=TOLERANCE)


@pytest.mark.parametrize("name", sorted(METRICS))
@given(items=any_items)
@few
def test_item_scores_are_scores_of_the_item_alone(name: str, items: list[ScoredItem]) -> None:
    metric = metric_of(name)
    statistics = metric.statistics(metric.payloads(items))

    own = metric.item_scores(statistics)

    alone = [metric.score_from_items(statistics[i : i + 1]) for i in range(len(items))]
    expected = alone if metric.has_item_scores else [None] * len(items)
    assert own == expected


@pytest.mark.parametrize(
    "name", [n for n in sorted(METRICS) if n != "json_valid" and METRICS[n].needs_generation]
)
def test_unparsable_prediction_is_worse_than_the_right_answer(name: str) -> None:
    over_labels = issubclass(METRICS[name], LabelMetric)
    texts = list(LABELS) if over_labels else ["this is one long enough text", "this is another"]
    metric = metric_of(name)

    right = score(metric, items_of([(text, text) for text in texts]))
    unparsed = score(metric, items_of([(None, texts[0]), *[(text, text) for text in texts[1:]]]))

    assert right > unparsed if metric.higher_is_better else right < unparsed


def test_nothing_to_score_is_not_a_number() -> None:
    metric = metric_of("accuracy")

    assert math.isnan(metric.score_from_items(metric.statistics([])))
    assert math.isnan(metric.scores_from_weights(np.ones((2, 9)), np.zeros((1, 2)))[0])


def test_exact_match_ignores_case_and_punctuation_only_when_normalised() -> None:
    items = items_of([("Yes,  it is.", "yes it is"), ("no", "no")])

    assert score(metric_of("exact_match"), items) == 0.5
    assert score(metric_of("exact_match", normalise=True), items) == 1.0


def test_text_of_punctuation_alone_stays_itself_when_normalised() -> None:
    assert normalised(" ?! ") == "?!"


def test_json_valid_wants_the_whole_text_to_be_an_object() -> None:
    parse = ParseSpec(kind="json", field="x")
    texts = ['{"x": 1}', '{"y": 1}', 'well: {"x": 1}', "no"]
    items = [
        ScoredItem("i", parse_answer(text, parse), Answer("1", True), {}, 1.0, 1, 1)
        for text in texts
    ]

    assert score(metric_of("json_valid"), items) == 0.5


def test_log_probability_is_averaged_over_items_not_tokens() -> None:
    items = [item("", "", nll=2.0, num_tokens=1), item("", "", nll=8.0, num_tokens=8, num_bytes=0)]

    assert score(metric_of("log_probability"), items) == pytest.approx(-1.5)
    assert score(metric_of("log_probability_per_byte"), items) == pytest.approx(-5.0)


def test_reference_label_comes_from_the_named_column() -> None:
    items = [item("1", "ignored", gold=1), item("true", "ignored", gold=True)]

    assert score(metric_of("accuracy", field="gold"), items) == 1.0


def test_reference_label_outside_labels_is_refused_with_the_item() -> None:
    with pytest.raises(InputError, match=r"test-0 is 'yes', which is none of `labels` \(A, B\)"):
        metric_of("accuracy", labels=("A", "B")).payloads(items_of([("A", "yes")]))


def test_positive_label_that_never_occurs_is_refused() -> None:
    metric = build_metric(MetricSpec(name="label_f1", positive="Yes"))

    with pytest.raises(InputError, match="no reference is 'Yes'; the labels are no, yes"):
        metric.payloads(items_of([("no", "no"), ("yes", "yes")]))


def test_reference_without_answer_is_refused() -> None:
    missing = ScoredItem("test-7", None, Answer(None, False), {}, 1.0, 1, 1)

    with pytest.raises(InputError, match="test item test-7 has no reference answer"):
        metric_of("exact_match").payloads([missing])


def test_label_f1_without_positive_is_refused() -> None:
    with pytest.raises(InputError, match="add `positive`"):
        build_metric(MetricSpec(name="label_f1"))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("exactmatch", "exact_match"), ("CHRF++", "chrf++"), ("label-f1", "label_f1")],
)
def test_unknown_metric_names_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(InputError, match=f"did you mean '{right.replace('+', '[+]')}'"):
        build_metric(MetricSpec(name=wrong))


def test_option_without_meaning_is_refused() -> None:
    with pytest.raises(InputError, match="'bleu' has no use for `positive`; it takes `field`"):
        build_metric(MetricSpec(name="bleu", positive="yes"))


def test_log_probabilities_are_always_there_and_once() -> None:
    asked = EvaluationSpec(metrics=("log_probability", "chrf"))  # type: ignore[arg-type]

    names = [metric.name for metric in build_metrics(asked)]

    assert names == ["log_probability", "chrf", "general_log_probability"]


def test_metric_asked_twice_is_refused() -> None:
    asked = EvaluationSpec(metrics=("chrf", "chrf"))  # type: ignore[arg-type]

    with pytest.raises(InputError, match="'chrf' is asked for twice"):
        build_metrics(asked)


def test_label_metric_over_whole_json_objects_is_refused() -> None:
    asked = EvaluationSpec(metrics=("mcc",), parse=ParseSpec(kind="json"))  # type: ignore[arg-type]

    with pytest.raises(InputError, match="add the key that holds the label"):
        build_metrics(asked)


def test_statistics_of_a_metric_that_was_not_computed_are_refused() -> None:
    with pytest.raises(EvaluationError, match="no statistics of metric 'chrf'"):
        metric_statistics(metric_of("chrf"), [{"stats": {"bleu": [1]}}])
