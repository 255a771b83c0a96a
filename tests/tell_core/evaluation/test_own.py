"""A metric of the user's own."""

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tell_core.errors import InputError
from tell_core.evaluation.metrics import build_metric, build_metrics, metric_identity
from tell_core.spec.model import EvaluationSpec, MetricSpec
from tests.tell_core.evaluation.examples import item, items_of, score

Module = Callable[[str], str]
OVERLAP = """
def overlap(prediction, reference):
    found, gold = set((prediction or "").split()), set(reference.split())
    return len(found & gold) / len(gold)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Module:
    """Writes a module into the working directory and returns its name."""
    monkeypatch.chdir(tmp_path)
    name = "own_" + tmp_path.name.replace("-", "_")

    def write(source: str) -> str:
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        return name

    return write


def test_function_in_the_working_directory_is_the_metric(module: Module) -> None:
    metric = build_metric(MetricSpec(name=f"{module(OVERLAP)}:overlap"))

    value = score(metric, items_of([("a b", "a b c d"), (None, "a")]))

    assert metric.name == "overlap"
    assert value == 0.25
    assert metric.higher_is_better


def test_direction_and_reference_column_are_options(module: Module) -> None:
    spec = MetricSpec(name=f"{module(OVERLAP)}:overlap", higher_is_better=False, field="gold")

    metric = build_metric(spec)

    assert not metric.higher_is_better
    assert score(metric, [item("a", "ignored", gold="a")]) == 1.0


def test_module_that_does_not_exist_is_explained(module: Module, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"no module 'not_there'.* as not_there.py in {tmp_path}"):
        build_metric(MetricSpec(name="not_there:overlap"))


def test_function_that_does_not_exist_lists_those_that_do(module: Module) -> None:
    name = module(OVERLAP)

    with pytest.raises(InputError, match="has no function 'overlp'; it has overlap"):
        build_metric(MetricSpec(name=f"{name}:overlp"))


def test_module_that_cannot_be_imported_is_explained(module: Module) -> None:
    name = module("import not_there_either")

    with pytest.raises(InputError, match=r"cannot be imported .*not_there_either"):
        build_metric(MetricSpec(name=f"{name}:overlap"))


@pytest.mark.parametrize("value", ["'good'", "None", "float('nan')", "[1.0]"])
def test_wrong_return_value_names_the_item(module: Module, value: str) -> None:
    name = module(f"def wrong(prediction, reference):\n    return {value}\n")
    metric = build_metric(MetricSpec(name=f"{name}:wrong"))

    with pytest.raises(InputError, match=r"returned .* for test item test-0; needed: a finite"):
        metric.check_references(items_of([(None, "a")]))


def test_failing_function_names_the_item(module: Module) -> None:
    name = module("def fail(prediction, reference):\n    return len(prediction)\n")
    metric = build_metric(MetricSpec(name=f"{name}:fail"))

    with pytest.raises(InputError, match=r"failed on test item test-0 \(TypeError"):
        metric.payloads(items_of([(None, "a")]))


def test_name_of_a_known_metric_is_refused(module: Module) -> None:
    name = module("def bleu(prediction, reference):\n    return 0.0\n")

    with pytest.raises(InputError, match=r"would be called 'bleu'.* give your function another"):
        build_metric(MetricSpec(name=f"{name}:bleu"))


def test_options_that_mean_nothing_to_it_are_refused(module: Module) -> None:
    with pytest.raises(InputError, match="no use for `positive`; it takes `field`, `higher_is"):
        build_metric(MetricSpec(name=f"{module(OVERLAP)}:overlap", positive="yes"))


def test_two_functions_of_one_name_are_refused(module: Module) -> None:
    name = module(OVERLAP + "\n\nclass again:\n    overlap = overlap\n")
    specs = (MetricSpec(name=f"{name}:overlap"), MetricSpec(name=f"{name}:overlap", field="gold"))

    with pytest.raises(InputError, match="'overlap' is asked for twice"):
        build_metrics(EvaluationSpec(metrics=specs))


def test_identity_follows_the_source(module: Module, tmp_path: Path) -> None:
    name = module(OVERLAP)
    evaluation = EvaluationSpec(metrics=(MetricSpec(name=f"{name}:overlap"),))
    before = metric_identity(evaluation)

    (tmp_path / f"{name}.py").write_text(OVERLAP + "# changed\n")

    assert list(before["metrics"]) == [f"{name}:overlap"]
    assert metric_identity(evaluation) != before
    assert metric_identity(EvaluationSpec()) == {}


def test_module_without_a_file_has_no_identity() -> None:
    evaluation = EvaluationSpec(metrics=(MetricSpec(name="sys:intern"),))

    with pytest.raises(InputError, match="module 'sys' has no file of its own"):
        metric_identity(evaluation)
