"""``tell cell``: cells as bundles for a cluster, or for a GPU machine without network."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.printing import explained, print_json, print_table
from tell_core.errors import InputError

if TYPE_CHECKING:
    from tell_core.bundles.exporting import Export
    from tell_core.spec.model import ExperimentSpec

cell_app = typer.Typer(
    no_args_is_help=True, help="Cells as bundles, for other machines: export, run, import."
)

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="name=value for a variable or field of the YAML; repeatable."),
]
Bundles = Annotated[
    list[Path],
    typer.Argument(help="Bundles, .tar files of them, or directories of these.", metavar="BUNDLE…"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


@cell_app.command("export")
@explained
def export_cells(
    source: Annotated[
        Path,
        typer.Argument(help="The experiment's YAML, or its run directory.", metavar="SPEC|DIR"),
    ],
    to: Annotated[Path, typer.Option(help="Directory of the bundles.")],
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; runs/<name> by default.")] = None,
    with_model: Annotated[
        bool, typer.Option("--with-model", help="Copy the base model into each bundle.")
    ] = False,
    tar: Annotated[bool, typer.Option("--tar", help="Write .tar files.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a bundle per cell that is not finished; where something is tuned, that comes first."""
    from tell_core.bundles.exporting import export_bundles
    from tell_core.results import sole_owner, write_spec

    spec, root = _open(source, settings or [], out)
    with sole_owner(root):
        write_spec(spec, root)
        export = export_bundles(spec, root, to, with_model=with_model, is_packed=tar)
    if as_json:
        print_json(export._asdict() | {"run_directory": root})
        return
    for path in export.bundles:
        print(path)
    for line in _next_steps(export, source, root, to):
        print(line)


def _open(source: Path, settings: Sequence[str], out: Path | None) -> tuple["ExperimentSpec", Path]:
    """Specification and run directory, from a YAML or from the directory of an earlier run."""
    from tell_core.results import default_root, open_run
    from tell_core.spec.loading import load_spec

    is_run = source.is_dir()
    spec = load_spec(source / "spec.resolved.yaml" if is_run else source, settings)
    root = out or (source if is_run else default_root(spec))
    open_run(spec, root)
    return spec, root


def _next_steps(export: "Export", source: Path, root: Path, to: Path) -> list[str]:
    """What was written, and the commands that follow."""
    what = "trainings of the tuning" if export.is_tuning else "cells"
    lines = [f"{len(export.bundles)} {what} to run, {export.num_finished} finished already"]
    if not export.bundles:
        return [*lines, f"nothing to export: `tell run` with --out {root} analyses what is there"]
    lines += [
        f"there: python -m tell_core.bundles run {to.name} --model DIRECTORY",
        f"here:  tell cell import {to} --out {root}",
    ]
    if export.is_tuning:
        lines.append(
            "These only choose learning rate and epochs. After their import, the same"
            f" `tell cell export {source}` with another --to writes the cells themselves."
        )
    return lines


@cell_app.command("run")
@explained
def run_cells(
    bundles: Bundles,
    model: Annotated[Path | None, typer.Option(help="Directory of the base model.")] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu or cuda; as in the specification.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; as in the specification.")
    ] = None,
    share: Annotated[
        str | None, typer.Option(help="I/N: every N-th bundle, beginning with I, from 0.")
    ] = None,
) -> None:
    """Train and measure bundles; the same as `python -m tell_core.bundles run`."""
    from tell_core.bundles.__main__ import run_all

    if code := run_all(bundles, model, device, threads, share):
        raise typer.Exit(code)


@cell_app.command("import")
@explained
def import_cells(
    bundles: Bundles,
    out: Annotated[Path, typer.Option(help="Run directory that they were exported from.")],
    as_json: AsJson = False,
) -> None:
    """Verify and score what bundles brought back; `tell run` then finds it finished."""
    from tell_core.bundles.importing import WAITING, import_bundles
    from tell_core.results import sole_owner

    if not (out / "stages").is_dir():
        raise InputError(
            f"{out} is no run directory; give the one that `tell cell export` worked in"
        )
    with sole_owner(out):
        rows = [one._asdict() for one in import_bundles(bundles, out)]
    if as_json:
        print_json(rows)
    else:
        print_table(rows)
    if any(row["outcome"] == WAITING for row in rows):
        print("tell: some bundles were not run yet; import them again later", file=sys.stderr)
