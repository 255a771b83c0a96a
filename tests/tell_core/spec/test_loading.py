from pathlib import Path

import pytest
import yaml

from tell_core.errors import SpecError
from tell_core.spec.loading import dump_spec, load_spec

CONFIGS = sorted(
    path
    for path in (Path(__file__).parents[3] / "configs").glob("*.yaml")
    if path.stem != "parity"  # no experiment: a control's problem, loaded by its own test
)
MINIMAL = """\
name: tiny
model: {id: base}
task: {name: t, train: train.jsonl, test: test.jsonl}
general: [general.parquet]
budgets: {task_tokens: [200, 100], general_tokens: 1000}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_project_loads(path: Path):
    variables = yaml.safe_load(path.read_text()).get("variables") or {}

    spec = load_spec(path, [f"{name}=/somewhere" for name in variables])

    assert spec.name
    assert "${" not in dump_spec(spec)


def test_short_forms_are_filled_in(tmp_path: Path):
    spec = load_spec(write(tmp_path, MINIMAL))

    assert spec.task.train.name == "train"
    assert spec.budgets.task_tokens == (100, 200)
    assert spec.budgets.general_tokens == (1000,)


def test_the_resolved_form_loads_as_the_same_specification(tmp_path: Path):
    spec = load_spec(write(tmp_path, MINIMAL))

    assert load_spec(write(tmp_path, dump_spec(spec))) == spec


def test_a_misspelt_key_is_named_with_its_line_and_the_nearest_key(tmp_path: Path):
    path = write(tmp_path, MINIMAL + "training:\n  epochs: 2\n  lerning_rate: 0.1\n")

    with pytest.raises(SpecError, match=r"spec.yaml:8: `training.lerning_rate`.*`learning_rate`"):
        load_spec(path)


def test_a_misspelt_arm_is_named_with_the_nearest_arm(tmp_path: Path):
    path = write(tmp_path, MINIMAL + "arms: [base, tel]\n")

    with pytest.raises(SpecError, match=r"spec.yaml:6: `arms`: unknown arm 'tel'.*'tell'"):
        load_spec(path)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path):
    path = write(tmp_path, MINIMAL + "name: other\n")

    with pytest.raises(SpecError, match=r"spec.yaml:6: key `name` stands there twice"):
        load_spec(path)


def test_a_variable_without_a_value_says_how_to_give_one(tmp_path: Path):
    text = MINIMAL.replace("train.jsonl", '"${data}/train.jsonl"') + "variables: {data: null}\n"

    with pytest.raises(SpecError, match=r"spec.yaml:3: `task.train`.*--set data="):
        load_spec(write(tmp_path, text))


def test_settings_fill_variables_and_override_fields(tmp_path: Path):
    text = MINIMAL.replace("id: base", 'id: "${model}"') + "variables: {model: a}\n"

    spec = load_spec(write(tmp_path, text), ["model=b/c", "training.epochs=7", "seeds=[4, 5]"])

    assert (spec.model.id, spec.training.epochs, spec.seeds) == ("b/c", 7, (4, 5))


@pytest.mark.parametrize("setting", ["nonsense", "epochs=3", "training.epochs=[", "=x"])
def test_an_unusable_setting_is_refused(tmp_path: Path, setting: str):
    with pytest.raises(SpecError, match="--set"):
        load_spec(write(tmp_path, MINIMAL), [setting])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seeds: [1, 1]", "only once"),
        ("training: {epochs: 0}", "training.epochs"),
        ("anchor: {source: given}", "needs a text"),
        ("training: {learning_rate: [1e-3, 1e-2]}\ntuning: {seed: 1}", "also one of `seeds`"),
        ("arms: []", "at least one"),
        ("arms: [tell_blocks(1)]", "at least 2 blocks"),
    ],
)
def test_an_inconsistent_value_is_explained(tmp_path: Path, line: str, message: str):
    with pytest.raises(SpecError, match=message):
        load_spec(write(tmp_path, MINIMAL + line + "\n"))


@pytest.mark.parametrize("text", ["", "- a\n", "a: [", "3"])
def test_text_that_is_no_mapping_is_refused(tmp_path: Path, text: str):
    with pytest.raises(SpecError):
        load_spec(write(tmp_path, text))


def test_a_missing_file_is_named_in_full(tmp_path: Path):
    with pytest.raises(SpecError, match=str(tmp_path / "none.yaml")):
        load_spec(tmp_path / "none.yaml")
