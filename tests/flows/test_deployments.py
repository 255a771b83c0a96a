"""The deployments on real servers with a real worker: asked for, found done, approved, refused."""

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient

from flows import services
from flows.curation import changed_sources
from flows.scheduling import is_under_way, work_state
from tell_core.results import sole_owner
from tell_core.spec.loading import load_spec
from tests.fixtures.platform import FINAL, PROJECT, Platform, platform
from tests.fixtures.tiny import write_tiny_spec, write_tiny_world

pytestmark = pytest.mark.timeout(1200)
NAME = "tiny-veil"
DONE = "NothingToDo"
SMALL = {
    "arms": ["base", "sft"],
    "seeds": [0],
    "budgets": {"task_tokens": [400]},
    "training": {"learning_rate": 0.003, "epochs": 5},
}


def source(digest: str, name: str = "a") -> dict:
    return {"role": "general", "name": name, "files": [{"sha256": digest}]}


def test_sources_are_new_changed_or_gone_by_their_digest():
    before = {"sources": [source("1"), source("1", "b"), source("1", "c")]}
    now = {"sources": [source("1"), source("2", "b"), source("1", "d")]}

    changes = {row["source"]: row["change"] for row in changed_sources(before, now)}

    assert changes["c"] == "gone"
    assert changes["d"] == "new"
    assert " became " in changes["b"]
    assert "a" not in changes


def test_a_directory_is_under_way_while_a_run_holds_it(tmp_path: Path):
    assert not is_under_way(tmp_path / "none")
    with sole_owner(tmp_path):
        assert is_under_way(tmp_path)
    assert not is_under_way(tmp_path)


def test_work_that_another_run_does_is_not_begun(tmp_path: Path, tiny_world: Path):
    spec = load_spec(write_tiny_spec(tmp_path / "tiny.yaml", tiny_world))
    root = tmp_path / "run"

    first = work_state(spec, root, track=False, is_adaptive=False)
    with sole_owner(root):
        second = work_state(spec, root, track=False, is_adaptive=False)

    assert (first, second) == ("to do", "under way")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with platform(tmp_path_factory.mktemp("platform")) as running:
        yield running


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_world(tmp_path_factory.mktemp("own-world"))


@pytest.fixture(scope="module")
def form(tmp_path_factory: pytest.TempPathFactory, world: Path) -> dict:
    """What the form of an experiment is filled in with."""
    place = tmp_path_factory.mktemp("deployed")
    spec = write_tiny_spec(place / "tiny.yaml", world, **SMALL)
    return {"spec_file": str(spec), "settings": [], "out": str(place / "run")}


@pytest.fixture(scope="module")
def finished(servers: Platform, form: dict) -> dict:
    return servers.run("experiment", **form)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"seeds": ["many"]}, "integer"),
        ({"task_tokens": [0]}, "minimum"),
        ({"adaptive": "perhaps"}, "boolean"),
        ({"arms": ["tel"]}, "tel"),
        ({"settings": ["no value"]}, "no value"),
    ],
)
def test_the_form_refuses_what_the_specification_would(servers, form, wrong: dict, said: str):
    answer = servers.request("experiment", **(form | wrong))

    assert answer.status_code == 409
    assert said in answer.text


@pytest.mark.slow
def test_what_trains_goes_through_a_queue_that_lets_one_run_pass(servers: Platform):
    (queue,) = servers.post(
        "work_queues/filter", {"work_queues": {"name": {"any_": ["gpu"]}}}
    ).json()
    using = {
        name: servers.deployment(name)["work_queue_name"]
        for name in ("experiment", "weekly-sweep", "recheck-champion", "nightly-curation")
    }

    assert queue["concurrency_limit"] == 1
    assert using == {
        "experiment": "gpu",
        "weekly-sweep": "gpu",
        "recheck-champion": "gpu",
        "nightly-curation": "default",
    }


