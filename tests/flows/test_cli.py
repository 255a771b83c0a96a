"""The command line: its surface, its exit codes, what it says to wrong input."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer
from typer.testing import CliRunner, Result

from flows.cli import _leave_if_server_is_lost, app
from flows.local_server import ServerLostError
from flows.printing import explained
from tell_core.errors import TellError
from tests.fixtures.tiny import write_tiny_spec

runner = CliRunner()


def call(*arguments: object) -> Result:
    return runner.invoke(app, [str(argument) for argument in arguments])


def said(result: Result) -> str:
    return " ".join((result.output + result.stderr).split())


def processes_of(directory: Path) -> list[str]:
    """Command lines of processes that work in a run below ``directory``, servers included."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            home = process.environ().get("PREFECT_HOME", "")
            if process.pid != os.getpid() and home.startswith(str(directory)):
                found.append(" ".join(process.cmdline()))
    return found


def wait_until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def spec(tmp_path: Path, tiny_world: Path) -> Path:
    return write_tiny_spec(tmp_path / "spec.yaml", tiny_world)


def surface_of(group: Any, prefix: str = "") -> dict[str, list[str]]:
    """Options and arguments of every command, those of groups by both words."""
    surface: dict[str, list[str]] = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            surface |= surface_of(command, f"{name} ")
        else:
            options = [option for parameter in command.params for option in parameter.opts]
            surface[prefix + name] = sorted(options)
    return surface


@pytest.mark.parametrize(("error", "leaves"), [(ServerLostError, [1]), (TellError, [])])
def test_only_a_lost_server_ends_the_command_without_waiting(error, leaves, monkeypatch):
    left: list[int] = []
    monkeypatch.setattr("flows.cli.os._exit", left.append)

    @explained
    def command() -> None:
        raise error("gone")

    with pytest.raises(typer.Exit) as ended:
        command()
    end = SystemExit(ended.value.exit_code)
    end.__context__ = ended.value
    _leave_if_server_is_lost(end)

    assert left == leaves


def test_the_surface_is_frozen():
    surface = surface_of(typer.main.get_command(app))

    assert surface == {
        "demo": ["--no-track", "--out"],
        "run": ["--adaptive", "--no-track", "--out", "--runner", "--set", "spec"],
        "plan": ["--hours", "--json", "--out", "--set", "spec"],
        "curate": ["--json", "--out", "--set", "--show", "spec"],
        "mix": ["--json", "--out", "--set", "spec"],
        "results": ["--json", "--sql", "directory"],
        "report": ["directory"],
        "up": ["--home", "--mlflow-port", "--prefect-port"],
        "down": ["--home"],
        "status": ["--home", "--json"],
        "doctor": ["--json", "--out", "--set", "spec"],
        "fetch-model": ["--out", "--source"],
        "promote": ["--force", "--json", "--reason", "--store", "name", "version"],
        "trust add": ["--revision", "--yes", "model"],
        "trust list": ["--json"],
        "trust remove": ["model"],
        "predict": ["--base-model", "--column", "--input", "--output", "--store", "uri"],
        "replay": ["--json", "--out", "--set", "--store", "uri"],
        "cell export": ["--json", "--out", "--set", "--tar", "--to", "--with-model", "source"],
        "cell run": ["--device", "--model", "--share", "--threads", "bundles"],
        "cell import": ["--json", "--out", "bundles"],
        "quanta predictions": ["--json", "directory"],
        "quanta find": [
            *("--cell", "--data", "--dimensions", "--json", "--max-examples", "--max-tokens"),
            *("--no-track", "--out", "--seed", "--tokens", "source"),
        ],
        "quanta controls": ["--json", "--only", "--parity"],
        "anchor": [
            *("--candidates", "--examples", "--json", "--max-tokens", "--out", "--seed", "--set"),
            *("--shots", "--train", "spec"),
        ],
    }


def test_plan_counts_equal_the_mixtures(spec: Path, tmp_path: Path):
    planned = call("plan", spec, "--out", tmp_path / "run", "--json")
    mixed = call("mix", spec, "--out", tmp_path / "run", "--json")

    assert planned.exit_code == mixed.exit_code == 0
    cells = [row for row in json.loads(planned.stdout)["cells"] if "tuning" not in row["cell"]]
    for row, ledger in zip(cells, json.loads(mixed.stdout), strict=True):
        assert row["cell"] == ledger["cell"]
        assert row["task tokens"] == ledger["task_tokens"]
        assert row["general tokens"] == ledger["general_tokens"]
        assert row["rendered tokens"] == ledger["rendered_tokens"]
        assert row["steps"] == ledger["steps"]


