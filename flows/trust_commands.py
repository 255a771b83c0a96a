"""``tell trust``: which code that models bring may run on this machine."""

import sys
from typing import Annotated, Any

import typer

from flows.printing import explained, print_json, print_table

trust_app = typer.Typer(
    no_args_is_help=True, help="Code that models bring: none of it runs before it is allowed here."
)

Model = Annotated[
    str, typer.Argument(help="Directory of a model, or its id on the hub.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


@trust_app.command("add")
@explained
def add(
    model: Model,
    revision: Annotated[
        str | None, typer.Option(help="Full commit on the hub; needed for an id.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="The code was read: do not ask.")] = False,
) -> None:
    """Allow the Python files of one revision of a model, after they were read."""
    from tell_core.training.models import fetch_with_code
    from tell_core.trusted_code import allow, code_files

    directory = fetch_with_code(model, revision)
    for name, digest in code_files(directory).items():
        print(f"{digest}  {directory / name}")
    if not yes and not _is_read():
        print("nothing was allowed", file=sys.stderr)
        raise typer.Exit(1)
    entries = allow(directory, model, revision)
    print(f"{len(entries)} files of {model} may run as you on this machine")


@trust_app.command("list")
@explained
def show(as_json: AsJson = False) -> None:
    """Show every file that is allowed."""
    from tell_core.trusted_code import allowed_code, trusted_file

    rows: list[dict[str, Any]] = [vars(entry) for entry in allowed_code()]
    if as_json:
        print_json(rows)
    elif rows:
        print_table(rows)
    else:
        print(f"no code of any model is allowed ({trusted_file()})")


@trust_app.command("remove")
@explained
def remove(model: Model) -> None:
    """Take everything that was allowed for a model off the list."""
    from tell_core.errors import InputError
    from tell_core.trusted_code import allowed_code, forbid

    if not (entries := forbid(model)):
        known = ", ".join(sorted({entry.model for entry in allowed_code()})) or "none"
        raise InputError(f"nothing is allowed for {model!r}; there are {known}")
    print(f"{len(entries)} files of {model} may no longer run")


def _is_read() -> bool:
    """Ask the person; nobody to be asked is a no."""
    if not sys.stdin.isatty():
        return False
    return typer.confirm("These files would run as you. Have you read them, and may they?")
