"""The metrics by name, and what holds for all of them."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tell_core.errors import EvaluationError, InputError
from tell_core.evaluation.base import ScoredItem, items_file, normalised
from tell_core.evaluation.labels import LabelMetric
from tell_core.evaluation.metrics import METRICS, build_metric, build_metrics, metric_statistics
from tell_core.evaluation.parsing import Answer, parse_answer
from tell_core.spec.model import EvaluationSpec, MetricSpec, ParseSpec
from tests.tell_core.evaluation.examples import LABELS, TOLERANCE, item, items_of, metric_of, score

few = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

OBJECTS = ('{"a": 1, "b": ["x", "y"]}', '{"a": 2}', '{"c": "x"}')
REFERENCES: dict[str, tuple[str, ...]] = {
    "json_field_f1": OBJECTS,
    "slot_f1": OBJECTS,
    "entity_f1": ("B-a I-a O B-b", "O", "B-b B-a"),
}


@pytest.fixture(autouse=True)
def _learned_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for COMET and BLEURT: the share of characters that are right."""

    def share(text: str, reference: str) -> float:
        same = sum(a == b for a, b in zip(text, reference, strict=False))
        return same / max(len(text), len(reference), 1)

    def predict(rows: list[dict[str, str]], **_: Any) -> Any:
        return SimpleNamespace(scores=[share(row["mt"], row["ref"]) for row in rows])

    model = SimpleNamespace(predict=predict)
    for package, name in (("comet", "_comet_model"), ("bleurt.score", "_bleurt_scorer")):
        monkeypatch.setitem(__import__("sys").modules, package, SimpleNamespace())
        monkeypatch.setattr(f"tell_core.evaluation.learned.{name}", lambda *_: model)
    model.score = lambda references, candidates, **_: list(map(share, candidates, references))


def items_for(name: str) -> st.SearchStrategy[list[ScoredItem]]:
    """Items with references that fit the metric, and predictions that may not."""
    references = REFERENCES.get(name, LABELS)
    return st.lists(
        st.builds(
            item,
            st.sampled_from([*references, "other words", None]),
            st.sampled_from(references),
            nll=st.floats(0, 50),
            num_tokens=st.integers(1, 9),
            num_bytes=st.integers(0, 9),
        ),
        min_size=1,
        max_size=12,
    )


@pytest.mark.parametrize("name", sorted(METRICS))
@few
@given(data=st.data())
def test_weights_score_as_if_items_were_repeated(name: str, data: st.DataObject) -> None:
    items, metric = data.draw(items_for(name)), metric_of(name)
    statistics = metric.statistics(metric.payloads(items))
    counts = data.draw(st.lists(st.integers(0, 3), min_size=len(items), max_size=len(items)))
    assume(any(counts))

    repeated = metric.score_from_items(np.repeat(statistics, counts, axis=0))

    weighted = metric.scores_from_weights(statistics, np.asarray([counts, [1] * len(items)]))
    assert weighted[0] == pytest.approx(repeated, abs=TOLERANCE)
    assert weighted[1] == pytest.approx(metric.score_from_items(statistics), abs=TOLERANCE)


@pytest.mark.parametrize("name", sorted(METRICS))
@few
@given(data=st.data())
def test_scores_are_finite_and_do_not_depend_on_the_order_of_items(
    name: str, data: st.DataObject
) -> None:
    items, metric = data.draw(items_for(name)), metric_of(name)

    forward, backward = score(metric, items), score(metric, items[::-1])

    assert math.isfinite(forward)
    assert forward == pytest.approx(backward, abs=TOLERANCE)


@pytest.mark.parametrize("name", sorted(METRICS))
@few
@given(data=st.data())
def test_item_scores_are_scores_of_the_item_alone(name: str, data: st.DataObject) -> None:
    items, metric = data.draw(items_for(name)), metric_of(name)
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
    texts = ["this is one long enough text", "this is another"]
    texts = list(REFERENCES.get(name, LABELS if over_labels else texts))
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

    assert names == [
        "log_probability", "chrf", "general_log_probability", "retention_log_probability",
    ]  # fmt: skip


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


def test_direction_of_a_known_metric_cannot_be_set() -> None:
    with pytest.raises(InputError, match="'bleu' has no use for `higher_is_better`"):
        build_metric(MetricSpec(name="bleu", higher_is_better=False))


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("test", "predictions.jsonl"),
        ("general", "general_items.jsonl"),
        ("retention", "retention_items.jsonl"),
        ("harness/arc_easy", "harness_arc_easy.jsonl"),
        ("harness/a b/ü:c", "harness_a_b___c.jsonl"),
    ],
)
def test_each_kind_of_items_has_a_file(kind: str, file: str) -> None:
    assert items_file(kind) == file


def test_every_metric_is_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")

    assert [name for name in METRICS if f"`{name}`" not in page] == []
