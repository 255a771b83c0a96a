"""The items of an evaluation, read from a mix directory, and the prompts made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tell_core.data.encoding import EncodedExamples
from tell_core.errors import EvaluationError, InputError
from tell_core.evaluation.base import FloatArray, ScoredItem
from tell_core.evaluation.generation import Request
from tell_core.evaluation.parsing import parse_answer

if TYPE_CHECKING:
    from tell_core.spec.model import EvaluationSpec, ParseSpec


@dataclass(frozen=True)
class ItemSet:
    """Items of one kind.

    Attributes:
        rows: N JSON objects with item_id, prompt_digest, reference and extra.
        examples: Prompt and gold response of each, in the same order.
    """

    rows: Sequence[Mapping[str, Any]]
    examples: EncodedExamples

    @classmethod
    def load(cls, lines: Path, arrays: Path) -> ItemSet:
        """Read the two files of a set.

        Raises:
            EvaluationError: They do not belong together.
        """
        with lines.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        examples = EncodedExamples.load(arrays)
        if len(rows) != len(examples):
            raise EvaluationError(
                f"{lines} holds {len(rows)} items, {arrays.name} beside it {len(examples)}: they"
                " are not of one run. Remove the directory and run the mix stage again."
            )
        return cls(rows, examples)

    def select(self, indices: Sequence[int]) -> ItemSet:
        """The items at ``indices``."""
        return ItemSet([self.rows[index] for index in indices], self.examples.select(indices))

    def scored(
        self, parse: ParseSpec, texts: Sequence[str] | None, nll: FloatArray
    ) -> list[ScoredItem]:
        """The items as metrics see them.

        Args:
            parse: How answers are read.
            texts: N generated texts; None when nothing was generated.
            nll: Shape (N,). Of the gold responses, in nats.
        """
        return [
            ScoredItem(
                item_id=str(row["item_id"]),
                prediction=parse_answer(texts[index], parse) if texts else None,
                reference=parse_answer(row["reference"], parse),
                extra=row["extra"],
                nll=float(nll[index]),
                num_tokens=int(self.examples.supervised_counts[index]),
                num_bytes=len(row["reference"].encode()),
                prompt=str(row.get("prompt", "")),
            )
            for index, row in enumerate(self.rows)
        ]

    def requests(self, evaluation: EvaluationSpec, repeat: int) -> list[Request]:
        """The prompts, each with its limit and its random stream in this repeat.

        Raises:
            InputError: An item has no usable limit.
        """
        return [
            Request(
                self.examples.example(index)[: self.examples.response_starts[index]],
                token_limit(row, evaluation),
                _stream_seed(evaluation.decoding_seed, repeat, str(row["item_id"])),
            )
            for index, row in enumerate(self.rows)
        ]


def load_items(inputs: Path) -> dict[str, ItemSet]:
    """Items of a mix directory by kind: "test", and of the probe set "general" and "retention".

    Raises:
        EvaluationError: There is no test item, or the files do not belong together.
    """
    test = ItemSet.load(inputs / "items.jsonl", inputs / "test.safetensors")
    if not test.rows:
        raise EvaluationError(f"{inputs / 'items.jsonl'} is empty; needed: at least one test item")
    probe = ItemSet.load(inputs / "probe_items.jsonl", inputs / "probe.safetensors")
    roles = [row["role"] for row in probe.rows]
    return {"test": test} | {
        kind: probe.select([index for index, role in enumerate(roles) if role == kind])
        for kind in ("general", "retention")
    }


def token_limit(row: Mapping[str, Any], evaluation: EvaluationSpec) -> int:
    """Longest answer to an item, in tokens: its own limit, capped by the specification's.

    Raises:
        InputError: The column is not there, or holds no whole number of at least 1.
    """
    column = evaluation.max_new_tokens_column
    if column is None:
        return evaluation.max_new_tokens
    value = row["extra"].get(column)
    is_whole = value.is_integer() if isinstance(value, float) else type(value) is int
    if not is_whole or value < 1:
        raise InputError(
            f"test item {row['item_id']}: column {column!r} (`evaluation.max_new_tokens_column`)"
            f" holds {value!r}; needed: a whole number of tokens, at least 1, for every test item"
        )
    return min(int(value), evaluation.max_new_tokens)


def _stream_seed(decoding_seed: int, repeat: int, item_id: str) -> int:
    """Seed of an item's random stream, 63 bits, from nothing but these three."""
    digest = hashlib.sha256(f"{decoding_seed}|{repeat}|{item_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
