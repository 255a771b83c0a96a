"""COMET and BLEURT, with stand-ins that check how they are called."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tell_core.errors import InputError
from tell_core.evaluation.base import ScoredItem
from tell_core.evaluation.learned import _bleurt_scorer, _comet_model
from tell_core.evaluation.parsing import Answer
from tests.tell_core.evaluation.examples import items_of, metric_of, score


def translation(prediction: str | None, **extra: Any) -> ScoredItem:
    return ScoredItem(
        "test-0",
        Answer(prediction, False),
        Answer("Hallo", False),
        extra,
        1.0,
        1,
        1,
        prompt="Hello",
    )


@pytest.fixture
def comet(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for the package; the rows that it was asked about."""
    asked: list[dict[str, Any]] = []

    class Model:
        def predict(
            self, samples: list[dict[str, str]], batch_size: int, gpus: int, progress_bar: bool
        ) -> Any:
            asked.extend(samples)
            return SimpleNamespace(scores=[len(row["mt"]) / 10 for row in samples])

    package = ModuleType("comet")
    package.download_model = lambda name: f"cache/{name}"  # type: ignore[attr-defined]
    package.load_from_checkpoint = lambda path: Model()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comet", package)
    _comet_model.cache_clear()
    return asked


def test_comet_gets_source_prediction_and_reference(comet: list[dict[str, Any]]) -> None:
    metric = metric_of("comet")

    value = score(metric, [translation("Hallo"), translation(None, source="Hello there")])

    assert value == pytest.approx(0.25)
    assert comet == [
        {"src": "Hello", "mt": "Hallo", "ref": "Hallo"},
        {"src": "Hello there", "mt": "", "ref": "Hallo"},
    ]
    assert metric.signature == "model:Unbabel/wmt22-comet-da"


def test_bleurt_gets_references_and_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scorer:
        def __init__(self, checkpoint: str) -> None:
            assert checkpoint == "BLEURT-20"

        def score(self, *, references: list[str], candidates: list[str], batch_size: int) -> Any:
            return [float(a == b) for a, b in zip(references, candidates, strict=True)]

    module = ModuleType("bleurt.score")
    module.BleurtScorer = Scorer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bleurt", ModuleType("bleurt"))
    monkeypatch.setitem(sys.modules, "bleurt.score", module)
    _bleurt_scorer.cache_clear()

    assert score(metric_of("bleurt"), items_of([("a", "a"), (None, "b")])) == 0.5


@pytest.mark.parametrize(("name", "module"), [("comet", "comet"), ("bleurt", "bleurt.score")])
def test_missing_package_is_found_before_anything_is_trained(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(InputError, match=f"metric '{name}' needs a package.*pip install"):
        metric_of(name).check_references(items_of([(None, "a")]))


def test_missing_checkpoint_is_found_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "bleurt.score", ModuleType("bleurt.score"))
    monkeypatch.chdir(tmp_path)

    with pytest.raises(InputError, match=r"no directory .*BLEURT-20"):
        metric_of("bleurt").check_references(items_of([(None, "a")]))


def test_check_loads_no_model_but_wants_references(comet: list[dict[str, Any]]) -> None:
    metric_of("comet").check_references(items_of([(None, "a")]))

    assert comet == []
    with pytest.raises(InputError, match="test-0 has no reference answer"):
        missing = ScoredItem("test-0", None, Answer(None, False), {}, 1.0, 1, 1)
        metric_of("comet").check_references([missing])
