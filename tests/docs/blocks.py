"""The fenced blocks of a page, with the note before a block that says why tests do not run it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(
    r"(?:<!-- not run in tests: (?P<why>.+?) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)\n```",
    re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: What stands behind its fence: sh, python, yaml, console.
        text: Its content.
        why_not: Why tests do not run it; None when they do.
    """

    language: str
    text: str
    why_not: str | None


def blocks(page: Path) -> Iterator[Block]:
    """Every fenced block of a page that names its language, in order."""
    for found in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        yield Block(found["language"], found["text"], found["why"])


def tell_lines(text: str) -> Iterator[str]:
    """The lines of a shell block that call ``tell``."""
    return (line for line in text.splitlines() if line.startswith("tell "))
