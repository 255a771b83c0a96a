from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tell_core.analysis.cells import AnalysedCell
from tell_core.analysis.traces import TRACES_FILE, read_trace, write_traces
from tell_core.data.encoding import from_lists
from tell_core.errors import AnalysisError
from tell_core.pipeline import curate_stage, run_cell
from tell_core.results import query, write_results
from tell_core.spec.cells import Cell
from tell_core.spec.model import Candidate, ExperimentSpec
from tell_core.training.probes import ProbeSet, TracedTokens, save_probe
from tests.fixtures.tiny import tiny_fields
from tests.tell_core.test_results import write_scores

ITEMS = '{"item_id": "dev-0", "role": "task"}\n{"item_id": "general-0", "role": "general"}\n'
STEPS = (0, 1, 5)
TOKEN_LOSSES = np.arange(9, dtype=np.float64).reshape(3, 3) / 4


@pytest.fixture(scope="module")
def kept_run(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one TELL cell with a retention set, its results written."""
    root = tmp_path_factory.mktemp("kept")
    fields = tiny_fields(tiny_world) | {"arms": ["tell"], "seeds": [0]}
    lines = (tiny_world / "general.jsonl").read_text().splitlines(keepends=True)
    (root / "kept.jsonl").write_text("".join(lines[:20]))
    fields["retention"] = [str(root / "kept.jsonl")]
    fields["curation"] |= {"retention_examples": 3}
    spec = ExperimentSpec.model_validate(fields)
    curated = curate_stage(spec, root)
    outcome = run_cell(spec, Cell("tell", 200, 800, 0), curated, Candidate(0.003, 1))
    write_results(spec, root, curated, [outcome], {})
    return root


def write_cell(root: Path, name: str, *, has_tokens: bool = True) -> AnalysedCell:
    """A trained cell with two probe items, of two and three supervised tokens; three are traced."""
    mixed, trained = root / f"mix-{name}", root / f"train-{name}"
    mixed.mkdir(parents=True)
    trained.mkdir()
    (mixed / "probe_items.jsonl").write_text(ITEMS)
    examples = from_lists([([7, 8, 9], 1), ([1, 2, 3, 4, 5], 2)], is_task=True)
    examples.save(mixed / "probe.safetensors")
    probe_set = ProbeSet((), np.array([0, 2, 5]), np.ones(2, dtype=bool))
    traced = TracedTokens.choose(probe_set, 3) if has_tokens else None
    save_probe(trained / "probe.npz", STEPS, np.ones((3, 2)), traced, TOKEN_LOSSES)
    return AnalysedCell(name, "tell", 100, 900, 0, 98, mixed, trained, root / "evaluate")


def test_a_trace_names_the_token_that_each_loss_belongs_to(tmp_path: Path) -> None:
    trace = read_trace(write_cell(tmp_path, "a"))

    assert trace is not None
    supervised = [[8, 9], [3, 4, 5]]
    pairs = zip(trace.token_items, trace.token_positions, strict=True)
    assert trace.token_ids.tolist() == [supervised[item][place] for item, place in pairs]
    assert trace.roles == ("task", "general")
    assert np.array_equal(trace.token_losses, TOKEN_LOSSES)


def test_the_file_has_a_row_for_each_cell_step_item_and_token(tmp_path: Path) -> None:
    cells = [write_cell(tmp_path, name) for name in "ab"]

    num_rows = write_traces(cells, tmp_path / TRACES_FILE)

    rows = pq.read_table(tmp_path / TRACES_FILE).to_pylist()
    keys = {(row["cell"], row["step"], row["item_id"], row["position"]) for row in rows}
    assert len(rows) == len(keys) == num_rows == 2 * 3 * 3
    last = [row["loss"] for row in rows if row["cell"] == "b" and row["step"] == 5]
    assert last == TOKEN_LOSSES[2].tolist()


def test_traces_can_be_asked_in_sql_beside_the_results(tmp_path: Path) -> None:
    write_scores(tmp_path, [1.0])
    write_traces([write_cell(tmp_path, "a")], tmp_path / TRACES_FILE)

    _, rows = query(tmp_path, "select step, avg(loss) from traces group by step order by step")

    assert rows == [(0, 0.25), (1, 1.0), (5, 1.75)]


def test_runs_without_losses_of_tokens_leave_no_file(tmp_path: Path) -> None:
    (tmp_path / TRACES_FILE).write_text("of an earlier run")

    num_rows = write_traces([write_cell(tmp_path, "a", has_tokens=False)], tmp_path / TRACES_FILE)

    assert num_rows == 0
    assert not (tmp_path / TRACES_FILE).exists()


def test_losses_of_other_items_are_refused(tmp_path: Path) -> None:
    cell = write_cell(tmp_path, "a")
    (cell.mixed / "probe_items.jsonl").write_text("")

    with pytest.raises(AnalysisError, match="0 probe items"):
        read_trace(cell)


def test_a_run_with_a_retention_set_is_written_with_the_role_of_every_item(kept_run: Path) -> None:
    _, rows = query(kept_run, "select distinct item_id, role from traces order by role, item_id")

    roles = [role for _, role in rows]
    assert {role: roles.count(role) for role in roles} == {"general": 4, "retention": 3, "task": 6}
