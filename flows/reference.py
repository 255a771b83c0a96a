"""The page of all commands, from the command line itself: ``python -m flows.reference``."""

import typer
from typer.cli import get_docs_for_click

from flows.cli import app

_HEAD = """\
# Commands

Every command and option. Written by `python -m flows.reference`; a test keeps this page equal to
the code. Exit codes: 0 done, 1 the run failed, 2 the input is wrong, 130 interrupted, 143 asked to
stop.

"""


def commands() -> str:
    """The page as Markdown."""
    group = typer.main.get_command(app)
    text = get_docs_for_click(obj=group, ctx=typer.Context(group), name="tell")
    return _HEAD + text.partition("\n\n")[2].rstrip() + "\n"


if __name__ == "__main__":
    print(commands(), end="")
