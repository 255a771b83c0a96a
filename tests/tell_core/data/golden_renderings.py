"""Golden renderings: what the model reads and what is supervised, token by token.

Regenerate after a deliberate change with
``python -m tests.tell_core.data.golden_renderings`` from the repository root, and read the diff.
"""

import json
from pathlib import Path
from typing import Any

from tell_core.data.rendering import ChatRenderer, Example, label_mask_pieces, with_shots

from .tiny_tokenizers import TEMPLATES, build_tokenizer

DIRECTORY = Path(__file__).parents[2] / "golden"
SHOTS = (Example("copy a", "a"), Example("copy b", "b"))
EXAMPLES = {
    "plain": Example("translate the word", "yes and no"),
    "shots": with_shots(Example("copy c", "c"), SHOTS),
    "not_ascii": Example("Þýða: hundur 🐕", "kýr — 🐄"),
    "white_space": Example("  copy \n", "line\n\nline"),
}


def golden_path(template: str) -> Path:
    return DIRECTORY / f"renderings_{template}.json"


def render(template: str) -> dict[str, Any]:
    """Every example under one template: response start, and text and label of each token."""
    tokenizer = build_tokenizer(TEMPLATES[template])
    encoded = ChatRenderer(tokenizer).encode(list(EXAMPLES.values()))
    return {
        name: {
            "ids": ids,
            "response_start": start,
            "pieces": [list(piece) for piece in label_mask_pieces(tokenizer, ids, start)],
        }
        for name, (ids, start) in zip(EXAMPLES, encoded, strict=True)
    }


def write_all() -> None:
    DIRECTORY.mkdir(exist_ok=True)
    for template in TEMPLATES:
        lines = [
            f"{json.dumps(name)}: {json.dumps(rendering, ensure_ascii=False)}"
            for name, rendering in render(template).items()
        ]
        golden_path(template).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    write_all()
