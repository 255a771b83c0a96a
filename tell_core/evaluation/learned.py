"""Metrics that are models themselves: COMET and BLEURT, each a package to be installed apart."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from tell_core.errors import InputError
from tell_core.evaluation.base import MeanMetric, Payload, ScoredItem
from tell_core.evaluation.extras import optional_module
from tell_core.evaluation.parsing import value_text

COMET_MODEL = "Unbabel/wmt22-comet-da"
BLEURT_CHECKPOINT = "BLEURT-20"
_BATCH_SIZE = 16


class Sentence(NamedTuple):
    """What such a model looks at."""

    source: str
    prediction: str
    reference: str


class LearnedMetric(MeanMetric):
    """The mean over items of what a model says of prediction and reference.

    Each item has a score of its own, so that intervals are computed as for every other metric. An
    unparsable prediction counts as the empty text. The scale is the model's.

    Attributes:
        checkpoint: The model.
        module: What is imported.
        install: How to get it.
    """

    limits = (-math.inf, math.inf)
    checkpoint: ClassVar[str]
    module: ClassVar[str]
    install: ClassVar[str]

    @property
    def signature(self) -> str:
        """The model."""
        return f"model:{self.checkpoint}"

    def payloads(self, items: Sequence[ScoredItem]) -> list[Payload]:
        """The model's score of each item."""
        sentences = [
            Sentence(
                source=value_text(item.extra.get("source")) or item.prompt,
                prediction=item.predicted_text or "",
                reference=self._reference(item),
            )
            for item in items
        ]
        return [[float(score)] for score in self._scores(sentences)]

    def check_references(self, items: Sequence[ScoredItem]) -> None:
        """See that the package is installed and every item has a reference; loads no model."""
        self._package()
        for item in items:
            self._reference(item)

    def _value(self, item: ScoredItem) -> float:
        return float(self.payloads([item])[0][0])

    def _package(self) -> Any:
        """The package, imported.

        Raises:
            InputError: It is not installed.
        """
        return optional_module(self.module, f"metric {self.name!r}", self.install)

    @abstractmethod
    def _scores(self, sentences: Sequence[Sentence]) -> Sequence[float]:
        """A score for each prediction."""


class Comet(LearnedMetric):
    """COMET (Rei et al. 2022), model wmt22-comet-da: translation, with the source beside it.

    The source is column ``source`` of the test data where there is one, else the bare prompt. The
    model comes from the Hugging Face hub, or offline from its cache; about 2.3 GB.
    """

    name = "comet"
    checkpoint = COMET_MODEL
    module = "comet"
    install = "pip install unbabel-comet"

    def _scores(self, sentences: Sequence[Sentence]) -> Sequence[float]:
        import torch

        rows = [{"src": s.source, "mt": s.prediction, "ref": s.reference} for s in sentences]
        predicted = _comet_model(self._package(), self.checkpoint).predict(
            rows,
            batch_size=_BATCH_SIZE,
            gpus=int(torch.cuda.is_available()),
            progress_bar=False,
        )
        return list(predicted.scores)


class Bleurt(LearnedMetric):
    """BLEURT (Sellam et al. 2020), checkpoint BLEURT-20, which lies in the working directory."""

    name = "bleurt"
    checkpoint = BLEURT_CHECKPOINT
    module = "bleurt.score"
    install = "pip install git+https://github.com/google-research/bleurt"

    def check_references(self, items: Sequence[ScoredItem]) -> None:
        """See that package and checkpoint are there and every item has a reference."""
        super().check_references(items)
        if not Path(self.checkpoint).is_dir():
            raise InputError(
                f"metric 'bleurt': there is no directory {Path(self.checkpoint).absolute()}; fetch"
                f" the checkpoint {self.checkpoint} that BLEURT's authors publish and unpack it"
                " there"
            )

    def _scores(self, sentences: Sequence[Sentence]) -> Sequence[float]:
        scorer = _bleurt_scorer(self._package(), self.checkpoint)
        scores = scorer.score(
            references=[sentence.reference for sentence in sentences],
            candidates=[sentence.prediction for sentence in sentences],
            batch_size=_BATCH_SIZE,
        )
        return list(scores)


@lru_cache(maxsize=1)
def _comet_model(comet: Any, name: str) -> Any:
    return comet.load_from_checkpoint(comet.download_model(name))


@lru_cache(maxsize=1)
def _bleurt_scorer(score: Any, checkpoint: str) -> Any:
    return score.BleurtScorer(checkpoint)
