"""The registry on three small versions: promoted, refused, forced, looked at again, replayed."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import httpx
import mlflow
import pandas as pd
import psutil
import pytest
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from flows.cli import app
from tasks.registration import register_best
from tasks.registry import (
    answering,
    champion_of,
    compare,
    fetched,
    find_version,
    note_recheck,
    open_registry,
    promote,
    recheck,
)
from tasks.tracking import connect
from tell_core.analysis.summary import analyse_run
from tell_core.answer_log import AnswerLog
from tell_core.errors import InputError, ModelError
from tell_core.pipeline import curate_stage, run_cell
from tell_core.registered import RegisteredVersion, bare_prompts, evaluate_version
from tell_core.replaying import changed_inputs, noise_of, replay
from tell_core.results import write_results, write_spec
from tell_core.spec.cells import plan_cells
from tell_core.spec.loading import load_spec
from tell_core.spec.model import SourceSpec
from tell_core.store import read_json, write_json
from tests.fixtures.tiny import write_tiny_spec

pytestmark = pytest.mark.timeout(300)
NAME = "tiny-veil"


class Registry(NamedTuple):
    client: MlflowClient
    store: str
    world: Path


def register(client: MlflowClient, spec_file: Path, root: Path) -> str:
    """Run every cell of an experiment here and register the best."""
    spec = load_spec(spec_file)
    root.mkdir()
    write_spec(spec, root)
    curated = curate_stage(spec, root)
    outcomes = [
        run_cell(spec, cell, curated, spec.training.candidates[0]) for cell in plan_cells(spec)
    ]
    write_results(spec, root, curated, outcomes, {})
    analyse_run([outcome.record() for outcome in outcomes], spec, root)
    experiment = client.get_experiment_by_name("tiny")
    place = (root.parent / "artifacts").as_uri()
    number = experiment.experiment_id if experiment else client.create_experiment("tiny", place)
    record = {"parent": client.create_run(number).info.run_id}
    uri = register_best(client, spec, root, record, curated, outcomes)
    assert uri is not None
    return uri


def registered_at(place: Path, instruction: str = "") -> RegisteredVersion:
    """Files of a version that was never trained."""
    anchor = {"text": "", "position": "before", "own_instruction": instruction}
    write_json(place / "version" / "anchor.json", anchor | {"num_anchor_tokens": 0})
    return RegisteredVersion(place.name, place / "version", place / "train-0")


def stand_in_for_the_registry(
    monkeypatch: pytest.MonkeyPatch, *versions: RegisteredVersion
) -> list[Any]:
    """Let the registry hold these; returns them as it lists them, numbered from 1."""
    listed = [SimpleNamespace(name="m", version=str(n), source="") for n in range(1, 9)]

    @contextmanager
    def fetch(version: Any) -> Iterator[RegisteredVersion]:
        yield versions[int(version.version) - 1]

    monkeypatch.setattr("tasks.registry.fetched", fetch)
    monkeypatch.setattr("tasks.registry.open_registry", lambda _store: None)
    monkeypatch.setattr("tasks.registry.find_version", lambda _client, _uri: listed[0])
    return listed[: len(versions)]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, tiny_world: Path) -> Registry:
    """Version 1 barely trained, version 2 trained well, version 3 tested on other items."""
    place = tmp_path_factory.mktemp("registry")
    client = connect(place / "run", f"sqlite:///{place / 'mlflow.db'}")
    shared = {"budgets": {"task_tokens": [400]}, "seeds": [0], "arms": ["base", "sft"]}
    plans = (
        {"training": {"learning_rate": 1e-5}},
        {"training": {"learning_rate": 3e-3, "epochs": 20}},
        {"training": {"learning_rate": 1e-4}, "evaluation": {"max_items": 11}},
    )
    for number, plan in enumerate(plans, start=1):
        spec = write_tiny_spec(place / f"{number}.yaml", tiny_world, **shared, **plan)
        register(client, spec, place / f"run-{number}")
    return Registry(client, str(place / "mlflow.db"), tiny_world)


@pytest.fixture
def fresh(registry: Registry) -> MlflowClient:
    """The registry without a champion."""
    if champion_of(registry.client, NAME):
        registry.client.delete_registered_model_alias(NAME, "champion")
    for number in (1, 2, 3):
        version = registry.client.get_model_version(NAME, str(number))
        for key in [key for key in version.tags if key.startswith(("tell.promotion", "tell.rec"))]:
            registry.client.delete_model_version_tag(NAME, str(number), key)
    return registry.client


def champion_number(client: MlflowClient) -> str:
    champion = champion_of(client, NAME)
    assert champion is not None
    return str(champion.version)


def call(registry: Registry, *arguments: str):
    return CliRunner().invoke(app, [*arguments, "--store", registry.store])


@pytest.mark.slow
def test_the_report_card_says_all_that_a_user_must_know(registry: Registry):
    with fetched(registry.client.get_model_version(NAME, "2")) as version:
        card = version.card

    assert card["contamination"]["verdict"].startswith("clean")
    assert card["scores"]["log_probability"]["num_items"] == 12
    assert card["ledger"]["task_tokens"] <= 400
    assert {row["licence"] for row in card["data"]} == {"not stated"}
    assert all(len(digest) == 64 for row in card["data"] for digest in row["sha256"])
    assert card["price"][0]["metric"] == "general_log_probability"
    assert card["reproduce"]["command"].startswith("tell run ")
    assert card["reproduce"]["weights"]
    page = registry.client.get_model_version(NAME, "2").description
    assert "## Price in other abilities" in page


@pytest.mark.slow
def test_the_input_example_is_of_the_test_set_and_the_signature_is_there(registry: Registry):
    info = mlflow.models.get_model_info(f"models:/{NAME}/2")
    with fetched(registry.client.get_model_version(NAME, "2")) as version:
        example = read_json(version.version.parents[1] / "serving_input_example.json")
        prompts = list(pd.read_parquet(version.items)["prompt"])

    assert info.signature.inputs.input_names() == ["prompt"]
    assert info.signature.outputs.input_names() == ["response"]
    assert example["dataframe_split"]["data"] == [[prompt] for prompt in prompts[:2]]


@pytest.mark.slow
def test_the_first_version_must_beat_the_base_model(fresh: MlflowClient):
    decision = promote(fresh, NAME, "2")

    assert decision.outcome == "promoted"
    assert decision.against == "the base model"
    assert champion_number(fresh) == "2"


@pytest.mark.slow
def test_a_worse_version_is_refused_and_the_comparison_is_kept(fresh: MlflowClient):
    promote(fresh, NAME, "2")

    decision = promote(fresh, NAME, "1")

    assert decision.outcome == "refused"
    assert champion_number(fresh) == "2"
    version = fresh.get_model_version(NAME, "1")
    assert version.tags["tell.promotion"] == "refused"
    path = fresh.download_artifacts(version.run_id, version.tags["tell.promotion.file"])
    kept = read_json(Path(path))
    assert kept["comparison"]["high"] < 0
    assert kept["against"] == "version 2"


@pytest.mark.slow
def test_a_better_version_takes_over(fresh: MlflowClient):
    promote(fresh, NAME, "1", force_reason="a start")

    decision = promote(fresh, NAME, "2")

    assert decision.outcome == "promoted"
    assert champion_number(fresh) == "2"


@pytest.mark.slow
def test_force_needs_a_reason_which_is_kept(registry: Registry, fresh: MlflowClient):
    promote(fresh, NAME, "2")

    without = call(registry, "promote", NAME, "1", "--force")
    forced = call(registry, "promote", NAME, "1", "--force", "--reason", "the other one is slow")

    assert without.exit_code == 2
    assert forced.exit_code == 0
    tags = fresh.get_model_version(NAME, "1").tags
    assert tags["tell.promotion"] == "forced"
    assert tags["tell.promotion.reason"] == "the other one is slow"


@pytest.mark.slow
def test_a_refused_promotion_exits_1_and_a_wrong_name_2(registry: Registry, fresh: MlflowClient):
    promote(fresh, NAME, "2")

    assert call(registry, "promote", NAME, "1").exit_code == 1
    assert call(registry, "promote", NAME, "9").exit_code == 2
    missing = call(registry, "promote", "nobody", "1")
    assert missing.exit_code == 2
    assert NAME in missing.stderr


@pytest.mark.slow
def test_an_incumbent_tested_on_other_items_is_tested_on_those_of_the_challenger(
    fresh: MlflowClient,
):
    against, compared = compare(
        fresh.get_model_version(NAME, "3"), fresh.get_model_version(NAME, "2")
    )

    assert against == "version 2"
    assert compared.num_items == 11
    assert compared.is_paired
    assert compared.is_worse


SCORED = [{"item": str(n), "stats": {"log_probability": [-1.0, 1]}} for n in range(3)]


def measured_at(
    place: Path, world: Path, source: str | None = None, **evaluation: Any
) -> RegisteredVersion:
    """A version with results on three items, whose log-probability all is -1 per token."""
    version = registered_at(place)
    write_tiny_spec(version.version / "spec.resolved.yaml", world, evaluation=evaluation)
    sources = {name: source for name in evaluation.get("metrics", []) if source}
    write_json(version.version / "report_card.json", {"reproduce": {"metric_sources": sources}})
    lines = "".join(json.dumps(row) + "\n" for row in SCORED)
    (version.version / "results.jsonl").write_text(lines)
    return version


def evaluated_when_compared(
    monkeypatch: pytest.MonkeyPatch, candidate: RegisteredVersion, champion: RegisteredVersion
) -> list[str]:
    """Names of the versions that a comparison evaluates instead of using their results."""
    evaluated: list[str] = []

    def evaluate(version: RegisteredVersion, *_: Any, **__: Any) -> list[dict]:
        evaluated.append(version.name)
        return SCORED

    monkeypatch.setattr("tasks.registry.evaluate_version", evaluate)
    compare(*stand_in_for_the_registry(monkeypatch, candidate, champion))
    return evaluated


@pytest.mark.parametrize(
    "other",
    [
        {"max_new_tokens": 3},
        {"stop": ["."]},
        {"temperature": 0.5},
        {"parse": {"kind": "text", "drop_prefix": "A: "}},
        {"metrics": [{"name": "exact_match", "normalise": True}]},
    ],
)
def test_an_incumbent_measured_otherwise_is_evaluated_again(
    other: dict, tmp_path: Path, tiny_world: Path, monkeypatch: pytest.MonkeyPatch
):
    candidate = measured_at(tmp_path / "candidate", tiny_world)
    champion = measured_at(tmp_path / "champion", tiny_world, **other)

    assert evaluated_when_compared(monkeypatch, candidate, champion) == ["champion"]


def test_kept_results_are_used_where_only_the_speed_was_another(
    tmp_path: Path, tiny_world: Path, monkeypatch: pytest.MonkeyPatch
):
    candidate = measured_at(tmp_path / "candidate", tiny_world)
    champion = measured_at(tmp_path / "champion", tiny_world, batch_size=3)

    assert evaluated_when_compared(monkeypatch, candidate, champion) == []


@pytest.mark.parametrize(
    ("then", "incumbents", "evaluated"),
    [
        ("now", "now", []),
        ("now", "before", ["champion"]),
        ("before", "now", ["champion", "candidate"]),
        (None, None, ["champion", "candidate"]),
    ],
)
def test_results_of_an_own_metric_are_compared_only_from_one_source(
    then: str | None, incumbents: str | None, evaluated: list[str],
    tmp_path: Path, tiny_world: Path, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr("tell_core.evaluation.metrics.source_digest", lambda _name: "now")
    metrics = ["tests.tasks.test_registry:own_metric"]
    candidate = measured_at(tmp_path / "candidate", tiny_world, then, metrics=metrics)
    champion = measured_at(tmp_path / "champion", tiny_world, incumbents, metrics=metrics)

    assert evaluated_when_compared(monkeypatch, candidate, champion) == evaluated


def own_metric(prediction: str | None, reference: str) -> float:
    return float(prediction == reference)


@pytest.mark.slow
def test_testing_a_version_again_gives_what_was_registered(fresh: MlflowClient):
    promote(fresh, NAME, "2")

    found = recheck(fresh, NAME, again=True)

    # The test file holds 24 items, of which 12 were drawn: the score is another, the model is not.
    assert found.comparison is not None
    assert found.comparison.num_items == 24
    assert not found.has_fallen


@pytest.mark.slow
def test_data_that_were_looked_at_are_not_looked_at_again(fresh: MlflowClient):
    promote(fresh, NAME, "2")
    first = recheck(fresh, NAME)
    unnoted = recheck(fresh, NAME)
    note_recheck(fresh, first)

    found = recheck(fresh, NAME)

    assert unnoted.is_new
    assert not found.is_new
    assert found.comparison is None


@pytest.mark.slow
def test_a_fall_on_fresh_data_is_seen(registry: Registry, fresh: MlflowClient, tmp_path: Path):
    promote(fresh, NAME, "2")
    rows = map(json.loads, (registry.world / "task_test.jsonl").read_text().splitlines())
    turned = [row | {"response": row["response"][::-1]} for row in rows]
    data = tmp_path / "fresh.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in turned))

    found = recheck(fresh, NAME, SourceSpec(path=str(data)))

    assert found.has_fallen
    assert fresh.get_model_version(NAME, "2").tags["tell.recheck"] == "fallen"


@pytest.mark.slow
def test_without_a_champion_there_is_nothing_to_check(fresh: MlflowClient):
    with pytest.raises(InputError, match="no champion"):
        recheck(fresh, NAME)


@pytest.mark.slow
def test_raw_task_files_do_not_get_the_anchor_twice(registry: Registry):
    with fetched(registry.client.get_model_version(NAME, "2")) as version:
        prefix = version.anchor.own_instruction

        assert bare_prompts([f"{prefix}AB", f"{prefix}CD"], version.anchor) == ["AB", "CD"]
        assert bare_prompts([f"{prefix}AB", "CD"], version.anchor) == [f"{prefix}AB", "CD"]


@pytest.mark.slow
def test_predict_answers_every_row_of_a_file(registry: Registry, tmp_path: Path):
    out = tmp_path / "answers.csv"
    source = registry.world / "task_test.jsonl"

    done = call(
        registry, "predict", f"models:/{NAME}/2", "--input", str(source), "--output", str(out)
    )

    assert done.exit_code == 0, done.stderr
    table = pd.read_csv(out, keep_default_na=False)
    assert len(table) == 24
    with answering(find_version(registry.client, f"models:/{NAME}/2")) as model:
        wanted = model.answer(model.bare(list(table["prompt"])))
        assert list(table["prediction"]) == wanted


class Echo:
    """A model that answers with what it is asked."""

    def predict(self, table: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"response": table["prompt"]})


def test_an_answer_does_not_depend_on_the_neighbours_of_its_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prompts = ["Q: a", "Q: b", "c", "Q: d"]
    version = registered_at(tmp_path / "version", instruction="Q: ")
    write_json(version.version / "serving.json", {"batch_size": 2})
    (tmp_path / "asked.jsonl").write_text("".join(f'{{"prompt": "{p}"}}\n' for p in prompts))
    stand_in_for_the_registry(monkeypatch, version)
    loading = SimpleNamespace(load_model=lambda *_, **__: Echo())
    monkeypatch.setattr("tasks.registry.mlflow", SimpleNamespace(pyfunc=loading))
    monkeypatch.setattr("flows.registry_commands._BATCHES_AT_ONCE", 1)
    out = tmp_path / "answers.jsonl"

    done = CliRunner().invoke(
        app,
        ["predict", "models:/m/1", "--input", str(tmp_path / "asked.jsonl"), "--output", str(out)],
    )

    assert done.exit_code == 0, done.stderr
    assert [json.loads(line)["prediction"] for line in out.open()] == prompts


@pytest.mark.slow
def test_predict_goes_on_where_it_was_stopped(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    command = [
        *("predict", f"models:/{NAME}/2", "--input", str(registry.world / "task_test.jsonl")),
        *("--output", str(tmp_path / "answers.jsonl")),
    ]
    monkeypatch.setattr("flows.registry_commands._BATCHES_AT_ONCE", 1)
    add, num_added = AnswerLog.add, []

    def stop_after_two(log: AnswerLog, batch: list[str]) -> None:
        add(log, batch)
        num_added.append(len(batch))
        if len(num_added) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(AnswerLog, "add", stop_after_two)
    stopped = call(registry, *command)
    monkeypatch.setattr(AnswerLog, "add", add)
    finished = call(registry, *command)

    assert stopped.exit_code == 130
    assert finished.exit_code == 0, finished.stderr
    assert f"{sum(num_added)} of 24 were answered before" in finished.stderr
    with answering(find_version(registry.client, f"models:/{NAME}/2")) as model:
        rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").open()]
        wanted = model.answer(model.bare([row["prompt"] for row in rows]))
        assert [row["prediction"] for row in rows] == wanted


@pytest.mark.slow
def test_a_version_is_not_tested_on_another_base_model(registry: Registry, tmp_path: Path):
    with fetched(registry.client.get_model_version(NAME, "2")) as version:
        write_json(version.version / "report_card.json", version.card | {"base_digest": "0" * 64})

        with pytest.raises(ModelError, match="version 2 was trained on 0000"):
            evaluate_version(version, version.items, tmp_path, base_only=True)


@pytest.mark.slow
def test_a_replay_is_bit_equal_until_an_input_changes(registry: Registry, tmp_path: Path):
    moved = tmp_path / "train.jsonl"
    lines = (registry.world / "task_train.jsonl").read_text().splitlines(keepends=True)
    moved.write_text("".join(reversed(lines)))
    with fetched(registry.client.get_model_version(NAME, "2")) as version:
        same = replay(version, tmp_path / "same")
        other = replay(version, tmp_path / "other", [f"task.train.path={moved}"])

    assert (same.verdict, same.changed) == ("bit-equal", [])
    assert other.verdict == "different"
    assert [line for line in other.changed if "task_train" in line]


def test_a_version_of_another_origin_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="Run its experiment"):
        RegisteredVersion.at("other version 1", tmp_path)


@pytest.mark.slow
def test_packages_and_stages_that_changed_are_named(registry: Registry):
    with fetched(registry.client.get_model_version(NAME, "2")) as version:
        card = version.card
        card["reproduce"]["versions"]["torch"] = "0.1"
        card["reproduce"]["stage_versions"]["train"] = -1

        found = list(changed_inputs(version.spec(), card))

    assert any(line.startswith("changed: torch: 0.1 then") for line in found)
    assert any("stage train" in line for line in found)


def test_noise_is_unknown_with_one_seed_and_grows_with_the_spread():
    assert noise_of([0.1], None, 0.95) is None
    narrow, wide = noise_of([0, 1, 2], 1.0, 0.95), noise_of([0, 2, 4], 2.0, 0.95)
    # t(0.975, 2) = 4.303 times the root of 2
    assert narrow == pytest.approx(6.085, abs=1e-3)
    assert wide == pytest.approx(2 * narrow)


def test_a_store_that_is_not_there_is_not_created(tmp_path: Path):
    with pytest.raises(InputError, match="no registry"):
        open_registry(str(tmp_path / "none.db"))

    assert not (tmp_path / "none.db").exists()


@pytest.mark.slow
def test_a_served_model_answers_over_http_with_the_anchor_added(registry: Registry):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    uri = f"models:/{NAME}/2"
    with answering(find_version(registry.client, uri)) as model:
        wanted = model.answer(["ABCD", "HGFE"])
    # MLflow starts uvicorn by its name.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", uri, "-p", str(port)]
    process = subprocess.Popen(
        [*command, "--env-manager", "local", "--host", "127.0.0.1"],
        env=os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{registry.store}", "PATH": path},
        start_new_session=True,
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        said = httpx.post(
            f"http://127.0.0.1:{port}/invocations",
            json={"dataframe_records": [{"prompt": "ABCD"}, {"prompt": "HGFE"}]},
            timeout=60,
        )
    finally:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.terminate()
        process.terminate()
        process.wait(30)

    assert said.status_code == 200, said.text
    assert [row["response"] for row in said.json()["predictions"]] == wanted


def wait_for(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"{url} does not answer")
