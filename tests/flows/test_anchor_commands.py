import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flows.anchor_commands import _print_search
from flows.cli import app
from tests.fixtures.tiny import write_tiny_spec

DEV = {"task": {"dev_examples": 10}}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def found(verdict: str, **changes: object) -> dict:
    """A result as the search writes it."""
    rows = [
        {"kind": kind, "text": text, "num_tokens": 4, "zero_shot": score, "few_shot": None,
         "choosing": score, "testing": score, "over_none": 0.5, "low": 0.1, "high": 0.9}
        for kind, text, score in [
            ("candidate", "say it again", -1.0), ("given", "old text", -2.0),
            ("random text", "x y", -3.0), ("random text", "y z", -4.0),
            ("random text", "z x", -5.0),
        ]
    ]  # fmt: skip
    tested = [{"against": "no anchor", "estimate": 0.4, "low": 0.1, "high": 0.7, "p_holm": 0.01}]
    return {
        "rows": rows, "rejected": [{"text": "", "reason": "empty"}], "num_choosing": 5,
        "num_testing": 5, "tested": tested, "verdict": verdict, "reason": "so it is",
        "trained": None, "chosen": "say it again", "position": "before", "own_instruction": "",
        "num_tries": 1, "num_comparisons": 1,
    } | changes  # fmt: skip


def test_a_search_prints_its_table_and_leaves_the_specification_alone(
    tiny_world: Path, tmp_path: Path
) -> None:
    spec = write_tiny_spec(tmp_path / "spec.yaml", tiny_world, **DEV)

    result = call("anchor", spec, "--out", tmp_path / "run", "--candidates", 2, "--shots", 0)

    assert result.exit_code == 0, result.output
    assert "no anchor" in result.output
    assert "leave `anchor` in the YAML as it is" in result.output
    assert (tmp_path / "run" / "anchors.json").is_file()


def test_too_few_dev_items_are_the_users_to_mend(tiny_world: Path, tmp_path: Path) -> None:
    spec = write_tiny_spec(tmp_path / "spec.yaml", tiny_world)

    result = call("anchor", spec, "--out", tmp_path / "run", "--json")

    assert result.exit_code == 2
    assert "raise `task.dev_examples`" in result.stderr


def test_what_is_adopted_is_printed_as_it_goes_into_the_yaml(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _print_search(found("adopt"))

    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("anchor:"))
    assert line == 'anchor: {source: given, position: before, text: "say it again"}'


def test_where_the_candidate_stood_for_the_tasks_own_instruction_that_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _print_search(found("adopt", own_instruction="do this: "))

    assert "no longer begin with their own instruction (9 characters)" in capsys.readouterr().out


def test_what_training_says_counts_more_than_the_base_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained = {"task_budget_tokens": 200, "general_budget_tokens": 800, "num_seeds": 2,
               "learning_rate": 0.001,
               "verdict": "undetermined", "reason": "not shown", "tested": []}  # fmt: skip

    _print_search(found("adopt", trained=trained))

    assert "leave `anchor`" in capsys.readouterr().out


def test_it_is_said_how_many_searches_were_counted(capsys: pytest.CaptureFixture[str]) -> None:
    _print_search(found("keep", num_tries=4, num_comparisons=12))

    assert "Holm over the 12 comparisons of 4 searches" in capsys.readouterr().out


def test_of_many_random_texts_the_best_and_the_worst_are_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _print_search(found("keep"))

    out = capsys.readouterr().out
    assert "x y" in out
    assert "z x" in out
    assert "y z" not in out


def test_the_numbers_can_be_read_by_a_program(tiny_world: Path, tmp_path: Path) -> None:
    spec = write_tiny_spec(tmp_path / "spec.yaml", tiny_world, **DEV)

    result = call("anchor", spec, "--out", tmp_path / "run", "--candidates", 1, "--json")

    assert json.loads(result.stdout)["num_choosing"] == 5
