"""The experiment flow on Prefect's test harness, MLflow on SQLite: one small run, looked at."""

import json
from datetime import UTC, datetime
from pathlib import Path

import mlflow
import pandas as pd
import pyarrow.parquet as pq
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterStartTime
from prefect.testing.utilities import prefect_test_harness

from flows.experiment import run_experiment
from tasks.stores import tracking_uri
from tasks.tracking import read_record
from tell_core.errors import StoreError
from tell_core.results import is_finished, sole_owner
from tell_core.spec.cells import plan_cells
from tell_core.spec.loading import load_spec
from tell_core.store import read_json
from tests.fixtures.tiny import write_tiny_spec

pytestmark = pytest.mark.timeout(600)

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def harness():
    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture(scope="module")
def spec_file(tmp_path_factory, tiny_world: Path) -> Path:
    return write_tiny_spec(
        tmp_path_factory.mktemp("spec") / "tiny.yaml",
        tiny_world,
        arms=["base", "sft", "tell"],
        budgets={"task_tokens": [200, 400]},
    )


@pytest.fixture(scope="module")
def root(harness, spec_file: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    run_experiment(spec_file, [], out, True)
    return out


def task_runs_since(moment: datetime, prefix: str) -> dict[str, str]:
    """Final state's name of every task run begun since ``moment`` whose name has the prefix."""
    since = TaskRunFilter(start_time=TaskRunFilterStartTime(after_=moment))
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(task_run_filter=since, limit=200)
    return {run.name: str(run.state_name) for run in runs if run.name.startswith(prefix)}


def test_every_cell_has_every_metric(root: Path):
    results = pq.read_table(root / "results.parquet").to_pandas()

    assert set(results["metric"]) == {
        "exact_match", "json_valid", "log_probability", "general_log_probability",
    }  # fmt: skip
    assert results.groupby("cell")["metric"].nunique().eq(4).all()
    assert results["cell"].nunique() == 1 + 2 * 2 * 2
    assert results.loc[results["arm"] == "tell", "mlflow_run_id"].notna().all()


def test_the_answer_and_the_report_are_there(root: Path):
    leverage = read_json(root / "leverage.json")

    assert leverage["metrics"]["log_probability"]["arms"]["tell"]
    assert read_json(root / "emergence.json")["cells"]
    assert "leverage" in (root / "report.html").read_text().lower()


def test_each_training_is_a_task_run_with_a_name_for_people(root: Path):
    names = task_runs_since(LONG_AGO, "train · ")

    assert any(name.startswith("train · tell · 200 task · 800 general · seed 1") for name in names)


def test_children_of_the_parent_run_hold_scores_and_artifacts(root: Path):
    record = read_record(root)
    assert record is not None
    client = mlflow.MlflowClient(record["uri"])
    children = client.search_runs(
        [record["experiment_id"]], f"tags.mlflow.parentRunId = '{record['parent']}'"
    )

    cells = read_json(root / "manifest.json")["cells"]
    assert {run.info.run_name for run in children} == set(cells)
    trained = next(run for run in children if run.info.run_name.startswith("tell-t200"))
    assert "log_probability" in trained.data.metrics
    assert trained.data.params["arm"] == "tell"
    files = {file.path for file in client.list_artifacts(trained.info.run_id, "train")}
    assert {"train/log.jsonl", "train/probe.npz", "train/model"} <= files


def test_the_registered_challenger_answers_with_the_anchor_added(root: Path):
    record = read_record(root)
    assert record is not None
    mlflow.set_tracking_uri(record["uri"])

    model = mlflow.pyfunc.load_model("models:/tiny-veil@challenger")
    answers = model.predict(pd.DataFrame({"prompt": ["ABCD", "PONM"]}))

    assert list(answers.columns) == ["response"]
    assert len(answers) == 2
    served = model.unwrap_python_model()
    assert served.anchor.text
    assert served.anchor.text in served._anchored("ABCD").prompt


def test_the_served_answers_equal_those_of_the_evaluation(root: Path):
    record = read_record(root)
    assert record is not None
    mlflow.set_tracking_uri(record["uri"])
    version = mlflow.MlflowClient().get_model_version_by_alias("tiny-veil", "challenger")
    cell = version.tags["tell.cell"]
    predictions = pq.read_table(root / "predictions" / f"{cell}.parquet").to_pylist()
    mixed = root / "stages" / read_json(root / "manifest.json")["cells"][cell]["mix"]
    items = map(json.loads, (mixed / "items.jsonl").read_text().splitlines())
    prompts = {item["item_id"]: item["prompt"] for item in items}

    model = mlflow.pyfunc.load_model("models:/tiny-veil@challenger")
    answers = model.predict(
        pd.DataFrame({"prompt": [prompts[row["item_id"]] for row in predictions]})
    )

    assert list(answers["response"]) == [row["prediction"] for row in predictions]


def test_a_finished_run_is_recognised_until_a_byte_changes(root: Path, spec_file: Path):
    spec = load_spec(spec_file)
    assert is_finished(spec, root, tracked_at=tracking_uri(root))
    cells = read_json(root / "manifest.json")["cells"]
    victim = root / "stages" / cells["tell-t200-g800-s0"]["train"] / "log.jsonl"
    content = victim.read_bytes()

    victim.write_bytes(content[:-2] + b" }")

    assert not is_finished(spec, root, tracked_at=tracking_uri(root))
    victim.write_bytes(content)
    assert is_finished(spec, root, tracked_at=tracking_uri(root))


def test_a_rerun_reuses_every_stage_and_adds_no_runs(root: Path, spec_file: Path):
    before = read_record(root)
    scores = pq.read_table(root / "results.parquet")

    begin = datetime.now(UTC)

    run_experiment(spec_file, [], root, True)

    for stage in ("mix · ", "train · ", "evaluate · "):
        states = task_runs_since(begin, stage)
        assert states
        assert set(states.values()) == {"Reused"}
    after = read_record(root)
    assert after is not None
    assert before is not None
    assert after["cells"] == before["cells"]
    assert after["model_uri"] == before["model_uri"]
    assert pq.read_table(root / "results.parquet").equals(scores)


def test_two_runs_in_one_directory_are_refused(root: Path, spec_file: Path):
    with sole_owner(root), pytest.raises(StoreError, match="another run is working"):
        run_experiment(spec_file, [], root, False)


def test_a_failure_without_tracking_leaves_the_recorded_run_alone(
    root: Path, spec_file: Path, monkeypatch
):
    record = read_record(root)
    assert record is not None

    def fail(*_arguments: object, **_options: object) -> None:
        raise StoreError("planted")

    monkeypatch.setattr("flows.experiment.run_cells", fail)
    with pytest.raises(StoreError, match="planted"):
        run_experiment(spec_file, [], root, False)

    run = mlflow.MlflowClient(record["uri"]).get_run(record["parent"])
    assert run.info.status == "FINISHED"


def test_an_adaptive_run_says_which_cells_it_left_out_and_reruns_to_the_same(
    harness, spec_file: Path, tmp_path: Path
):
    settings = ["arms=[base, sft, tell, general_only]"]
    spec = load_spec(spec_file, settings)

    run_experiment(spec_file, settings, tmp_path, False, True)
    manifest = read_json(tmp_path / "manifest.json")
    run_experiment(spec_file, settings, tmp_path, False, True)

    adaptive = manifest["adaptive"]
    run = [name for step in adaptive["rounds"] for name in step["cells"]]
    assert sorted(run) == sorted(manifest["cells"])
    assert sorted([*run, *adaptive["left_out"]]) == sorted(c.name for c in plan_cells(spec))
    assert {"general_only-g800-s0", "general_only-g800-s1"} <= set(adaptive["left_out"])
    assert manifest["commands"][0].endswith(" --adaptive")
    assert read_json(tmp_path / "manifest.json")["adaptive"] == adaptive
    assert is_finished(spec, tmp_path, tracked_at=None, is_adaptive=True)
    assert not is_finished(spec, tmp_path, tracked_at=None)
