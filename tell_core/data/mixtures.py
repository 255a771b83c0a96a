"""Mixtures: what one cell trains on, in which order, and what it is probed and tested on.

`plan_cell` and `build_cell_inputs` choose, order and count with the same code, so that the ledger
shown before a run is the ledger of the run.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tell_core.data.budgets import (
    available_tokens,
    choice_order,
    select_from_sources,
    select_within_budget,
    split_budget,
    stratified_order,
)
from tell_core.data.corpus import Corpus, parse_extra
from tell_core.data.encoding import EncodedExamples, IntArray, concatenate
from tell_core.data.orders import (
    build_order,
    num_passes,
    repeated_order,
    repeated_visits,
    shuffle_proof,
)
from tell_core.data.pools import Look, Pools, open_pools
from tell_core.data.rendering import ChatRenderer, label_mask_pieces
from tell_core.data.seeding import choose_rows
from tell_core.data.selection import aligned_orders, diverse_orders, select_in_orders
from tell_core.data.token_store import INDEX_FILE, MixtureIndex
from tell_core.errors import DataError
from tell_core.spec.arms import Arm, parse_arm
from tell_core.spec.cells import Cell
from tell_core.spec.model import ExperimentSpec
from tell_core.store import write_json, write_text

Ledger = dict[str, Any]
_NO_ROWS = np.empty(0, dtype=np.int64)
_NUM_SAMPLES = 2
_MAX_LISTED = 5
BARE_ROLES = ("general", "retention")  # their items never carry the anchor prompt


def plan_cell(
    spec: ExperimentSpec,
    cell: Cell,
    curated: Path,
    renderer: ChatRenderer,
    context_tokens: int | None = None,
    gradients: Path | None = None,
) -> Ledger:
    """The token ledger of a cell, exactly, without writing anything.

    Examples rendered are kept beside ``curated``, for further cells and for the run.

    Args:
        spec: The experiment.
        cell: The cell.
        curated: Directory written by `curate`.
        renderer: Renderer of the base model.
        context_tokens: Longest sequence the base model takes; None leaves it unchecked.
        gradients: Directory written by `write_gradients`; arms that select by alignment need it.

    Returns:
        The content of ``ledger.json``.

    Raises:
        TokenBudgetError: A budget holds no example.
        DataError: Test or probe examples exceed the model's context, listed.
    """
    data = _CellData(spec, cell, open_pools(curated, renderer), gradients=gradients)
    _require_context(data, context_tokens)
    return data.ledger()


def plan_positions(
    spec: ExperimentSpec,
    cell: Cell,
    curated: Path,
    renderer: ChatRenderer,
    gradients: Path | None = None,
) -> tuple[IntArray, Callable[[], IntArray]]:
    """What the forward passes of a trained cell are counted from; arguments as of `plan_cell`.

    Returns:
        Shape (N,): tokens of each chosen example; and a function that lays out the order, shape
        (M,), as in `Mixture`: it need not be called where lengths alone give the count.
    """
    data = _CellData(spec, cell, open_pools(curated, renderer), gradients=gradients)
    return data.chosen.lengths, lambda: data.order


def build_cell_inputs(
    spec: ExperimentSpec,
    cell: Cell,
    curated: Path,
    renderer: ChatRenderer,
    out: Path,
    num_steps: int | None = None,
    context_tokens: int | None = None,
    gradients: Path | None = None,
) -> Ledger:
    """Write everything that training and evaluating one cell reads.

    Args:
        spec: The experiment.
        cell: The cell.
        curated: Directory written by `curate`.
        renderer: Renderer of the base model.
        out: Existing directory for ``mixture_index.safetensors`` (trained arms only),
            ``probe.safetensors``, ``test.safetensors`` and the JSON files beside them; it must lie
            beside ``curated``, as the token stores do to which the index refers.
        num_steps: Optimiser steps of an arm that repeats its task data; None takes those of
            `tell` at the same budgets and seed.
        context_tokens: Longest sequence the base model takes; None leaves it unchecked.
        gradients: Directory written by `write_gradients`; arms that select by alignment need it.

    Returns:
        The content of ``ledger.json``.

    Raises:
        TokenBudgetError: A budget holds no example.
        DataError: Examples have no supervised token, or test or probe examples exceed the
            model's context; they are listed.
    """
    data = _CellData(spec, cell, open_pools(curated, renderer), num_steps, gradients)
    _require_context(data, context_tokens)
    ledger = data.ledger()
    if data.arm.is_trained:
        data.require_supervised()
        _write_mixture(data.index, out)
    _write_items(data, out)
    _write_samples(data, out)
    write_json(out / "ledger.json", ledger)
    return ledger


@dataclass(frozen=True)
class _CellData:
    """Choice, order and rendering of one cell's data; each part is computed once, when needed."""

    spec: ExperimentSpec
    cell: Cell
    pools: Pools
    num_steps: int | None = None
    gradients: Path | None = None

    @cached_property
    def arm(self) -> Arm:
        return parse_arm(self.cell.arm)

    @cached_property
    def look(self) -> Look:
        """What the arm sees on task prompts, in training and at evaluation."""
        if self.arm.task_anchor != "random":
            return Look(self.arm.task_anchor)
        return Look("random", self.pools.random_text(self.cell.seed))

    @cached_property
    def item_look(self) -> Look:
        """What it sees on prompts that it has to answer: solved examples too, if it has shots."""
        if not self.arm.has_shots:
            return self.look
        shots = self.pools.seen("task_train", self.task_rows, self.look)
        return self.look._replace(shots=tuple(shots))

    @property
    def task_pool(self) -> Corpus:
        return self.pools.corpus("task_train")

    @property
    def general_pool(self) -> Corpus:
        return self.pools.corpus("general")

    @cached_property
    def task_order(self) -> IntArray:
        """The order in which task examples are chosen."""
        pool, column = self.task_pool, self.spec.budgets.stratify_by
        if column is None:
            return choice_order(pool.num_examples, self.cell.seed)
        return stratified_order(pool.strata(column), self.cell.seed)

    def counts(self, pool: Corpus) -> IntArray:
        """Shape (N,). What each example of a pool takes of a budget."""
        is_supervised = self.spec.budgets.unit == "supervised_tokens"
        return pool.num_response_tokens if is_supervised else pool.num_tokens

    @cached_property
    def task_rows(self) -> IntArray:
        """Rows of the task pool, in order of choice: the same for all arms with equal budget."""
        if self.arm.has_shots:
            return self.task_order[: self.spec.evaluation.num_shots]
        if not self.arm.uses_task:
            return _NO_ROWS
        assert self.cell.task_budget_tokens is not None, "the arm uses task data"
        counts, budget = self.counts(self.task_pool), self.cell.task_budget_tokens
        return select_within_budget(counts, budget, self.cell.seed, order=self.task_order)

    @property
    def general_weights(self) -> dict[str, float]:
        """Relative share of each general source."""
        return {source.name: source.weight for source in self.spec.general}

    @cached_property
    def general_shares(self) -> dict[str, int]:
        """What each general source may use of the general budget."""
        assert self.cell.general_budget_tokens is not None, "the arm uses general data"
        available, weights = self._general_available(), self.general_weights
        shares = split_budget(
            self.cell.general_budget_tokens,
            [weights[name] for name in available],
            list(available.values()),
        )
        return dict(zip(available, shares, strict=True))

    def _general_available(self) -> dict[str, int]:
        """What each general source with examples holds, in the unit of the budgets."""
        pool, weights, unit = self.general_pool, self.general_weights, self.spec.budgets.unit
        return self.pools.once(
            ("available", unit, *weights),
            lambda: available_tokens(self.counts(pool), pool.sources, weights),
        )

    @cached_property
    def budget_general_rows(self) -> IntArray:
        """Rows of the general pool within the general budget, whether the arm uses them or not."""
        if self.cell.general_budget_tokens is None:
            return _NO_ROWS
        weights = self.general_weights
        if self.arm.selection != "random":
            return select_in_orders(
                self.counts(self.general_pool),
                self.general_pool.sources,
                weights,
                self.cell.general_budget_tokens,
                self._general_orders(),
            )
        budget, seed = self.cell.general_budget_tokens, self.cell.seed
        return self.pools.once(
            ("general rows", self.spec.budgets.unit, *weights.items(), budget, seed),
            lambda: select_from_sources(
                self.counts(self.general_pool), self.general_pool.sources, weights, budget, seed
            ),
        )

    def _general_orders(self) -> Mapping[str, IntArray]:
        """Per source, the order in which the arm's selection takes general examples."""
        pool, seed = self.general_pool.path, self.cell.seed
        if self.arm.selection == "diversity":
            return diverse_orders(pool, seed)
        assert self.gradients is not None, "selection by alignment needs gradients"
        return aligned_orders(self.gradients, pool, self.task_rows, seed)

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
            return repeated_order(num_task, self.num_positions, self.cell.seed)
        return build_order(
            self.arm.order,
            num_task,
            num_general,
            self._num_passes(num_task + num_general),
            self.cell.seed,
            self.arm.num_blocks,
        )

    @cached_property
    def num_positions(self) -> int:
        """Length of the order; an arm that matches steps has as many as `tell`."""
        if not self.arm.is_trained:
            return 0
        if self.arm.matches_steps and self.num_steps is not None:
            return self.num_steps * self.spec.training.batch_size
        uses_general = self.arm.uses_general or self.arm.matches_steps
        num_general = len(self.budget_general_rows) if uses_general else 0
        num_mixture = len(self.task_rows) + num_general
        return self._num_passes(num_mixture) * num_mixture

    def _num_passes(self, num_examples: int) -> int:
        training = self.spec.training
        return num_passes(
            num_examples, training.num_epochs, training.batch_size, training.min_steps
        )

    @cached_property
    def chosen(self) -> MixtureIndex:
        """The chosen examples as the arm sees them, task data first, without an order."""
        general_look = Look("anchor" if self.arm.anchors_general else "none")
        chosen = (
            ("task_train", self.task_rows, self.look, True),
            ("general", self.general_rows, general_look, False),
        )
        parts = [
            self.pools.index(part, rows, look, is_task=is_task)
            for part, rows, look, is_task in chosen
            if len(rows)
        ]
        return MixtureIndex(tuple(parts), np.empty(0, dtype=np.int32))

    @cached_property
    def index(self) -> MixtureIndex:
        """The chosen examples and the order over them."""
        return replace(self.chosen, order=self.order)

    @cached_property
    def items(self) -> tuple["_Items", ...]:
        """Test and task dev items as the arm sees them; bare held-out general and retention items.

        They are the same items for every cell.
        """
        corpus = self.pools.corpus
        test, dev, general = map(corpus, ("task_test", "task_dev", "general_heldout"))
        limit, seed = self.spec.evaluation.max_items, self.spec.curation.seed
        test_rows = choose_rows(test.example_ids, limit, seed, "test items")
        dev_rows, general_rows = (np.arange(pool.num_examples) for pool in (dev, general))
        retention, limit = corpus("retention"), self.spec.curation.retention_examples
        kept_rows = choose_rows(retention.example_ids, limit, seed, "retention items")
        return (
            _Items("test", test, test_rows, self._encoded_items("task_test", test_rows)),
            _Items("dev", dev, dev_rows, self._encoded_items("task_dev", dev_rows)),
            _Items("general", general, general_rows, general.encoded(general_rows, is_task=False)),
            _Items("retention", retention, kept_rows, retention.encoded(kept_rows, is_task=False)),
        )

    def _encoded_items(self, part: str, rows: IntArray) -> EncodedExamples:
        return self.pools.encoded(part, rows, self.item_look, is_task=True)

    def require_supervised(self) -> None:
        """Every example of the mixture must have a token to learn from.

        Raises:
            DataError: Some have none.
        """
        empty = np.flatnonzero(self.index.supervised_counts < 1)
        if not len(empty):
            return
        num_task = len(self.task_rows)
        task = self.task_rows[empty[empty < num_task]]
        general = self.general_rows[empty[empty >= num_task] - num_task]
        places = self.task_pool.places(task) + self.general_pool.places(general)
        raise DataError(
            f"{len(empty)} examples have no token to learn from (empty response):"
            f" {'; '.join(places[:_MAX_LISTED])}. Mend or remove those rows."
        )

    @cached_property
    def visits(self) -> IntArray:
        """Shape (N,). How often the training meets each example."""
        num_examples = len(self.task_rows) + len(self.general_rows)
        if not self.num_positions:
            return np.zeros(num_examples, dtype=np.int64)
        if self.arm.matches_steps:
            return repeated_visits(num_examples, self.num_positions, self.cell.seed)
        return np.full(num_examples, self.num_positions // num_examples)

    def ledger(self) -> Ledger:
        """What is available, chosen, rendered and supervised, in tokens."""
        cell, task, general = self.cell, self.task_pool, self.general_pool
        lengths, visits, num_task = self.chosen.lengths, self.visits, len(self.task_rows)
        return {
            "budget_unit": self.spec.budgets.unit,
            "task_budget_tokens": cell.task_budget_tokens,
            "task_tokens": int(task.num_tokens[self.task_rows].sum()),
            "task_available_tokens": int(task.num_tokens.sum()),
            "task_rendered_tokens": int(lengths[:num_task].sum()),
            "num_task_examples": num_task,
            "general_budget_tokens": cell.general_budget_tokens,
            "general_tokens": int(general.num_tokens[self.general_rows].sum()),
            "general_available_tokens": int(general.num_tokens.sum()),
            "num_general_examples": len(self.general_rows),
            "supervised_tokens": int((visits * self.chosen.supervised_counts).sum()),
            "rendered_tokens": int((visits * lengths).sum()),
            "task_epochs": float(visits[:num_task].mean()) if num_task else 0.0,
            "steps": math.ceil(self.num_positions / self.spec.training.batch_size),
            "epochs": self.num_positions / len(lengths) if self.num_positions else 0.0,
            "sources": [*self._task_sources(), *self._general_sources()],
        }

    def _task_sources(self) -> list[Ledger]:
        name, counts = self.spec.task.train.name, self.counts(self.task_pool)
        visits = self.visits[: len(self.task_rows)]
        budget = self.cell.task_budget_tokens
        use = _SourceUse("task", name, budget, self.task_rows, int(counts.sum()), visits)
        return [use.entry(counts)] if self.arm.uses_task else []

    def _general_sources(self) -> list[Ledger]:
        if not self.arm.uses_general:
            return []
        pool, rows = self.general_pool, self.general_rows
        counts, visits = self.counts(pool), self.visits[len(self.task_rows) :]
        names = pool.sources[rows]
        available = self._general_available()
        return [
            _SourceUse(
                "general",
                name,
                share,
                rows[names == name],
                available[name],
                visits[names == name],
            ).entry(counts)
            for name, share in self.general_shares.items()
        ]


class _SourceUse(NamedTuple):
    """What a cell takes of one source: rows chosen, tokens there, and how often each is met."""

    role: str
    name: str
    budget: int | None
    rows: IntArray
    available: int
    visits: IntArray

    def entry(self, counts: IntArray) -> Ledger:
        """Its line of the ledger; ``counts`` are those of the pool, in the unit of the budgets."""
        return {
            "role": self.role,
            "source": self.name,
            "budget": self.budget,
            "used": int(counts[self.rows].sum()),
            "available": self.available,
            "num_examples": len(self.rows),
            "repeats": float(self.visits.mean()) if len(self.visits) else 0.0,
        }


@dataclass(frozen=True)
class _Items:
    """Items of one role, for testing or probing.

    Attributes:
        role: test, dev, general or retention.
        pool: The corpus they stand in.
        rows: Shape (N,). Their rows.
        encoded: Their N examples as the arm sees them.
    """

    role: str
    pool: Corpus
    rows: IntArray
    encoded: EncodedExamples

    def lines(self) -> list[dict[str, Any]]:
        """What is known of each item beside its tokens; the prompt is the bare one."""
        records = self.pool.records(self.rows, ("row", "prompt", "response", "extra"))
        return [
            {
                "item_id": f"{self.role}-{record['row']:05d}",
                "role": self.role if self.role in BARE_ROLES else "task",
                "prompt_digest": _prompt_digest(self.encoded, index),
                "prompt": record["prompt"],
                "reference": record["response"],
                "extra": parse_extra(record["extra"]),
            }
            for index, record in enumerate(records)
        ]


def _require_context(data: _CellData, context_tokens: int | None) -> None:
    """Items, answer included, must fit into the model's context.

    Raises:
        DataError: Some do not.
    """
    if context_tokens is None:
        return
    for items in data.items:
        too_long = np.flatnonzero(items.encoded.lengths > context_tokens)
        if not len(too_long):
            continue
        places = items.pool.places(items.rows[too_long[:_MAX_LISTED]])
        shots = data.arm.has_shots and items.role not in BARE_ROLES
        setting = "evaluation.num_shots" if shots else "curation.max_tokens"
        raise DataError(
            f"{data.cell.name}: {len(too_long)} {items.role} items are longer than the base"
            f" model's context of {context_tokens} tokens, the longest has"
            f" {int(items.encoded.lengths.max())}: {'; '.join(places)}. Lower `{setting}`, or take"
            " a model with a longer context."
        )


def _write_mixture(index: MixtureIndex, out: Path) -> None:
    index.save(out / INDEX_FILE)
    proof = shuffle_proof(index.order[: len(index.is_task)], index.is_task)
    write_json(out / "shuffle_proof.json", proof)


def _write_items(data: _CellData, out: Path) -> None:
    """Test items; as probe set task dev items, then the bare held-out and retention items."""
    test, *probe = data.items
    test.encoded.save(out / "test.safetensors")
    _write_lines(out / "items.jsonl", test.lines())
    concatenate([items.encoded for items in probe]).save(out / "probe.safetensors")
    _write_lines(out / "probe_items.jsonl", [line for items in probe for line in items.lines()])


def _prompt_digest(encoded: EncodedExamples, index: int) -> str:
    """First 16 hexadecimal digits of sha256 over the token ids that the model answers to."""
    context = encoded.example(index)[: encoded.response_starts[index]]
    return hashlib.sha256(np.ascontiguousarray(context, dtype="<i4").tobytes()).hexdigest()[:16]


def _write_samples(data: _CellData, out: Path) -> None:
    """A few examples token by token: the first of each role, or of the test set."""
    test = data.items[0].encoded
    firsts = [test.select(range(min(_NUM_SAMPLES, len(test))))]
    if data.arm.is_trained:
        firsts = [
            part.store.take(part.rows[:_NUM_SAMPLES], is_task=part.is_task)
            for part in data.index.parts
        ]
    samples = []
    for examples in firsts:
        for row, start in enumerate(examples.response_starts.tolist()):
            pieces = label_mask_pieces(
                data.pools.renderer.tokenizer, examples.example(row).tolist(), start
            )
            role = "task" if examples.is_task[row] else "general"
            samples.append({"role": role, "pieces": pieces})
    write_json(out / "samples.json", samples)


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
