"""Measuring a model on its items: the texts it writes, the log-probability of gold responses.

The half of an evaluation that needs the model. What the texts are worth is computed afterwards, by
`scoring`, from what is kept here: neither metrics nor their libraries are needed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch
from torch import nn

from tell_core.data.encoding import EncodedExamples
from tell_core.errors import DataError, EvaluationError
from tell_core.evaluation.base import FloatArray, ScoredItem
from tell_core.evaluation.generation import Counted, Decoding, Request, generate
from tell_core.evaluation.items import ItemSet, load_items
from tell_core.evaluation.likelihood import gold_nll
from tell_core.evaluation.subject import Subject
from tell_core.store import read_json, write_json
from tell_core.training.devices import (
    DeviceName,
    DtypeName,
    cpu_threads,
    exclusive_device,
    resolve_device,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tell_core.spec.model import EvaluationSpec

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

MEASURED_FILE = "measured.json"


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
class Measured:
    """What a model did with its items.

    Attributes:
        texts: Answers to the test items, a list per repeat; none when nothing was generated.
        nll: By kind of items, shape (N,): of the gold responses, in nats.
        harness: By kind of items: items of the harness.
    """

    texts: list[list[str]]
    nll: dict[str, FloatArray]
    harness: dict[str, list[ScoredItem]]

    def save(self, path: Path) -> None:
        """Write as JSON, in which every float is read back as it was.

        Raises:
            EvaluationError: There are items of the harness, which only the harness can score.
        """
        if self.harness:
            raise EvaluationError("items of lm-evaluation-harness cannot be kept for later")
        nll = {kind: values.tolist() for kind, values in self.nll.items()}
        write_json(path, {"texts": self.texts, "nll": nll})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        kept = read_json(path)
        nll = {kind: np.asarray(values, dtype=np.float64) for kind, values in kept["nll"].items()}
        return cls(kept["texts"], nll, {})


def measure_cell(
    *,
    model_path: str,
    revision: str | None,
    inputs: Path,
    trained: Path | None,
    evaluation: EvaluationSpec,
    needs_text: bool,
    out: Path,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    threads: int = 1,
    on_progress: Progress | None = None,
) -> None:
    """Measure one cell and keep what was measured in ``out``, to be scored elsewhere.

    Args:
        model_path: Directory or hub id of the base model.
        revision: Commit, tag or branch on the hub.
        inputs: Directory with the items and the probe set.
        trained: Directory of the train stage; None measures the base model.
        evaluation: Decoding, batch size and longest answer.
        needs_text: Whether a metric looks at generated text.
        out: Directory to write measured.json into; created when missing.
        dtype: Number format, as in training.
        device: Where to compute.
        threads: CPU threads.
        on_progress: As of `scoring.evaluate_cell`.

    Raises:
        InputError: An item has no usable limit, or vLLM is asked for and not installed.
        DataError: An item does not fit into the model's context.
        ModelError: The model or what was trained cannot be loaded.
        EvaluationError: Memory ran out, the weights give no finite log-probability, or tasks of
            the harness are asked for.
    """
    sets = load_items(inputs)
    place = resolve_device(device)
    subject = Subject(model_path, revision, trained, dtype, place, None)
    with exclusive_device(place), cpu_threads(threads), explained_shortage(evaluation):
        measured = measure(subject, sets, evaluation, needs_text, on_progress)
    out.mkdir(parents=True, exist_ok=True)
    measured.save(out / MEASURED_FILE)


def measure(
    subject: Subject,
    sets: Mapping[str, ItemSet],
    evaluation: EvaluationSpec,
    needs_text: bool,
    on_progress: Progress | None,
) -> Measured:
    """Have the model write, and measure what it gives the gold responses.

    Args:
        subject: The model.
        sets: Items by kind, as of `items.load_items`.
        evaluation: Decoding, batch size, longest answer, tasks of the harness.
        needs_text: Whether text is generated at all.
        on_progress: Called with the phase, items done and items in all.
    """
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
        harness = _harness_items(model, tokenizer, evaluation, on_progress)
    return Measured(texts, nll, harness)


def _harness_items(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    evaluation: EvaluationSpec,
    on_progress: Progress | None,
) -> dict[str, list[ScoredItem]]:
    if not evaluation.harness:
        return {}
    from tell_core.evaluation.harness import run_harness

    return run_harness(
        model,
        tokenizer,
        evaluation.harness,
        batch_size=evaluation.batch_size,
        on_progress=_counted(on_progress, "running harness"),
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
def explained_shortage(evaluation: EvaluationSpec) -> Iterator[None]:
    """Say which setting needs less memory.

    Raises:
        EvaluationError: The GPU's memory ran out.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EvaluationError(
            f"the GPU's memory ran out while evaluating {evaluation.batch_size} items side by"
            " side; lower `evaluation.batch_size`, the scores stay the same."
        ) from error


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
