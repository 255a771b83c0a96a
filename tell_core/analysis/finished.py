"""The cells of a finished run, for analyses that are made after it."""

from pathlib import Path
from typing import Any

from tell_core.analysis.cells import AnalysedCell
from tell_core.errors import InputError, StoreError
from tell_core.spec.loading import load_spec
from tell_core.spec.model import ExperimentSpec
from tell_core.store import read_json


def finished_run(root: Path) -> tuple[ExperimentSpec, tuple[AnalysedCell, ...]]:
    """The specification and the cells of a finished run, in the order of its manifest.

    Raises:
        InputError: ``root`` holds no finished run.
    """
    try:
        manifest = read_json(root / "manifest.json")
        spec = load_spec(root / "spec.resolved.yaml")
    except StoreError as error:
        raise InputError(
            f"{root} holds no finished run: give the directory that `tell run` printed"
        ) from error
    return spec, tuple(_cell(root, name, cell) for name, cell in manifest["cells"].items())


def _cell(root: Path, name: str, record: dict[str, Any]) -> AnalysedCell:
    stages = root / "stages"
    paths = {
        stage: stages / record[stage] if record[stage] else None
        for stage in ("mix", "train", "evaluate")
    }
    return AnalysedCell.from_record({"cell": name, **record, **paths})
