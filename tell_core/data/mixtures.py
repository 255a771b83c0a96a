"""Mixtures: what one cell trains on, in which order, and what it is probed and tested on.

`plan_cell` and `build_cell_inputs` choose, order and count with the same code, so that the ledger
shown before a run is the ledger of the run.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tell_core.data.anchors import Anchor, apply_anchor, random_anchor
from tell_core.data.budgets import choice_order, select_from_sources, select_within_budget
from tell_core.data.corpus import Corpus, parse_extra
from tell_core.data.encoding import (
    EncodedExamples,
    IntArray,
    Mixture,
    concatenate,
    from_lists,
)
from tell_core.data.orders import build_order, repeated_order, shuffle_proof
from tell_core.data.rendering import ChatRenderer, Example, label_mask_pieces, with_shots
from tell_core.data.seeding import choose_rows
from tell_core.errors import DataError
from tell_core.spec.arms import Arm, TaskAnchor, parse_arm
from tell_core.spec.cells import Cell
from tell_core.spec.model import ExperimentSpec
from tell_core.store import write_json, write_text

Ledger = dict[str, Any]
_NO_ROWS = np.empty(0, dtype=np.int64)
_NUM_SAMPLES = 2
_MAX_LISTED = 5


def plan_cell(spec: ExperimentSpec, cell: Cell, curated: Path, renderer: ChatRenderer) -> Ledger:
    """The token ledger of a cell, exactly, without writing anything.

    Args:
        spec: The experiment.
        cell: The cell.
        curated: Directory written by `curate`.
        renderer: Renderer of the base model.

    Returns:
        The content of ``ledger.json``.

    Raises:
        TokenBudgetError: A budget holds no example.
    """
    return _CellData(spec, cell, curated, renderer).ledger()


def build_cell_inputs(
    spec: ExperimentSpec,
    cell: Cell,
    curated: Path,
    renderer: ChatRenderer,
    out: Path,
    num_steps: int | None = None,
) -> Ledger:
    """Write everything that training and evaluating one cell reads.

    Args:
        spec: The experiment.
        cell: The cell.
        curated: Directory written by `curate`.
        renderer: Renderer of the base model.
        out: Existing directory for ``mixture.safetensors`` (trained arms only),
            ``probe.safetensors``, ``test.safetensors`` and the JSON files beside them.
        num_steps: Optimiser steps of an arm that repeats its task data; None takes those of
            `tell` at the same budgets and seed.

    Returns:
        The content of ``ledger.json``.

    Raises:
        TokenBudgetError: A budget holds no example.
        DataError: Examples without a supervised token, listed.
    """
    data = _CellData(spec, cell, curated, renderer, num_steps)
    ledger = data.ledger()
    mixture = data.mixture() if data.arm.is_trained else None
    if mixture is not None:
        _write_mixture(mixture, out)
    _write_test(data, out)
    _write_probe(data, out)
    _write_samples(mixture, data, out)
    write_json(out / "ledger.json", ledger)
    return ledger


@dataclass(frozen=True)
class _CellData:
    """Choice, order and rendering of one cell's data; each part is computed once, when needed."""

    spec: ExperimentSpec
    cell: Cell
    curated: Path
    renderer: ChatRenderer
    num_steps: int | None = None

    @cached_property
    def arm(self) -> Arm:
        return parse_arm(self.cell.arm)

    @cached_property
    def anchor(self) -> Anchor:
        return Anchor.load(self.curated / "anchor.json")

    @cached_property
    def random_text(self) -> str:
        if self.arm.task_anchor != "random":
            return ""
        return random_anchor(self.renderer.tokenizer, self.anchor.num_tokens, self.cell.seed)

    @cached_property
    def task_pool(self) -> Corpus:
        return Corpus(self.curated / "task_train.parquet")

    @cached_property
    def general_pool(self) -> Corpus:
        return Corpus(self.curated / "general.parquet")

    @cached_property
    def task_rows(self) -> IntArray:
        """Rows of the task pool, in order of choice: the same for all arms with equal budget."""
        if self.arm.has_shots:
            order = choice_order(self.task_pool.num_examples, self.cell.seed)
            return order[: self.spec.evaluation.num_shots]
        if not self.arm.uses_task:
            return _NO_ROWS
        assert self.cell.task_budget_tokens is not None, "the arm uses task data"
        return select_within_budget(
            self.task_pool.num_tokens, self.cell.task_budget_tokens, self.cell.seed
        )

    @cached_property
    def budget_general_rows(self) -> IntArray:
        """Rows of the general pool within the general budget, whether the arm uses them or not."""
        if self.cell.general_budget_tokens is None:
            return _NO_ROWS
        return select_from_sources(
            self.general_pool.num_tokens,
            self.general_pool.sources,
            {source.name: source.weight for source in self.spec.general},
            self.cell.general_budget_tokens,
            self.cell.seed,
        )

    @cached_property
    def general_rows(self) -> IntArray:
        return self.budget_general_rows if self.arm.uses_general else _NO_ROWS

    @cached_property
    def order(self) -> IntArray:
        """Shape (M,). Empty for untrained arms."""
        num_task, num_general = len(self.task_rows), len(self.general_rows)
        if not self.arm.is_trained:
            return np.empty(0, dtype=np.int32)
        if self.arm.matches_steps:
            return repeated_order(num_task, self._matched_positions(), self.cell.seed)
        return build_order(
            self.arm.order,
            num_task,
            num_general,
            self.spec.training.epochs,
            self.cell.seed,
            self.arm.num_blocks,
        )

    def _matched_positions(self) -> int:
        """Positions of a training with as many steps as `tell` has."""
        if self.num_steps is not None:
            return self.num_steps * self.spec.training.batch_size
        num_mixture = len(self.task_rows) + len(self.budget_general_rows)
        return self.spec.training.epochs * num_mixture

    def as_seen(self, examples: Sequence[Example], kind: TaskAnchor) -> list[Example]:
        """Examples with instruction or anchor prompt on them, as the arm sees them."""
        seen = []
        for example in examples:
            system, prompt = apply_anchor(
                kind, self.anchor, example.prompt, example.system, self.random_text
            )
            seen.append(example._replace(system=system, prompt=prompt))
        return seen

    def task_examples(self, pool: Corpus, rows: IntArray) -> list[Example]:
        """Task examples as the arm sees them."""
        return self.as_seen(pool.examples(rows), self.arm.task_anchor)

    @cached_property
    def shots(self) -> list[Example]:
        """Solved examples that stand in every test prompt."""
        return self.task_examples(self.task_pool, self.task_rows) if self.arm.has_shots else []

    @cached_property
    def encoded_task(self) -> EncodedExamples:
        """The chosen task examples as the arm sees them."""
        examples = self.task_examples(self.task_pool, self.task_rows)
        return from_lists(self.renderer.encode(examples), is_task=True)

    @cached_property
    def encoded_anchored_general(self) -> EncodedExamples:
        """The chosen general examples with the anchor prompt on them."""
        examples = self.as_seen(self.general_pool.examples(self.general_rows), "anchor")
        return from_lists(self.renderer.encode(examples), is_task=False)

    def mixture(self) -> Mixture:
        """Task examples, then general ones, and the order over them."""
        if self.arm.anchors_general:
            general = self.encoded_anchored_general
        else:
            general = self.general_pool.encoded(self.general_rows, is_task=False)
        examples = concatenate([self.encoded_task, general])
        _require_supervised(examples, self._names())
        return Mixture(examples, self.order)

    def _names(self) -> list[str]:
        """Source and line of every example of the mixture."""
        parts = ((self.task_pool, self.task_rows), (self.general_pool, self.general_rows))
        return [
            f"{record['file']}, line {record['line']}"
            for pool, rows in parts
            if len(rows)
            for record in pool.records(rows, ("file", "line"))
        ]

    def _general_sizes(self) -> tuple[IntArray, IntArray]:
        """Tokens and supervised tokens of each chosen general example as rendered."""
        if self.arm.anchors_general:
            encoded = self.encoded_anchored_general
            return encoded.lengths, encoded.supervised_counts
        pool, rows = self.general_pool, self.general_rows
        if not len(rows):
            return _NO_ROWS, _NO_ROWS
        return pool.num_tokens[rows], pool.num_response_tokens[rows]

    def ledger(self) -> Ledger:
        """What is available, chosen, rendered and supervised, in tokens."""
        cell, task, general = self.cell, self.task_pool, self.general_pool
        num_task = len(self.task_rows)
        general_lengths, general_supervised = self._general_sizes()
        lengths = np.concatenate([self.encoded_task.lengths, general_lengths])
        supervised = np.concatenate([self.encoded_task.supervised_counts, general_supervised])
        visits = np.bincount(self.order, minlength=len(lengths))
        return {
            "task_budget_tokens": cell.task_budget_tokens,
            "task_tokens": int(task.num_tokens[self.task_rows].sum()),
            "task_available_tokens": int(task.num_tokens.sum()),
            "task_rendered_tokens": self.encoded_task.num_tokens,
            "num_task_examples": num_task,
            "general_budget_tokens": cell.general_budget_tokens,
            "general_tokens": int(general.num_tokens[self.general_rows].sum()),
            "general_available_tokens": int(general.num_tokens.sum()),
            "num_general_examples": len(self.general_rows),
            "supervised_tokens": int((visits * supervised).sum()),
            "rendered_tokens": int((visits * lengths).sum()),
            "task_epochs": float(visits[:num_task].mean()) if num_task else 0.0,
            "steps": math.ceil(len(self.order) / self.spec.training.batch_size),
            "epochs": len(self.order) / len(lengths) if len(self.order) else 0.0,
        }


