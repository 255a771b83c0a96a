"""Cells on clusters: the same results as on this machine."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient
from prefect.testing.utilities import prefect_test_harness

from flows import experiment, runners
from flows.experiment import run_experiment
from flows.runners import check_runner
from tasks import recording
from tasks.cell_runs import child_runs
from tasks.progress import DONE, listen
from tasks.tracking import read_record
from tell_core.errors import InputError
from tell_core.lanes import VISIBLE_GPUS
from tell_core.spec.model import TrainingSpec
from tell_core.store import read_json
from tests.fixtures.tiny import write_tiny_spec

SMALL = {
    "arms": ["base", "sft", "tell"],
    "budgets": {"task_tokens": [200, 400], "general_tokens": 800},
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("local", ("local", None)),
        ("dask", ("dask", None)),
        ("dask=tcp://10.0.0.1:8786", ("dask", "tcp://10.0.0.1:8786")),
        ("ray=auto", ("ray", "auto")),
    ],
)
def test_a_runner_is_its_kind_and_perhaps_an_address(
    given: str, expected: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())

    assert check_runner(given) == expected


@pytest.mark.parametrize("given", ["slurm", "", "local=here", "Dask"])
def test_an_unknown_runner_is_refused(given: str):
    with pytest.raises(InputError, match="local, dask and ray"):
        check_runner(given)


@pytest.mark.parametrize("kind", ["dask", "ray"])
def test_a_runner_that_is_not_installed_names_its_extra(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)

    with pytest.raises(InputError, match=rf"pip install 'tell\[{kind}\]'"):
        check_runner(kind)


@pytest.fixture(scope="module")
def harness():
    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory, tiny_world: Path) -> Path:
    return write_tiny_spec(tmp_path_factory.mktemp("spec") / "spec.yaml", tiny_world, **SMALL)


@pytest.fixture(scope="module")
def local(harness: None, spec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("local") / "run"
    run_experiment(spec, [], root, False)
    return root


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("runner", ["dask", "ray"])
def test_a_cluster_gives_the_results_of_this_machine(
    runner: str, local: Path, spec: Path, tmp_path: Path
):
    pytest.importorskip(f"prefect_{runner}")

    done: list[str] = []
    silence = listen(lambda label, phase, *_: done.append(label) if phase == DONE else None)

    run_experiment(spec, [], tmp_path, False, False, runner)

    silence()
    columns = ["cell", "metric", "score", "task_tokens", "steps"]
    ours, theirs = (
        pq.read_table(root / "results.parquet", columns=columns) for root in (tmp_path, local)
    )
    assert ours.equals(theirs)
    manifests = [read_json(root / "manifest.json") for root in (tmp_path, local)]
    assert manifests[0]["cells"] == manifests[1]["cells"]
    assert manifests[0]["tuning"] == manifests[1]["tuning"]
    assert len(set(done)) == len(done) == len(manifests[0]["cells"]) + len(manifests[0]["tuning"])
    for cell in manifests[0]["cells"].values():
        paths = [
            root / "stages" / cell["evaluate"] / "predictions.jsonl" for root in (tmp_path, local)
        ]
        assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("runner", ["dask", "ray"])
def test_cells_of_a_cluster_are_recorded_while_others_are_computed(
    runner: str, harness: None, spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip(f"prefect_{runner}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(recording, "EVERY_SECONDS", 0.5)
    root, record_rest, before = tmp_path / "run", experiment.track_cells, set[str]()

    def finished() -> list[str]:
        record = read_record(root)
        assert record is not None
        found = child_runs(MlflowClient(record["uri"], record["uri"]), record)
        return [str(run.info.run_name) for run in found if run.info.status == "FINISHED"]

    def track_cells(*arguments: Any) -> Any:
        before.update(finished())
        return record_rest(*arguments)

    monkeypatch.setattr(experiment, "track_cells", track_cells)

    run_experiment(spec, [], root, True, False, runner)

    cells = read_json(root / "manifest.json")["cells"]
    assert before
    assert sorted(finished()) == sorted(cells)


@pytest.mark.slow
def test_every_worker_of_a_local_dask_cluster_sees_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
):
    pytest.importorskip("prefect_dask")
    from distributed import Client, LocalCluster

    monkeypatch.setattr(runners, "gpus_of_lanes", lambda _: ["GPU-7f", "5"])
    runner = runners._dask(2, None, TrainingSpec()).__enter__()

    with LocalCluster(**runner.cluster_kwargs) as cluster, Client(cluster) as client:
        client.wait_for_workers(2, timeout=120)
        seen = client.run(os.getenv, VISIBLE_GPUS)

    assert sorted(seen.values()) == ["5", "GPU-7f"]


@pytest.mark.parametrize(
    ("settings", "gpus", "expected"),
    [
        ({"device": "auto"}, ["0", "1"], 1),
        ({"device": "auto", "num_ranks": 2}, ["0,1"], 2),
        ({"device": "auto"}, [], 0),
        ({"device": "cuda", "num_ranks": 2}, [], 2),  # the cluster has them, this machine has none
        ({"device": "cpu"}, [], 0),
    ],
)
def test_a_ray_task_asks_for_a_gpu_for_each_rank(
    settings: dict[str, Any], gpus: list[str], expected: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(runners, "gpus_of_lanes", lambda _: gpus)

    assert runners._gpus_per_training(TrainingSpec(**settings)) == expected