def test_mix_tabulates_what_each_source_gives(spec: Path, tmp_path: Path):
    mixed = call("mix", spec, "--out", tmp_path / "run")
    ledgers = json.loads(call("mix", spec, "--out", tmp_path / "run", "--json").stdout)

    assert mixed.exit_code == 0
    assert "{" not in mixed.stdout
    lines = [line.split() for line in mixed.stdout.splitlines()]
    for ledger in ledgers:
        for source in ledger["sources"]:
            row = [*ledger["cell"].split(), source["role"], source["source"]]
            assert sum(line[: len(row)] == row for line in lines) == 1


def test_plan_proposes_what_fits_and_the_proposal_is_a_plan_again(spec: Path, tmp_path: Path):
    proposed = call("plan", spec, "--out", tmp_path / "run", "--hours", 1000, "--json")
    whole = json.loads(proposed.stdout)
    settings = [word for setting in whole["settings"] for word in ("--set", setting)]
    again = json.loads(call("plan", spec, "--out", tmp_path / "run", "--json", *settings).stdout)

    assert proposed.exit_code == 0
    assert whole["left_out"] == []
    assert again["cells"] == whole["cells"]
    hours = [part["hours"] for part in whole["designs"]]
    assert hours == sorted(hours, reverse=True)


def test_plan_says_what_the_design_can_show(spec: Path, tmp_path: Path):
    result = call("plan", spec, "--out", tmp_path / "run", "--hours", 1e-9)

    assert "smallest difference in exact_match (2 seeds, 12 items) shown with 80%" in said(result)
    assert "smallest difference in log_probability (2 seeds, 12 items): unknown" in said(result)
    assert "nothing fits" in said(result)


def test_an_adaptive_run_without_both_sides_is_refused(spec: Path, tmp_path: Path):
    result = call("run", spec, "--adaptive", "--out", tmp_path / "run", "--set", "arms=[base, sft]")

    assert result.exit_code == 2
    assert "compares arm `tell` with `sft`" in said(result)


def test_curate_lists_what_was_kept(spec: Path, tmp_path: Path):
    result = call("curate", spec, "--out", tmp_path / "run", "--json")

    assert result.exit_code == 0
    assert all(row["read"] >= row["kept"] > 0 for row in json.loads(result.stdout)["sources"])


def test_curate_writes_a_page_to_look_at_the_corpus(spec: Path, tmp_path: Path):
    result = call("curate", spec, "--out", tmp_path / "run", "--json")

    page = Path(json.loads(result.stdout)["profile"])
    assert "Tell corpus" in page.read_text(encoding="utf-8")


def test_curate_says_which_format_it_found(spec: Path, tmp_path: Path):
    result = call("curate", spec, "--out", tmp_path / "run")

    assert "prompt_response (found: prompt, response)" in said(result)


@pytest.mark.parametrize("kind", ["rejects", "duplicates", "overlap"])
def test_curate_shows_evidence_row_by_row(spec: Path, tmp_path: Path, tiny_world: Path, kind: str):
    general = (tiny_world / "general.jsonl").read_text().splitlines()
    test = json.loads((tiny_world / "task_test.jsonl").read_text().splitlines()[0])
    rows = [json.loads(line) for line in general]
    leaking = write_lines(tmp_path / "leaking.jsonl", [*rows, rows[0], test])
    arguments = ("curate", spec, "--out", tmp_path / "run", "--set", f"general=[{leaking}]")

    shown = call(*arguments, "--show", kind)
    rows = json.loads(call(*arguments, "--show", kind, "--json").stdout)

    last = rows[-1]
    assert shown.exit_code == 0
    assert f"leaking.jsonl, line {last['line']}" in said(shown)
    assert len(last["text"]) > 0
    assert {"duplicates": "kept_text", "overlap": "matched_text", "rejects": "detail"}[kind] in last


def test_unknown_evidence_is_refused_before_any_work(spec: Path, tmp_path: Path):
    result = call("curate", spec, "--out", tmp_path / "run", "--show", "all")

    assert result.exit_code == 2
    assert "--show takes rejects, duplicates, overlap" in said(result)
    assert not (tmp_path / "run").exists()