def _require_supervised(examples: EncodedExamples, names: Sequence[str]) -> None:
    empty = [name for name, n in zip(names, examples.supervised_counts, strict=True) if n < 1]
    if empty:
        shown = "; ".join(empty[:_MAX_LISTED])
        raise DataError(
            f"{len(empty)} examples have no token to learn from (empty response): {shown}."
            " Mend or remove those rows."
        )


def _write_mixture(mixture: Mixture, out: Path) -> None:
    mixture.save(out / "mixture.safetensors")
    first_epoch = mixture.order[: len(mixture.examples)]
    proof = shuffle_proof(first_epoch, mixture.examples.is_task)
    write_json(out / "shuffle_proof.json", proof)


def _write_test(data: _CellData, out: Path) -> None:
    """Test items as the arm sees task prompts; the same items for every cell."""
    pool = Corpus(data.curated / "task_test.parquet")
    limit, seed = data.spec.evaluation.max_items, data.spec.curation.seed
    rows = choose_rows(pool.example_ids, limit, seed, "test items")
    encoded = _encode_items(data, data.task_examples(pool, rows), is_task=True)
    encoded.save(out / "test.safetensors")
    _write_lines(out / "items.jsonl", _item_lines(pool, rows, encoded, "test"))


def _write_probe(data: _CellData, out: Path) -> None:
    """Task dev items as the arm sees them, then held-out general items without any anchor."""
    seed, limits = data.spec.curation.seed, data.spec.evaluation
    dev = Corpus(data.curated / "task_dev.parquet")
    heldout = Corpus(data.curated / "general_heldout.parquet")
    dev_rows = choose_rows(dev.example_ids, limits.probe_items, seed, "probe items")
    general_rows = choose_rows(heldout.example_ids, limits.probe_general_items, seed, "probe items")
    task = _encode_items(data, data.task_examples(dev, dev_rows), is_task=True)
    general = heldout.encoded(general_rows, is_task=False)
    concatenate([task, general]).save(out / "probe.safetensors")
    lines = _item_lines(dev, dev_rows, task, "dev")
    lines += _item_lines(heldout, general_rows, general, "general")
    _write_lines(out / "probe_items.jsonl", lines)


