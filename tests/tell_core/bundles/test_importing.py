"""Export, run and import against a run without bundles."""

import shutil
from pathlib import Path

import pytest

from tell_core.bundles.exporting import export_bundles
from tell_core.bundles.importing import import_bundles
from tell_core.bundles.layout import (
    BUNDLE_FILE,
    RESULT_FILE,
    BundleError,
    pack,
    read_bundle,
    read_sealed,
    write_sealed,
)
from tell_core.bundles.running import run_bundle
from tell_core.errors import InputError, SpecError
from tell_core.pipeline import (
    CellOutcome,
    chosen_settings,
    curate_stage,
    run_cell,
    tune,
)
from tell_core.results import open_run
from tell_core.spec.cells import plan_cells
from tell_core.spec.identity import file_digest
from tell_core.spec.model import Candidate, ExperimentSpec
from tell_core.store import read_json

TELL = "tell-t200-g800-s0"


def changed(spec: ExperimentSpec, section: str, **values: object) -> ExperimentSpec:
    fields = spec.model_dump()
    return ExperimentSpec.model_validate(fields | {section: fields[section] | values})


def run_here(spec: ExperimentSpec, root: Path) -> list[CellOutcome]:
    """Every cell in this process; what is filed already is found."""
    curated = curate_stage(spec, root)
    tuning = tune(spec, curated)
    return [
        run_cell(spec, cell, curated, chosen_settings(spec, tuning, cell.arm))
        for cell in plan_cells(spec)
    ]


def run_all(bundles: Path) -> None:
    for directory in sorted(bundles.iterdir()):
        run_bundle(directory)


def stages(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "stages").iterdir())


def test_results_equal_those_of_a_run_without_bundles_bit_for_bit(
    spec: ExperimentSpec, root: Path, finished: Path, tmp_path: Path
):
    import_bundles([finished], root)

    imported, local = run_here(spec, root), run_here(spec, tmp_path / "local")

    assert all(outcome.evaluated.reused for outcome in imported)
    for ours, theirs in zip(imported, local, strict=True):
        assert ours.evaluated.fingerprint == theirs.evaluated.fingerprint
        for path in theirs.evaluated.path.glob("*.json*"):
            assert (ours.evaluated.path / path.name).read_bytes() == path.read_bytes()
    trained = [outcome.trained for outcome in (imported[-1], local[-1])]
    assert trained[0] and trained[1] and trained[0].reused
    for name in ("adapter/adapter_model.safetensors", "probe.npz"):
        assert (trained[0].path / name).read_bytes() == (trained[1].path / name).read_bytes()


def test_importing_again_changes_nothing_and_a_bundle_not_run_is_told(
    root: Path, done: Path, exported: tuple[Path, Path]
):
    first = import_bundles([done], root)
    before = stages(root)

    again = import_bundles([done.parent, exported[1] / "base-s0"], root)

    assert [one.outcome for one in first] == ["imported"]
    assert [one.outcome for one in again] == ["was there", "not run yet"]
    assert stages(root) == before


def test_a_packed_result_is_imported(root: Path, done: Path):
    archive = pack(done)
    shutil.rmtree(done)

    assert [one.outcome for one in import_bundles([archive], root)] == ["imported"]
    assert not list(root.glob(".import-*"))


@pytest.mark.parametrize(
    "victim", ["inputs/items.jsonl", "stages/train-*/log.jsonl", "stages/measure-*/measured.json"]
)
def test_a_damaged_bundle_is_refused_and_the_others_are_imported(
    root: Path, finished: Path, tmp_path: Path, victim: str
):
    bundles = shutil.copytree(finished, tmp_path / "bundles")
    before = stages(root)
    (path,) = (bundles / TELL).glob(victim)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    with pytest.raises(BundleError, match=r"1 of 2 refused:\n" + TELL):
        import_bundles([bundles], root)

    new = set(stages(root)) - set(before)
    assert {name.split("-")[0] for name in new} == {"evaluate"}


def test_a_result_that_names_files_elsewhere_brings_none_of_them(root: Path, done: Path):
    secret = done.parent / "secret"
    secret.write_text("secret")
    result = read_sealed(done / RESULT_FILE)
    train = next(done.glob("stages/train-*")).name
    name = f"stages/{train}/../../../secret"
    record = {"bytes": 6, "sha256": file_digest(secret)}
    write_sealed(done / RESULT_FILE, result | {"files": result["files"] | {name: record}})

    with pytest.raises(BundleError, match="leads out of the bundle"):
        import_bundles([done], root)


def test_a_directory_that_exported_something_else_is_told(
    spec: ExperimentSpec, done: Path, tmp_path: Path
):
    open_run(spec, tmp_path / "empty")

    with pytest.raises(BundleError, match="not exported from"):
        import_bundles([done], tmp_path / "empty")


def test_a_directory_that_lost_the_data_of_a_bundle_is_told(root: Path, done: Path):
    for stage in (root / "stages").glob("mix-*"):
        shutil.rmtree(stage)

    with pytest.raises(BundleError, match="does not hold the data"):
        import_bundles([done], root)


