"""What the commands share: errors as messages with an exit code, tables, JSON, durations."""

import json
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import typer

from tell_core.errors import TellError

P = ParamSpec("P")


def explained(command: Callable[P, None]) -> Callable[P, None]:
    """Print our own errors as a message and exit with their code; others keep their traceback."""

    @wraps(command)
    def run(*arguments: P.args, **options: P.kwargs) -> None:
        try:
            command(*arguments, **options)
        except TellError as error:
            print(f"tell: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            print("tell: interrupted; the same command goes on from here", file=sys.stderr)
            raise typer.Exit(130) from error

    return run


def print_json(value: Any) -> None:
    """What a program reads; values without a JSON form as their text."""
    print(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def print_table(rows: Sequence[dict[str, Any]], columns: Sequence[str] = ()) -> None:
    """Rows as a table, numbers on the right; ``columns`` choose and order them."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    names = list(columns) or (list(rows[0]) if rows else [])
    for name in names:
        is_number = any(isinstance(row[name], int | float) for row in rows)
        table.add_column(escape(name), justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell_text(row[name]) for name in names))
    # In a pipe there is no width to fit into: never fold a line there.
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


def _cell_text(value: Any) -> str:
    from rich.markup import escape

    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return escape(str(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