BAD_SPECS = {
    "missing file": ({"task": {"train": "nowhere.jsonl"}}, "nowhere.jsonl"),
    "wrong columns": ({"task": {"train": "columns.jsonl"}}, "column"),
    "empty task": ({"task": {"train": "empty.jsonl"}}, "empty.jsonl"),
    "budget below the first example": ({"budgets": {"task_tokens": [1]}}, "budget"),
    "anchor longer than the context": (
        {"anchor": {"source": "given", "text": "copy " * 100}},
        "anchor",
    ),
    "unknown metric": ({"evaluation": {"metrics": ["exact_mach"]}}, "exact_match"),
    "unknown arm": ({"arms": ["tel"]}, "'tell'"),
    "unknown key": ({"training": {"epoch": 1}}, "`epochs`"),
    "model not found": ({"model": {"id": "nobody/nothing"}}, "nobody/nothing"),
    "missing chat template": ({"model": {"chat_template": "none.jinja"}}, "none.jinja"),
    "no task budget": ({"budgets": {"task_tokens": []}}, "budgets.task_tokens"),
    "no learning rate": ({"training": {"learning_rate": []}}, "training.learning_rate"),
    "task name unfit for a registry": ({"task": {"name": "is/en"}}, "task.name"),
}


# Found before a server is started; the others are found by the flow.
FOUND_AT_ONCE = {"missing file", "unknown metric", "unknown arm", "unknown key", "model not found"}


@pytest.fixture
def bad_spec(tmp_path: Path, tiny_world: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "columns.jsonl", [{"question": "a", "answer": "b"}] * 3)
    write_lines(tmp_path / "empty.jsonl", [])
    return lambda case: write_tiny_spec(tmp_path / "bad.yaml", tiny_world, **BAD_SPECS[case][0])


@pytest.mark.parametrize("case", BAD_SPECS)
def test_bad_input_exits_2_and_says_what_is_wrong(case: str, bad_spec, tmp_path: Path):
    result = call("plan", bad_spec(case), "--out", tmp_path / "run")

    assert result.exit_code == 2, said(result)
    assert BAD_SPECS[case][1] in said(result)


@pytest.mark.parametrize("case", sorted(FOUND_AT_ONCE))
def test_what_can_be_seen_at_once_stops_a_run_before_it_starts(case: str, bad_spec, tmp_path: Path):
    result = call("run", bad_spec(case), "--out", tmp_path / "run")

    assert result.exit_code == 2, said(result)
    assert BAD_SPECS[case][1] in said(result)
    assert not (tmp_path / "run" / "prefect").exists()


@pytest.mark.timeout(400)
def test_bad_data_stops_a_run_with_exit_code_2_and_leaves_no_server(bad_spec, tmp_path: Path):
    spec = bad_spec("budget below the first example")

    found = subprocess.run(
        [sys.executable, "-m", "flows.cli", "run", str(spec), "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )

    assert found.returncode == 2, found.stderr
    assert "budget" in found.stderr
    assert "Traceback" not in found.stderr
    assert not list(tmp_path.glob("run/stages/train-*"))
    assert not processes_of(tmp_path)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("number", "codes"),
    [
        (signal.SIGTERM, {143, -signal.SIGTERM}),
        pytest.param(signal.SIGINT, {130}, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_run_that_trains_and_a_rerun_goes_on_from_its_checkpoint(
    number: int, codes: set[int], tmp_path: Path, tiny_world: Path
):
    long = write_tiny_spec(
        tmp_path / "long.yaml",
        tiny_world,
        arms=["sft"],
        seeds=[0],
        training={"epochs": 100_000, "learning_rate": 0.001},
    )
    run = tmp_path / "run"
    command = [sys.executable, "-m", "flows.cli", "run", str(long), "--out", str(run), "--no-track"]
    child = subprocess.Popen(
        command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    )
    wait_until(lambda: list(run.glob("stages/train-*.partial/log.jsonl")), seconds=200)

    child.send_signal(number)

    assert child.wait(timeout=40) in codes
    wait_until(lambda: not processes_of(tmp_path), seconds=15)
    assert list(run.glob("stages/train-*.partial/checkpoints/*"))


def test_a_run_directory_of_another_experiment_is_refused(spec: Path, tmp_path: Path, tiny_world):
    assert call("curate", spec, "--out", tmp_path / "run").exit_code == 0
    other = write_tiny_spec(tmp_path / "other.yaml", tiny_world, name="other")

    result = call("curate", other, "--out", tmp_path / "run")

    assert result.exit_code == 2
    assert "holds the experiment 'tiny'" in said(result)


def test_a_directory_that_is_no_run_is_refused(spec: Path, tmp_path: Path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")

    result = call("plan", spec, "--out", tmp_path / "home")

    assert result.exit_code == 2
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize("command", ["results", "report"])
def test_a_directory_without_results_is_refused(command: str, tmp_path: Path):
    result = call(command, tmp_path)

    assert result.exit_code == 2
    assert "tell run" in said(result)


def test_a_missing_specification_is_refused(tmp_path: Path):
    result = call("plan", tmp_path / "none.yaml")

    assert result.exit_code == 2
    assert "none.yaml" in said(result)
