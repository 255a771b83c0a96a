"""The commands of the model registry: promote, predict, replay."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.printing import duration, explained, print_json

app = typer.Typer()

Uri = Annotated[
    str, typer.Argument(help="models:/NAME/NUMBER or models:/NAME@ALIAS.", show_default=False)
]
Store = Annotated[
    str | None,
    typer.Option(help="MLflow server or SQLite file; MLFLOW_TRACKING_URI or runs/mlflow.db."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]

_LINE_EVERY_SECONDS = 10.0
_BATCHES_AT_ONCE = 4


@app.command()
@explained
def promote(
    name: Annotated[str, typer.Argument(help="The registered model.", show_default=False)],
    version: Annotated[str, typer.Argument(help="Number of the version.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Whatever the comparison says.")] = False,
    reason: Annotated[str | None, typer.Option(help="Why, with --force; it is kept.")] = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Make a version champion if it beats the incumbent on the same test items."""
    from tasks.registry import open_registry
    from tasks.registry import promote as decide
    from tell_core.errors import InputError

    if force != (reason is not None):
        raise InputError("--force and --reason TEXT belong together")
    decision = decide(open_registry(store), name, version, force_reason=reason)
    if as_json:
        print_json(decision.as_json())
    else:
        print(decision.sentence())
    if decision.outcome == "refused":
        raise typer.Exit(1)


@app.command()
@explained
def predict(
    uri: Uri,
    input_: Annotated[
        Path, typer.Option("--input", help="JSONL, CSV or Parquet with a column of prompts.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help=".jsonl, .csv or .parquet; <input>.predictions.jsonl by default."),
    ] = None,
    column: Annotated[str, typer.Option(help="Column of the prompts.")] = "prompt",
    base_model: Annotated[
        str | None, typer.Option(help="Where the base model lies, if not where it was.")
    ] = None,
    store: Store = None,
) -> None:
    """Answer every prompt of a file; the model adds its anchor prompt by itself.

    Answers are kept batch by batch: after a kill the same command goes on from there.
    """
    from tasks.registry import answering, find_version, open_registry
    from tell_core.answer_log import open_answers
    from tell_core.data.tables import check_output, read_prompts, write_predictions
    from tell_core.spec.identity import fingerprint

    out = output or input_.with_name(f"{input_.name.split('.')[0]}.predictions.jsonl")
    check_output(out)
    rows = read_prompts(input_, column)
    version = find_version(open_registry(store), uri)
    with answering(version, base_model) as model:
        prompts = model.bare([str(row[column]) for row in rows])
        num_at_once = model.batch_size * _BATCHES_AT_ONCE
        who = [version.name, version.version, version.source, base_model]
        with open_answers(out, fingerprint(who, num_at_once, prompts)) as log:
            for batch in _with_progress(model.answer, prompts, num_at_once, len(log.answers)):
                log.add(batch)
            write_predictions(rows, log.answers, out)
    print(out)


@app.command()
@explained
def replay(
    uri: Uri,
    out: Annotated[
        Path | None, typer.Option(help="New run directory; runs/replay-NAME-VERSION by default.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="name=value for what lies elsewhere now; repeatable."),
    ] = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Build a version again from what it holds; say bit-equal, within noise or different."""
    from dataclasses import asdict

    from tasks.registry import fetched, find_version, open_registry
    from tell_core.replaying import replay as rebuild

    version = find_version(open_registry(store), uri)
    directory = out or Path("runs") / f"replay-{version.name}-{version.version}"
    with fetched(version) as registered:
        found = rebuild(registered, directory, settings or [], _say)
    if as_json:
        print_json(asdict(found))
    else:
        print("\n".join(found.sentences()))
        print(f"built again in {directory}")
    if found.verdict == "different":
        raise typer.Exit(1)


def _with_progress(
    answer: Callable[[Sequence[str]], list[str]],
    prompts: Sequence[str],
    batch_size: int,
    num_done: int,
) -> Iterator[list[str]]:
    """Batches of answers from prompt ``num_done`` on: a bar on a terminal, lines elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=sys.stderr)
    started = last = time.monotonic()
    if num_done:
        _say(f"{num_done:,} of {len(prompts):,} were answered before")
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("answering", total=len(prompts), completed=num_done)
        for start in range(num_done, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            yield answer(batch)
            done = start + len(batch)
            bars.update(bar, completed=done)
            now = time.monotonic()
            if not console.is_terminal and (now - last > _LINE_EVERY_SECONDS):
                last = now
                left = (now - started) * (len(prompts) - done) / (done - num_done)
                _say(f"answered {done:,} of {len(prompts):,}, about {duration(left)} left")
    _say(f"answered {len(prompts) - num_done:,} prompts in {duration(time.monotonic() - started)}")


def _say(line: Any) -> None:
    print(line, file=sys.stderr, flush=True)
