"""Small data sets on disk and specifications over them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tell_core.spec.model import ExperimentSpec

PREFIX = "Translate the word and say yes.\n\n"


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def task_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"{PREFIX}task word {number}{' more' * (number % 5)}",
            "response": f"answer {number}",
            "anchor_len": len(PREFIX),
            "label": "yes" if number % 2 else "no",
        }
        for number in range(start, start + count)
    ]


def general_rows(count: int, name: str = "general") -> list[dict[str, Any]]:
    return [
        {"prompt": f"{name} question {number}", "response": f"reply {'so ' * (number % 7)}{number}"}
        for number in range(count)
    ]


def write_world(directory: Path, num_train: int = 60, num_general: int = 80) -> None:
    write_rows(directory / "train.jsonl", task_rows(num_train))
    write_rows(directory / "test.jsonl", task_rows(12, start=10_000))
    write_rows(directory / "general.jsonl", general_rows(num_general))
    write_rows(directory / "chat.jsonl", general_rows(num_general // 2, "chat"))


def make_spec(directory: Path, **sections: Any) -> ExperimentSpec:
    """A specification over `write_world`; a section given replaces the one here."""
    defaults: dict[str, Any] = {
        "name": "tiny",
        "model": {"id": "tiny"},
        "task": {
            "name": "task",
            "train": str(directory / "train.jsonl"),
            "test": str(directory / "test.jsonl"),
            "dev_examples": 8,
        },
        "general": [str(directory / "general.jsonl"), str(directory / "chat.jsonl")],
        "curation": {"max_tokens": 400, "general_heldout_examples": 8},
        "anchor": {"length_column": "anchor_len"},
        "budgets": {"task_tokens": [600, 1500], "general_tokens": [2000]},
        "training": {"epochs": 3, "batch_size": 4, "min_steps": 0},
        "evaluation": {"num_shots": 2},
    }
    return ExperimentSpec.model_validate(defaults | sections)