def test_a_bundle_exported_twice_is_imported_into_the_directory_of_either(
    spec: ExperimentSpec, root: Path, done: Path, tmp_path: Path
):
    other = tmp_path / "other"
    open_run(spec, other)

    export_bundles(spec, other, tmp_path / "same")

    assert [one.outcome for one in import_bundles([done], other)] == ["imported"]
    assert [one.outcome for one in import_bundles([done], root)] == ["imported"]


def test_a_bundle_of_another_stage_version_is_refused(
    root: Path, done: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(__import__("tell_core.pipeline").pipeline.STAGE_VERSIONS, "train", 99)

    with pytest.raises(BundleError, match="export the cell again"):
        import_bundles([done], root)


def test_a_changed_number_format_is_refused(
    root: Path, done: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tell_core.bundles.importing.number_format", lambda _: "bfloat16")

    with pytest.raises(BundleError, match="exported for float32"):
        import_bundles([done], root)


def test_tuning_is_exported_first_and_the_cells_after_its_import(
    spec: ExperimentSpec, tmp_path: Path
):
    tuned = changed(spec, "training", learning_rate=(0.003, 1e30))
    root, first, second = tmp_path / "run", tmp_path / "tuning", tmp_path / "cells"
    open_run(tuned, root)

    tuning = export_bundles(tuned, root, first)
    run_all(first)
    import_bundles([first], root)
    cells = export_bundles(tuned, root, second)

    assert tuning.is_tuning
    assert len(tuning.bundles) == 2
    assert not cells.is_tuning
    assert [path.name for path in cells.bundles] == ["base-s0", TELL]
    settings = read_bundle(second / TELL)["spec"]["training"]
    assert Candidate(settings["learning_rate"], settings["epochs"]) == (0.003, 1)
    run_all(second)
    import_bundles([second], root)
    assert all(outcome.evaluated.reused for outcome in run_here(tuned, root))
    assert export_bundles(tuned, root, tmp_path / "none") == (False, [], 2)


def test_exporting_again_leaves_results_alone(spec: ExperimentSpec, root: Path, finished: Path):
    results = {path: path.read_bytes() for path in finished.glob("*/result.json")}

    again = export_bundles(spec, root, finished)

    assert again.bundles == sorted(results.keys() and finished.iterdir())
    assert all(path.read_bytes() == content for path, content in results.items())


def test_a_bundle_of_other_contents_is_not_overwritten(
    spec: ExperimentSpec, root: Path, bundle: Path
):
    other = changed(spec, "training", lora_rank=4)

    with pytest.raises(BundleError, match="is there already"):
        export_bundles(other, root, bundle.parent)

    assert read_bundle(bundle)["spec"]["training"]["lora_rank"] == 2


def test_a_training_that_is_finished_travels_along(
    spec: ExperimentSpec, root: Path, done: Path, tmp_path: Path
):
    import_bundles([done], root)
    evaluation = next((root / "stages").glob("evaluate-*"))
    shutil.rmtree(evaluation)

    export_bundles(spec, root, tmp_path / "again")

    bundle = tmp_path / "again" / TELL
    before = next(bundle.glob("stages/train-*/log.jsonl")).stat().st_mtime_ns
    run_bundle(bundle)
    assert next(bundle.glob("stages/train-*/log.jsonl")).stat().st_mtime_ns == before
    import_bundles([bundle], root)
    assert evaluation.is_dir()


def test_a_bundle_with_the_model_needs_no_other(
    spec: ExperimentSpec, root: Path, tmp_path: Path, finished: Path
):
    export_bundles(spec, root, tmp_path / "whole", with_model=True)
    bundle = tmp_path / "whole" / TELL
    fields = read_sealed(bundle / BUNDLE_FILE)
    fields["model"]["id"] = "there/is/no/such/model"
    write_sealed(bundle / BUNDLE_FILE, fields)

    run_bundle(bundle)

    for name in ("measured.json", "adapter_model.safetensors"):
        (ours,), (theirs,) = bundle.rglob(name), (finished / TELL).rglob(name)
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_bundle_holds_no_more_than_is_needed(exported: tuple[Path, Path]):
    bundle = exported[1] / TELL

    names = {path.name for path in bundle.rglob("*")}

    assert names == {
        BUNDLE_FILE, "inputs", "mixture.safetensors", "probe.safetensors", "probe_items.jsonl",
        "test.safetensors", "items.jsonl",
    }  # fmt: skip
    assert read_json(bundle / BUNDLE_FILE)["dtype"] == "float32"


def test_tasks_of_the_harness_are_refused(spec: ExperimentSpec, root: Path, tmp_path: Path):
    other = changed(spec, "evaluation", harness=({"task": "arc_easy"},))

    with pytest.raises(SpecError, match="harness"):
        export_bundles(other, root, tmp_path / "bundles")


def test_bundles_within_the_run_directory_are_refused(spec: ExperimentSpec, root: Path):
    with pytest.raises(InputError, match="inside the run directory"):
        export_bundles(spec, root, root / "bundles")
