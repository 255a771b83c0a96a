"""What `tell curate --show` prints: rejects, duplicates or overlap, row by row with texts."""

from pathlib import Path
from typing import Any

from flows.printing import print_json, print_table
from tell_core.data.evidence import EVIDENCE_KINDS, evidence_rows
from tell_core.errors import InputError

SHOWN_ROWS = 50
_TEXT_CHARACTERS = 160


def require_evidence_kind(kind: str | None) -> None:
    """Refuse an unknown kind before any work is done.

    Raises:
        InputError: ``kind`` is given and is none of rejects, duplicates and overlap.
    """
    if kind is not None and kind not in EVIDENCE_KINDS:
        raise InputError(f"--show takes {', '.join(EVIDENCE_KINDS)}; given was {kind!r}")


def print_evidence(curated: Path, kind: str, *, as_json: bool) -> None:
    """Print the first 50 rows, texts clipped; as JSON all rows with their texts as stored."""
    rows, num_rows = evidence_rows(curated, kind, None if as_json else SHOWN_ROWS)
    if as_json:
        print_json(rows)
        return
    if not rows:
        print(f"no {kind}")
        return
    print_table([_shown(row) for row in rows])
    if num_rows > len(rows):
        print(f"{len(rows)} of {num_rows:,} rows; --json gives all, with their whole texts")


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row for the console: file and line in one, every text on one line and harmless."""
    place = {"place": f"{Path(row['file']).name}, line {row['line']}"}
    rest = {name: value for name, value in row.items() if name not in ("file", "line")}
    return {
        name: _on_one_line(value) if isinstance(value, str) else value
        for name, value in (place | rest).items()
    }


def _on_one_line(text: str) -> str:
    """The beginning of a text, without what a terminal would obey."""
    flat = " ".join(text.split())
    clipped = flat if len(flat) <= _TEXT_CHARACTERS else f"{flat[:_TEXT_CHARACTERS]} …"
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in clipped)