def _encode_items(
    data: _CellData, examples: Sequence[Example], *, is_task: bool
) -> EncodedExamples:
    shown = [with_shots(example, data.shots) for example in examples]
    return from_lists(data.renderer.encode(shown), is_task=is_task)


def _item_lines(
    pool: Corpus, rows: IntArray, encoded: EncodedExamples, role: str
) -> list[dict[str, Any]]:
    """What is known of each item beside its tokens; the prompt is the bare one."""
    records = pool.records(rows, ("row", "prompt", "response", "extra"))
    return [
        {
            "item_id": f"{role}-{record['row']:05d}",
            "role": "general" if role == "general" else "task",
            "prompt_digest": _prompt_digest(encoded, index),
            "prompt": record["prompt"],
            "reference": record["response"],
            "extra": parse_extra(record["extra"]),
        }
        for index, record in enumerate(records)
    ]


def _prompt_digest(encoded: EncodedExamples, index: int) -> str:
    """First 16 hexadecimal digits of sha256 over the token ids that the model answers to."""
    context = encoded.example(index)[: encoded.response_starts[index]]
    return hashlib.sha256(np.ascontiguousarray(context, dtype="<i4").tobytes()).hexdigest()[:16]


def _write_samples(mixture: Mixture | None, data: _CellData, out: Path) -> None:
    """A few examples token by token: the first of each role, or of the test set."""
    examples = mixture.examples if mixture else EncodedExamples.load(out / "test.safetensors")
    samples = []
    for is_task in (True, False):
        for row in np.flatnonzero(examples.is_task == is_task)[:_NUM_SAMPLES]:
            start = int(examples.response_starts[row])
            pieces = label_mask_pieces(
                data.renderer.tokenizer, examples.example(row).tolist(), start
            )
            samples.append({"role": "task" if is_task else "general", "pieces": pieces})
    write_json(out / "samples.json", samples)


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
