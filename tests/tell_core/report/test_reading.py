"""Reading a run directory: nothing outside it, nothing required but the manifest."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tell_core.errors import StoreError
from tell_core.report.reading import read_lines, read_predictions, read_run, stage_directory

BuildRun = Callable[..., Path]


@pytest.mark.parametrize("name", ["../../etc", "/etc", "..", "", None, 3])
def test_a_stage_outside_the_run_is_never_opened(tmp_path: Path, name: object) -> None:
    (tmp_path / "stages").mkdir()

    found = stage_directory(tmp_path, name)

    assert found is None or found.resolve().parent == (tmp_path / "stages").resolve()


def test_a_manifest_alone_is_a_run(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")

    run = read_run(tmp_path)

    assert (run.cells, run.results, run.leverage, run.num_dev_tokens) == ((), (), None, 0)
    assert run.name == tmp_path.name


def test_broken_json_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "leverage.json").write_text('{"metrics":')

    with pytest.raises(StoreError, match="leverage"):
        read_run(tmp_path)


def test_a_last_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 0}\n{"step": 1}\n{"st')

    assert [row["step"] for row in read_lines(log)] == [0, 1]


def test_scores_of_predictions_are_objects(build_run: BuildRun) -> None:
    run = read_run(build_run())

    rows = read_predictions(run, "base-s0")

    assert set(rows["item-000"]["scores"]) == {"exact_match", "log_probability"}


def test_only_the_first_rejects_of_each_reason_are_read(build_run: BuildRun) -> None:
    run = read_run(build_run())

    lines = {reason: [] for reason in ("duplicate", "empty_response", "too_long")}
    for row in run.rejects:
        lines[row["reason"]].append(row["line"])
    assert lines == {reason: [10, 11, 12] for reason in lines}
    assert sum(row["num_examples"] for row in run.overlap_counts) == 3


def test_cells_keep_the_order_and_axes_of_the_manifest(build_run: BuildRun) -> None:
    path = build_run()
    listed = json.loads((path / "manifest.json").read_text())["cells"]

    cells = read_run(path).cells

    assert [cell.name for cell in cells] == list(listed)
    assert all(cell.general_budget_tokens == listed[cell.name]["general_budget_tokens"]
               for cell in cells)  # fmt: skip
