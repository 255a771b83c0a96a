"""``tell quanta``: candidate quanta of a cell or a model, and the controls of the method."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from flows.printing import explained, print_json, print_table
from tell_core.errors import InputError

if TYPE_CHECKING:
    from tell_core.analysis.quanta.acceptance import Check

_EVERY_SECONDS = 5.0
_PARITY = "sparse-parity"


class _FindsByDefault(TyperGroup):
    """``tell quanta RUN`` means ``tell quanta find RUN``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command's name where none is given."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["find", *args]
        return super().parse_args(ctx, args)


quanta_app = typer.Typer(
    cls=_FindsByDefault,
    no_args_is_help=True,
    help="Candidate quanta (clusters of gradients) of a run's cell or a model; controls of it.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


@quanta_app.command()
@explained
def find(
    source: Annotated[
        str, typer.Argument(help="Run directory, or a model's directory or id.", show_default=False)
    ],
    cell: Annotated[
        str | None,
        typer.Option(help="Cell of the run; by default `tell` at its largest budgets."),
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Examples for a model: file or glob; repeatable.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the quanta of a model go.")] = Path(
        "runs/quanta"
    ),
    tokens: Annotated[int, typer.Option(min=20, help="Most tokens to look at.")] = 1000,
    dimensions: Annotated[int, typer.Option(min=64, help="Of a projected gradient.")] = 4096,
    max_tokens: Annotated[int, typer.Option(help="Longest example, for a model.")] = 256,
    max_examples: Annotated[int, typer.Option(help="Most examples, for a model.")] = 400,
    seed: Annotated[int, typer.Option(help="Seed of every choice.")] = 0,
    no_track: Annotated[bool, typer.Option("--no-track", help="Record nothing in MLflow.")] = False,
    as_json: AsJson = False,
) -> None:
    """Cluster the gradients of well-predicted tokens; write a page to look at the clusters."""
    from tell_core.analysis.quanta.discovery import DiscoverySettings
    from tell_core.analysis.quanta.stage import Subject

    subject = Subject.choose(source, cell=cell, files=data or [], out=out)
    settings = DiscoverySettings(num_tokens=tokens, num_dimensions=dimensions, seed=seed)
    with _orchestrated(subject.root):
        from flows.quanta import run_quanta

        found = run_quanta(subject, settings, max_tokens, max_examples, not no_track)
    if as_json:
        print_json(found)
        return
    print(found["verdict"])
    print_table([{"tokens": name, "number": count} for name, count in found["tokens"].items()])
    print_table(found["clusters"])
    print(f"page:      {found['page']}\nfiles:     {found['stage']}")


@contextmanager
def _orchestrated(root: Path) -> Iterator[None]:
    """Have a Prefect server, and progress on the error stream, while the flow runs."""
    from flows.local_server import prefect_server

    with prefect_server(root / "prefect") as wait_until_ready:
        from tasks.progress import listen

        wait_until_ready()
        silence = listen(_progress_lines())
        try:
            yield
        finally:
            silence()


@quanta_app.command()
@explained
def controls(
    only: Annotated[
        list[str] | None, typer.Option(help="Run this control alone; repeatable.")
    ] = None,
    parity: Annotated[
        Path | None, typer.Option(help="Another sparse parity problem: YAML.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the analysis on problems whose answer is known; fails when one is missed."""
    from tell_core.analysis.quanta.acceptance import chosen_controls, run_control

    names = chosen_controls(only or [])
    if parity and _PARITY not in names:
        raise InputError(
            f"--parity gives the problem of the control {_PARITY!r}, and --only names"
            f" {', '.join(names)}: add --only {_PARITY}, or leave one of the two out"
        )
    given = _parity_control(parity) if parity else None
    checks: list[Check] = []
    for name in names:
        print(f"{name} …", file=sys.stderr, flush=True)
        checks += given() if given and name == _PARITY else run_control(name)
    if as_json:
        print_json([check._asdict() for check in checks])
    else:
        print_table([_row(check) for check in checks])
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


def _parity_control(path: Path) -> "Callable[[], list[Check]]":
    """The control of emergence on the problem of a file, which is read at once."""
    from tell_core.analysis.controls import parity
    from tell_core.analysis.parity import read_parity

    setting, seeds = read_parity(path)
    return lambda: parity(setting, seeds)


def _row(check: "Check") -> dict[str, Any]:
    return {
        "check": check.name,
        "accept": check.accept,
        "measured": check.value,
        "": "ok" if check.passed else "FAILED",
        "CPU s": round(check.seconds, 1),
    }


def _progress_lines() -> Callable[[str, str, int, int], None]:
    """Lines on the error stream, one every few seconds."""
    from tasks.progress import ENDED

    last = time.monotonic()

    def show(label: str, phase: str, done: int, total: int) -> None:
        nonlocal last
        if phase == ENDED or time.monotonic() - last < _EVERY_SECONDS:
            return
        last = time.monotonic()
        print(f"{label} · {phase}: {done} of {total}", file=sys.stderr, flush=True)

    return show
