"""Quanta as a stage of a run: found once, whole, and shown on a page."""

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from flows.cli import app
from tell_core.analysis.quanta.discovery import DiscoverySettings
from tell_core.analysis.quanta.stage import (
    default_cell,
    items_of,
    quanta_of_cell,
    quanta_of_model,
)
from tell_core.errors import InputError
from tell_core.pipeline import curate_stage, run_cell
from tell_core.report.inspector import write_inspector
from tell_core.results import write_results, write_spec
from tell_core.spec.cells import Cell
from tell_core.spec.model import Candidate, ExperimentSpec
from tell_core.store import read_json, write_json
from tests.fixtures.tiny import tiny_fields

# A tiny model has learned next to nothing: every loss qualifies.
SETTINGS = DiscoverySettings(num_tokens=40, num_dimensions=128, floor=0, ceiling=99, ngram=0)
HOSTILE = '</script><img src=x onerror="document.title=1">'


@pytest.fixture(scope="module")
def run(tiny_world: Path, tmp_path_factory) -> Path:
    """A finished run of one TELL and one SFT cell."""
    root = tmp_path_factory.mktemp("run")
    fields = tiny_fields(tiny_world) | {"arms": ["sft", "tell"], "seeds": [0]}
    spec = ExperimentSpec.model_validate(fields)
    curated = curate_stage(spec, root)
    cells = [Cell("sft", 200, None, 0), Cell("tell", 200, 800, 0)]
    outcomes = [run_cell(spec, cell, curated, Candidate(0.003, 1)) for cell in cells]
    write_spec(spec, root)
    write_results(spec, root, curated, outcomes, {})
    return root


@pytest.fixture(scope="module")
def found(run: Path):
    return quanta_of_cell(run, default_cell(run), SETTINGS)


@pytest.fixture(scope="module")
def clusters(found) -> list[dict]:
    return read_json(found.path / "clusters.json")


def test_the_tell_cell_is_looked_at_by_default(run: Path):
    assert default_cell(run).startswith("tell-t200")


def test_what_was_found_is_not_looked_for_again(run: Path, found):
    again = quanta_of_cell(run, found.name, SETTINGS)

    assert not found.reused
    assert again.reused
    assert again.path == found.path


def test_other_settings_are_another_stage(run: Path, found):
    other = quanta_of_cell(run, found.name, DiscoverySettings(**vars(SETTINGS) | {"seed": 1}))

    assert other.path != found.path
    quanta_of_cell(run, found.name, SETTINGS)


def test_every_token_has_a_row_and_a_cluster(found):
    rows = pq.read_table(found.path / "tokens.parquet").to_pylist()

    assert len(rows) == found.summary["tokens"]["chosen"] == found.summary["num_backwards"]
    assert len({row["cluster"] for row in rows}) == found.summary["num_clusters"]


def test_rows_name_the_tokens_they_stand_for(run: Path, found):
    items = items_of(run / "stages" / read_json(run / "manifest.json")["cells"][found.name]["mix"])

    for row in pq.read_table(found.path / "tokens.parquet").to_pylist():
        example = items.ids.index(row["item_id"])
        start = items.examples.response_starts[example]
        assert items.examples.example(example)[start + row["position"]] == row["token_id"]


def test_clusters_hold_as_many_tokens_as_the_table(found, clusters):
    rows = pq.read_table(found.path / "tokens.parquet").to_pylist()

    for cluster in clusters:
        of_cluster = [row for row in rows if row["cluster"] == cluster["label"]]
        assert cluster["size"] == len(of_cluster) >= 2
        assert sum(cluster["roles"].values()) == len(of_cluster)


def test_traced_clusters_have_curves_of_both_arms(clusters):
    arms = [set(cluster["curves"]) for cluster in clusters if cluster["curves"]]

    assert arms
    assert all(found == {"tell", "sft"} for found in arms)


def test_what_pushes_is_general_data_and_strongest_first(clusters):
    pushed = [[example["push"] for example in cluster["pushed_by"]] for cluster in clusters]

    assert any(pushed)
    assert all(values == sorted(values, reverse=True) for values in pushed)
    assert all(0 < value <= 1.001 for values in pushed for value in values)


def test_an_unknown_cell_is_refused_with_the_known_ones(run: Path):
    with pytest.raises(InputError, match="tell-t200"):
        quanta_of_cell(run, "tel", SETTINGS)


def test_a_directory_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="no finished run"):
        default_cell(tmp_path)


def test_a_model_is_looked_at_on_files(tiny_world: Path, tmp_path: Path):
    data = [str(tiny_world / "general.jsonl")]

    found = quanta_of_model(
        str(tiny_world / "base_init"), data, tmp_path, SETTINGS, max_tokens=64, max_examples=30
    )

    assert found.summary["tokens"]["chosen"] == 40
    assert write_inspector(tmp_path, found.name).exists()


def test_the_page_carries_its_clusters_and_nothing_from_elsewhere(run: Path, found, clusters):
    page = write_inspector(run, found.name).read_text()

    carried = json.loads(re.search(r'id="carried">(.*?)</script>', page, re.S)[1])
    assert [one["label"] for one in carried["clusters"]] == [one["label"] for one in clusters]
    assert not re.search(r'(src|href)="?https?:', page)


def test_texts_of_the_data_cannot_leave_their_place(run: Path, found, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(run / "quanta", copy / "quanta")
    shutil.copytree(found.path, copy / "stages" / found.path.name)
    stage = copy / "stages" / found.path.name
    clusters = read_json(stage / "clusters.json")
    clusters[0]["tokens"][0]["before"] = HOSTILE
    write_json(stage / "clusters.json", clusters)
    marker = read_json(stage / "_SUCCESS")
    marker["files"].pop("clusters.json")
    write_json(stage / "_SUCCESS", marker)

    page = write_inspector(copy, found.name).read_text()

    assert "<img" not in page
    assert page.count("</script>") == 2


def test_a_damaged_stage_is_not_shown(run: Path, found, tmp_path: Path):
    shutil.copytree(run / "quanta", tmp_path / "quanta")
    stage = shutil.copytree(found.path, tmp_path / "stages" / found.path.name)
    (stage / "clusters.json").write_text("[]")

    with pytest.raises(InputError, match="no whole quanta"):
        write_inspector(tmp_path, found.name)


def test_a_model_without_examples_is_refused_on_the_command_line(tiny_world: Path):
    result = CliRunner().invoke(app, ["quanta", str(tiny_world / "base_init")])

    assert result.exit_code == 2
    assert "--data" in result.output + result.stderr


def test_controls_print_their_table(monkeypatch):
    result = CliRunner().invoke(app, ["quanta", "controls", "--only", "gaussian"])

    assert result.exit_code == 0, result.output
    assert "Gaussian subtasks" in result.output


def test_a_missed_control_fails_the_command(monkeypatch):
    from tell_core.analysis.quanta import acceptance

    missed = acceptance.Check("anything", "more", "less", False, 0.0)
    monkeypatch.setattr(acceptance, "run_control", lambda name: [missed])

    result = CliRunner().invoke(app, ["quanta", "controls", "--only", "gaussian"])

    assert result.exit_code == 1
    assert "FAILED" in result.output
