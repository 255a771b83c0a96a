import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from tell_core.errors import InputError, StoreError
from tell_core.results import (
    RESULTS_SCHEMA,
    check_metrics,
    open_run,
    query,
    run_identity,
    sole_owner,
    write_parquet,
    write_spec,
)
from tell_core.spec.loading import load_spec
from tell_core.spec.model import ExperimentSpec
from tests.fixtures.tiny import tiny_fields


def make_spec(**changes) -> ExperimentSpec:
    return ExperimentSpec.model_validate(tiny_fields(Path("/nowhere")) | changes)


def write_scores(root: Path, scores: list[float]) -> None:
    rows = [
        dict.fromkeys(RESULTS_SCHEMA.names) | {"arm": "tell", "score": score} for score in scores
    ]
    write_parquet(pa.Table.from_pylist(rows, schema=RESULTS_SCHEMA), root / "results.parquet")


def test_the_resolved_specification_is_kept_and_loads(tmp_path: Path):
    write_spec(make_spec(), tmp_path)

    assert load_spec(tmp_path / "spec.resolved.yaml") == make_spec()


def test_opening_a_run_again_with_other_budgets_leaves_its_specification_alone(tmp_path: Path):
    open_run(make_spec(), tmp_path / "run")
    write_spec(make_spec(), tmp_path / "run")

    open_run(make_spec(seeds=[7]), tmp_path / "run")

    assert load_spec(tmp_path / "run" / "spec.resolved.yaml").seeds == (0, 1)


def test_another_experiment_is_refused(tmp_path: Path):
    open_run(make_spec(), tmp_path / "run")

    with pytest.raises(InputError, match="holds the experiment 'tiny'"):
        open_run(make_spec(name="other"), tmp_path / "run")


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("evaluation", {"metrics": ["blue"]}, "did you mean 'bleu'"),
        ("analysis", {"primary_metric": "bleu"}, "analysis.primary_metric"),
    ],
)
def test_a_metric_that_does_not_exist_is_refused(section: str, values: dict, message: str):
    with pytest.raises(InputError, match=message):
        check_metrics(make_spec(**{section: values}))


def test_questions_in_sql_are_answered(tmp_path: Path):
    write_scores(tmp_path, [1.0, 3.0])

    columns, rows = query(tmp_path, "select arm, avg(score) as mean from results group by arm")

    assert (columns, rows) == (["arm", "mean"], [("tell", 2.0)])


def test_wrong_sql_is_the_users_input(tmp_path: Path):
    write_scores(tmp_path, [1.0])

    with pytest.raises(InputError, match="cannot be answered"):
        query(tmp_path, "select nothing from nowhere")


def test_a_run_directory_has_one_owner(tmp_path: Path):
    with sole_owner(tmp_path), pytest.raises(StoreError, match="another run"), sole_owner(tmp_path):
        pass

    with sole_owner(tmp_path):
        pass


def test_a_run_is_the_same_wherever_its_data_and_model_lie(tiny_world: Path, tmp_path: Path):
    moved = shutil.copytree(tiny_world, tmp_path / "moved")
    here = ExperimentSpec.model_validate(tiny_fields(tiny_world))
    there = ExperimentSpec.model_validate(tiny_fields(moved))
    other = ExperimentSpec.model_validate(tiny_fields(moved) | {"seeds": [7]})

    assert run_identity(here) == run_identity(there) != run_identity(other)
