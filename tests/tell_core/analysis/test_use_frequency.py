"""P3: the time at which a skill is learned, by its use."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tell_core.analysis.use_frequency import time_by_frequency
from tell_core.analysis.verdicts import judge
from tests.tell_core.analysis.small_runs import QUANTUM, SKILLS, one_seed_of, run_spec, write_run


def write_general(directory: Path, num_more: int = 0) -> Path:
    """Curated general data whose skills have the shares of `SKILLS`, the rest another skill.

    ``num_more`` rows of skill a are added to 1,000.
    """
    names = [name for name, share in SKILLS.items() for _ in range(round(1000 * share))]
    names += ["other"] * (1000 - len(names)) + ["a"] * num_more
    extra = [json.dumps({"skill": name}) for name in names]
    pq.write_table(pa.table({"extra": extra}), directory / "general.parquet")
    return directory


def test_the_exponent_of_learning_time_on_use_is_found(quantum_run, tmp_path: Path) -> None:
    found = time_by_frequency(quantum_run[0], write_general(tmp_path))

    (row,) = judge([found], 0.95)
    assert row["verdict"] == "supported"
    assert row["estimate"] == pytest.approx(0.8, abs=0.15)
    assert row["low"] < 0.8 < row["high"]


def test_without_named_skills_the_exponent_is_undetermined(quantum_run, tmp_path: Path) -> None:
    run = quantum_run[0]

    assert "0" in str(time_by_frequency(run, tmp_path).needs)


def test_one_training_does_not_determine_the_exponent(quantum_run, tmp_path: Path) -> None:
    found = time_by_frequency(one_seed_of(quantum_run[0]), write_general(tmp_path))

    assert found.needs == "at least 3 seeds of tell; this run has 1"
    assert judge([found], 0.95)[0]["verdict"] == "undetermined"


def test_labelled_items_of_a_retention_set_are_no_general_data(tmp_path: Path) -> None:
    spec = run_spec(budgets={"task_tokens": [480], "general_tokens": [9400]})
    run, cells = write_run(tmp_path, spec, QUANTUM)
    general = write_general(tmp_path)
    everything = time_by_frequency(run, general)
    for cell in cells:
        kept_of_one_skill(cell.mixed / "probe_items.jsonl", "a")

    found = time_by_frequency(run, general)

    skills = {point["skill"] for point in found.figure["points"]}
    assert skills == set(SKILLS) - {"a"}
    assert len(found.figure["points"]) < len(everything.figure["points"])


def kept_of_one_skill(path: Path, skill: str) -> None:
    """Call the probe items of a skill items of a retention set."""
    items = [json.loads(line) for line in path.read_text().splitlines()]
    for item in items:
        if item["extra"].get("skill") == skill:
            item["role"] = "retention"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
