"""The quanta flow on Prefect's test harness, recorded in MLflow on SQLite."""

from pathlib import Path

import mlflow
import pytest
from prefect.client.orchestration import get_client
from prefect.testing.utilities import prefect_test_harness

from flows.quanta import run_quanta
from tasks.stores import tracking_uri
from tasks.tracking import connect, read_record
from tell_core.analysis.quanta.discovery import DiscoverySettings
from tell_core.analysis.quanta.stage import Subject
from tell_core.pipeline import curate_stage, run_cell
from tell_core.results import write_results, write_spec
from tell_core.spec.cells import Cell
from tell_core.spec.model import Candidate, ExperimentSpec
from tell_core.store import write_json
from tests.fixtures.tiny import tiny_fields

pytestmark = pytest.mark.timeout(600)

# A tiny model has learned next to nothing: every loss qualifies.
SETTINGS = DiscoverySettings(num_tokens=40, num_dimensions=128, floor=0, ceiling=99, ngram=0)


@pytest.fixture(scope="module")
def harness():
    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture(scope="module")
def own_store():
    """MLflow's store beside the run, whatever server an earlier test named."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


@pytest.fixture(scope="module")
def root(harness, own_store, tiny_world: Path, tmp_path_factory) -> Path:
    """A run of two cells with an MLflow run of its own."""
    root = tmp_path_factory.mktemp("runs") / "tiny"
    fields = tiny_fields(tiny_world) | {"arms": ["sft", "tell"], "seeds": [0]}
    spec = ExperimentSpec.model_validate(fields)
    curated = curate_stage(spec, root)
    cells = [Cell("sft", 200, None, 0), Cell("tell", 200, 800, 0)]
    outcomes = [run_cell(spec, cell, curated, Candidate(0.003, 1)) for cell in cells]
    write_spec(spec, root)
    write_results(spec, root, curated, outcomes, {})
    client = connect(root)
    experiment = client.create_experiment("tiny", (root.parent / "mlartifacts").as_uri())
    parent = client.create_run(experiment).info.run_id
    write_json(root / "tracking.json", {"uri": tracking_uri(root), "parent": parent})
    return root


@pytest.fixture(scope="module")
def answer(root: Path):
    subject = Subject.choose(str(root), cell=None, files=[], out=Path("unused"))
    return run_quanta(subject, SETTINGS)


def last_task_runs() -> dict[str, str]:
    """State's name of each task run by its name, the latest of each."""
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(limit=200)
    runs = sorted(runs, key=lambda run: run.start_time)
    return {run.name: str(run.state_name) for run in runs}


def test_the_answer_names_stage_page_and_largest_clusters(root: Path, answer):
    assert answer["name"].startswith("tell-t200")
    assert Path(answer["page"]) == root / "quanta" / f"{answer['name']}.html"
    assert Path(answer["page"]).exists()
    assert Path(answer["stage"], "_SUCCESS").exists()
    assert answer["clusters"]


def test_every_stage_is_a_task_run_with_a_name_for_people(answer):
    names = set(last_task_runs())

    for stage in ("discover", "draw", "track quanta", "show"):
        assert f"{stage} · {answer['name']}" in names


def test_the_run_of_the_experiment_gets_page_clusters_and_numbers(root: Path, answer):
    record = read_record(root)
    assert record is not None
    client = mlflow.MlflowClient(record["uri"])

    files = {
        Path(file.path).name
        for file in client.list_artifacts(record["parent"], f"quanta/{answer['name']}")
    }
    assert files == {f"{answer['name']}.html", "summary.json", "clusters.json"}
    metrics = client.get_run(record["parent"]).data.metrics
    assert metrics[f"quanta/{answer['name']}/num_clusters"] >= 2


def test_what_was_found_is_shown_as_reused_and_may_stay_unrecorded(root: Path, answer, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("recorded")

    monkeypatch.setattr("flows.quanta.track_quanta", refuse)

    again = run_quanta(Subject(root, answer["name"]), SETTINGS, track=False)

    assert again == answer | {"reused": True}
    assert last_task_runs()[f"discover · {answer['name']}"] == "Reused"


def test_a_model_is_looked_at_on_files(harness, tiny_world: Path, tmp_path: Path):
    subject = Subject.choose(
        str(tiny_world / "base_init"), cell=None,
        files=[str(tiny_world / "general.jsonl")], out=tmp_path,
    )  # fmt: skip

    found = run_quanta(subject, SETTINGS, max_tokens=64, max_examples=30)

    assert found["name"] == "base_init"
    assert Path(found["page"]).is_relative_to(tmp_path)