@pytest.mark.slow
def test_schedules_are_there_and_drop_what_overlaps(servers: Platform):
    for name in ("nightly-curation", "weekly-sweep", "recheck-champion"):
        deployed = servers.deployment(name)

        assert [entry["schedule"]["cron"] for entry in deployed["schedules"]]
        assert deployed["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"


@pytest.mark.slow
def test_an_experiment_runs_on_demand_and_a_second_request_finds_it_done(
    servers: Platform, form: dict, finished: dict
):
    again = servers.run("experiment", **form)

    assert finished["state_name"] == "Completed"
    assert finished["name"] == "request · tiny"
    assert again["state_name"] == "NothingToDo"


@pytest.mark.slow
def test_curation_by_night_does_nothing_until_a_source_changes(
    servers: Platform, form: dict, finished: dict, world: Path
):
    path = world / "general.jsonl"
    text = path.read_text()

    servers.run("nightly-curation", **form)
    unchanged = servers.run("nightly-curation", **form)
    path.write_text(text + json.dumps({"prompt": "a new one", "response": "indeed"}) + "\n")
    changed = servers.run("nightly-curation", **form)
    path.write_text(text)

    assert unchanged["state_name"] == "NothingToDo"
    assert changed["state_name"] == "Completed"
    keys = {artifact["key"] for artifact in servers.artifacts(changed["id"])}
    assert {"changes", "curation"} <= keys


@pytest.mark.slow
def test_a_cron_fires_and_its_run_finds_nothing_to_do(
    servers: Platform, form: dict, finished: dict
):
    servers.run("nightly-curation", **form)
    number = servers.deployment("nightly-curation")["id"]
    every_minute = {"schedule": {"cron": "* * * * *"}, "active": True, "parameters": form}
    (schedule,) = servers.post(f"deployments/{number}/schedules", [every_minute]).json()
    wanted = {
        "flow_runs": {"tags": {"all_": ["auto-scheduled"]}, "state": {"name": {"any_": [DONE]}}}
    }

    deadline = time.monotonic() + 400
    while not (fired := servers.post("flow_runs/filter", wanted).json()):
        assert time.monotonic() < deadline, "no scheduled run has come to its end"
        time.sleep(1.0)
    servers.delete(f"deployments/{number}/schedules/{schedule['id']}")

    assert {run["deployment_id"] for run in fired} == {number}
    assert all(run["auto_scheduled"] for run in fired)


@pytest.mark.slow
def test_of_several_late_runs_of_a_schedule_one_works(
    servers: Platform, world: Path, tmp_path: Path
):
    spec = write_tiny_spec(tmp_path / "late.yaml", world, **SMALL, name="late")
    form = {"spec_file": str(spec), "settings": [], "out": str(tmp_path / "late")}
    number = servers.deployment("nightly-curation")["id"]
    due = datetime.now(UTC) - timedelta(hours=4)

    asked = [
        servers.post(
            f"deployments/{number}/create_flow_run",
            {
                "parameters": form,
                "state": {
                    "type": "SCHEDULED",
                    "state_details": {"scheduled_time": (due + timedelta(hours=n)).isoformat()},
                },
            },
        ).json()["id"]
        for n in range(4)
    ]
    ended = Counter(servers.wait(run, FINAL)["state_name"] for run in asked)

    assert ended["Completed"] == 1
    assert set(ended) <= {"Completed", DONE, "Cancelled"}


def failure_of(servers: Platform, number: str) -> str:
    """What a failed run left on its page, and as an event."""
    wanted = {"filter": {"event": {"name": ["tell.flow.failed"]}}}
    deadline = time.monotonic() + 60
    while True:
        events = servers.post("events/filter", wanted).json()["events"]
        told = [e for e in events if number in e["related"][0]["prefect.resource.id"]]
        shown = [a for a in servers.artifacts(number) if a["key"] == "failure"]
        if told and shown:
            return str(json.loads(shown[0]["data"])[0]["message"])
        assert time.monotonic() < deadline, f"{len(told)} events, {len(shown)} artifacts"
        time.sleep(0.5)


@pytest.mark.slow
def test_a_run_that_fails_says_why_on_its_page_and_is_not_tried_again(
    servers: Platform, tmp_path: Path
):
    failed = servers.run("nightly-curation", spec_file=str(tmp_path / "none.yaml"), settings=[])

    assert failed["state_type"] == "FAILED"
    assert failed["run_count"] == 1
    assert "none.yaml" in failure_of(servers, failed["id"])


@pytest.mark.slow
def test_a_run_that_is_killed_says_so_on_its_page(servers: Platform, world: Path, tmp_path: Path):
    asked, lanes, _ = begin_endless(servers, world, tmp_path)

    psutil.Process(lanes[0].ppid()).kill()

    assert servers.wait(asked, FINAL, 180)["state_type"] == "CRASHED"
    assert "exited with status code" in failure_of(servers, asked)


@pytest.mark.slow
def test_the_weekly_sweep_runs_what_is_missing_and_nothing_twice(servers: Platform, world: Path):
    # A sweep writes to runs/<name> of the project, so the name is one that nobody else has.
    name = f"sweep-drill-{os.getpid()}"
    spec = write_tiny_spec(servers.home / "sweep.yaml", world, **SMALL, name=name)
    missing = servers.home / "missing.yaml"
    try:
        first = servers.run("weekly-sweep", spec_files=[str(spec)], settings=[], adaptive=False)
        again = servers.run("weekly-sweep", spec_files=[str(spec)], settings=[], adaptive=False)
        both = [str(missing), str(spec)]
        failed = servers.run("weekly-sweep", spec_files=both, settings=[], adaptive=False)
    finally:
        shutil.rmtree(PROJECT / "runs" / name, ignore_errors=True)

    assert first["state_name"] == "Completed"
    assert again["state_name"] == DONE
    assert failed["state_type"] == "FAILED"
    (table,) = [a for a in servers.artifacts(failed["id"]) if a["key"] == "sweep"]
    outcomes = {row["experiment"]: row["outcome"] for row in json.loads(table["data"])}
    assert outcomes["missing"].startswith("failed")
    assert outcomes["sweep"] == "finished"


@pytest.mark.slow
def test_a_promotion_waits_for_a_person_and_then_moves_the_alias(servers: Platform, finished: dict):
    asked = servers.request("promote", name=NAME, version=1).json()
    servers.wait(asked["id"], {"PAUSED"})
    client = MlflowClient(servers.mlflow, servers.mlflow)
    before = dict(client.get_registered_model(NAME).aliases)

    said = servers.post(
        f"flow_runs/{asked['id']}/resume",
        {"run_input": {"approve": True, "force_reason": "the first one"}},
    )
    done = servers.wait(asked["id"], FINAL)

    assert said.status_code in (200, 201), said.text
    assert "champion" not in before
    assert done["state_name"] == "Completed"
    assert client.get_registered_model(NAME).aliases["champion"] == "1"


@pytest.mark.slow
def test_a_champion_that_falls_on_fresh_data_raises_an_event(
    servers: Platform, finished: dict, world: Path, tmp_path: Path
):
    client = MlflowClient(servers.mlflow, servers.mlflow)
    client.set_registered_model_alias(NAME, "champion", "1")
    rows = map(json.loads, (world / "task_test.jsonl").read_text().splitlines())
    data = tmp_path / "fresh.jsonl"
    turned = [row | {"response": row["response"][::-1]} for row in rows]
    data.write_text("".join(json.dumps(row) + "\n" for row in turned))

    checked = servers.run("recheck-champion", name=NAME, data=str(data))
    again = servers.run("recheck-champion", name=NAME, data=str(data))

    assert checked["state_name"] == "Completed"
    assert again["state_name"] == "NothingToDo"
    wanted = {"filter": {"event": {"name": ["tell.champion.fallen"]}}}
    deadline = time.monotonic() + 30
    while not (events := servers.post("events/filter", wanted).json()["events"]):
        assert time.monotonic() < deadline, "no event has arrived"
        time.sleep(0.5)
    assert events[0]["payload"]["is_worse"]


def begin_endless(
    servers: Platform, world: Path, place: Path
) -> tuple[str, list[psutil.Process], Path]:
    """A run whose training goes on for hours: its number, its lanes, its directory."""
    changes = SMALL | {"name": "endless", "training": {"learning_rate": 0.003, "epochs": 100_000}}
    spec = write_tiny_spec(place / "endless.yaml", world, **changes)
    out = place / "endless"
    asked = servers.request("experiment", spec_file=str(spec), settings=[], out=str(out)).json()
    deadline = time.monotonic() + 400
    while not list(out.glob("stages/train-*.partial/log.jsonl")):
        assert time.monotonic() < deadline, "no training has begun"
        time.sleep(0.5)
    lanes = [
        child for child in psutil.Process(worker_of(servers)).children(recursive=True)
        if "spawn_main" in " ".join(child.cmdline())
    ]  # fmt: skip
    return str(asked["id"]), lanes, out


@pytest.mark.slow
def test_cancelling_a_run_by_the_page_stops_its_training(
    servers: Platform, world: Path, tmp_path: Path
):
    asked, lanes, out = begin_endless(servers, world, tmp_path)

    servers.post(
        f"flow_runs/{asked}/set_state",
        {"state": {"type": "CANCELLING", "name": "Cancelling"}, "force": False},
    )
    cancelled = servers.wait(asked, FINAL, 90)
    gone, alive = psutil.wait_procs(lanes, timeout=20)

    assert cancelled["state_type"] == "CANCELLED"
    assert gone
    assert not alive
    assert not is_under_way(out)


@pytest.mark.slow
def test_runs_that_are_lost_with_their_worker_keep_no_other_from_the_queue(
    servers: Platform, form: dict, finished: dict, world: Path, tmp_path: Path
):
    """As when the machine goes down: nobody is left to tell the server."""
    asked, _, _ = begin_endless(servers, world, tmp_path)
    worker = psutil.Process(worker_of(servers))
    killed = [*worker.children(recursive=True), worker]
    for process in killed:
        process.suspend()
    for process in killed:
        process.kill()
    psutil.wait_procs(killed, timeout=20)
    before = servers.get(f"flow_runs/{asked}")["state_type"]

    ports = [int(address.rpartition(":")[2]) for address in (servers.prefect, servers.mlflow)]
    services.up(servers.home, *ports, print)
    after = servers.get(f"flow_runs/{asked}")
    later = servers.run("experiment", 240, **form)

    assert before == "RUNNING"
    assert after["state_type"] == "CRASHED"
    assert "worker was gone" in after["state"]["message"]
    assert later["state_name"] == DONE


def worker_of(servers: Platform) -> int:
    (pid,) = (
        entry["pid"]
        for entry in json.loads((servers.home / "services.json").read_text())
        if entry["name"] == "worker"
    )
    return int(pid)
