"""What Prefect's form shows of each deployed flow, and what its server refuses before a run."""

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from prefect.flows import Flow, load_flow_from_entrypoint

from tell_core.errors import SpecError
from tell_core.spec.arms import ARM_NAMES, parse_arm

PROJECT = Path(__file__).resolve().parents[2]
DEPLOYMENTS = {
    entry["name"]: entry
    for entry in yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"]
}
HEAVY = {"torch", "mlflow", "transformers", "pandas", "duckdb", "matplotlib", "scipy"}


@cache
def flow_of(name: str) -> Flow[Any, Any]:
    path, _, function = DEPLOYMENTS[name]["entrypoint"].partition(":")
    return load_flow_from_entrypoint(f"{PROJECT / path}:{function}")


def accepts(name: str, parameters: dict[str, Any]) -> bool:
    """Whether the schema that the server checks against lets parameters pass."""
    schema = flow_of(name).parameters.model_dump()
    try:
        jsonschema.validate(parameters, schema)
    except jsonschema.ValidationError:
        return False
    return True


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_every_field_of_a_form_is_explained_and_its_defaults_pass(name: str):
    schema = flow_of(name).parameters.model_dump()

    assert all(field.get("description") for field in schema["properties"].values())
    assert accepts(name, DEPLOYMENTS[name]["parameters"])


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_every_deployed_flow_has_a_limit_of_time_and_tells_its_failure(name: str):
    flow = flow_of(name)

    assert flow.timeout_seconds
    assert [hook.__name__ for hook in flow.on_failure_hooks] == ["tell_failure"]
    assert [hook.__name__ for hook in flow.on_crashed_hooks] == ["tell_failure"]
    assert DEPLOYMENTS[name]["tags"]


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("experiment", {"arms": ["tell", "tell_blocks(4)"]}, {"arms": ["tel"]}),
        ("experiment", {"arms": ["tell_blocks(12)"]}, {"arms": ["tell_blocks(1)"]}),
        ("experiment", {"seeds": [0]}, {"seeds": [-1]}),
        ("experiment", {"task_tokens": [200]}, {"task_tokens": [0]}),
        ("experiment", {"learning_rate": [0.001]}, {"learning_rate": [0]}),
        ("experiment", {"settings": ["data=x"]}, {"settings": ["data x"]}),
        ("experiment", {"runner": "dask=tcp://h:1"}, {"runner": "threads"}),
        ("nightly-curation", {"settings": ["task.train.path=a"]}, {"settings": ["=a"]}),
        ("weekly-sweep", {"spec_files": ["a.yaml"]}, {"spec_files": []}),
        ("recheck-champion", {"name": "m"}, {"name": ""}),
        ("promote", {"version": 1}, {"version": 0}),
        ("promote", {"decide_within_seconds": 60}, {"decide_within_seconds": 10**9}),
        ("demo", {"track": False}, {"track": "perhaps"}),
    ],
)
def test_the_schema_of_a_form_tells_right_from_wrong(name: str, right: dict, wrong: dict):
    whole = DEPLOYMENTS[name]["parameters"]

    assert accepts(name, whole | right)
    assert not accepts(name, whole | wrong)


@given(
    arm=st.sampled_from(ARM_NAMES)
    | st.from_regex(r"tell_blocks\([0-9]{1,3}\)|[a-z_]{1,8}", fullmatch=True)
)
def test_the_form_knows_the_arms_that_the_specification_knows(arm: str):
    """But for leading zeros, which only the specification forgives."""
    try:
        is_known = bool(parse_arm(arm)) and "(0" not in arm
    except SpecError:
        is_known = False

    whole = DEPLOYMENTS["experiment"]["parameters"]
    assert accepts("experiment", whole | {"arms": [arm]}) == is_known


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_to_look_at_a_deployed_flow_loads_nothing_heavy(name: str):
    """Prefect does so once more before it says that a run is cancelled: 38 s on a busy machine."""
    module = DEPLOYMENTS[name]["entrypoint"].partition(".")[0].replace("/", ".")
    look = f"import sys, {module}; print(*sorted({HEAVY!r} & sys.modules.keys()))"

    done = subprocess.run(
        [sys.executable, "-c", look], cwd=PROJECT, capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == ""
