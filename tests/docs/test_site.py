"""The pages hold together: every link leads somewhere, generated pages equal the code."""

import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer

from flows.cli import app
from flows.reference import commands
from tests.docs.blocks import blocks, tell_lines

PROJECT = Path(__file__).resolve().parents[2]
PAGES = sorted([PROJECT / "README.md", *(PROJECT / "docs").rglob("*.md")])


def test_the_page_of_commands_equals_the_command_line():
    page = (PROJECT / "docs" / "commands.md").read_text(encoding="utf-8")

    assert page == commands(), "run: python -m flows.reference > docs/commands.md"


def test_the_site_is_built_in_strict_mode(tmp_path: Path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]

    done = subprocess.run(
        [*build, "--site-dir", str(tmp_path)],
        cwd=PROJECT, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "user-guide" / "index.html").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_is_one_that_exists(page: Path):
    group = typer.main.get_command(app)
    shell = [block.text for block in blocks(page) if block.language == "sh"]

    for line in (line for text in shell for line in tell_lines(text)):
        arguments = shlex.split(line, comments=True)[1:]
        try:
            _parse(group, arguments)
        except click.ClickException as error:
            pytest.fail(f"{page.name}: {line}: {error.format_message()}")


def _parse(command: click.Command, arguments: list[str]) -> None:
    """Parse a command line as `tell` would, without running anything."""
    if isinstance(command, click.Group):
        name, *rest = arguments
        inner = command.get_command(click.Context(command), name)
        if inner is None:
            raise click.UsageError(f"no command {name!r}")
        _parse(inner, rest)
    else:
        command.make_context(command.name, arguments)
