"""Export the cells of an experiment that are not finished, a bundle each."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tell_core.bundles.layout import (
    BUNDLE_FILE,
    DIGEST,
    INPUTS,
    MODEL,
    STAGES,
    BundleError,
    describe_files,
    files_below,
    pack,
    read_sealed,
    write_sealed,
)
from tell_core.data.token_store import MIXTURE_FILE, open_mixture
from tell_core.errors import InputError, SpecError
from tell_core.evaluation.scoring import needs_text
from tell_core.pipeline import (
    Stage,
    base_digest,
    check_references_of,
    chosen_settings,
    compare_candidates,
    curate_stage,
    evaluate_fingerprint,
    find_diverged,
    mix_stage,
    number_format,
    settled,
    train_fingerprint,
)
from tell_core.spec.arms import parse_arm
from tell_core.spec.cells import Cell, plan_cells, tuning_cells
from tell_core.spec.identity import file_digest
from tell_core.spec.model import Candidate, ExperimentSpec
from tell_core.store import explain_disk_errors, find_stage, read_json, stage_path, write_json
from tell_core.training.loop import PROBE_FILE
from tell_core.training.models import resolve_model

# In the run directory: digests of the bundles that were exported from it.
_EXPORTED_FILE = "exported.json"
# Needed to train, and besides to measure.
_TRAINING_FILES = (PROBE_FILE,)
_ITEM_FILES = (PROBE_FILE, "probe_items.jsonl", "test.safetensors", "items.jsonl")
# Beside the weights, whose digest is the model's: what makes the tokenizer.
_TOKENIZER_FILES = (
    *("tokenizer*", "*.jinja", "*.txt", "*.model", "*_map.json"),
    *("added_tokens.json", "vocab.json"),
)
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")


class Export(NamedTuple):
    """What an export wrote.

    Attributes:
        is_tuning: Whether these are trainings that tuning compares; the cells follow when their
            results are imported.
        bundles: Their paths, those that were there already included.
        num_finished: Cells, or trainings of the tuning, that need no bundle.
    """

    is_tuning: bool
    bundles: list[Path]
    num_finished: int


@dataclass(frozen=True)
class _Job:
    """One bundle to be: a cell with settled settings.

    Attributes:
        spec: The experiment, settled for this cell.
        cell: The cell.
        settings: What it is trained with; None for an arm without training.
        mixed: Its data.
        train: Fingerprint of its training, or None.
        evaluate: Fingerprint of its evaluation; None in a tuning, which needs none.
    """

    spec: ExperimentSpec
    cell: Cell
    settings: Candidate | None
    mixed: Stage
    train: str | None
    evaluate: str | None

    @property
    def name(self) -> str:
        """Name of the bundle's directory."""
        if self.evaluate:
            return self.cell.name
        assert self.settings is not None
        return f"tuning-{self.cell.name}-r{self.settings.learning_rate}-e{self.settings.epochs}"

    @property
    def is_finished(self) -> bool:
        """Whether the run directory holds its result."""
        root = self.mixed.root
        if self.evaluate:
            return find_stage(root, "evaluate", self.evaluate) is not None
        assert self.train is not None
        return bool(find_stage(root, "train", self.train) or find_diverged(root, self.train))


def export_bundles(
    spec: ExperimentSpec, root: Path, to: Path, *, with_model: bool = False, is_packed: bool = False
) -> Export:
    """Write a bundle for every cell that is not finished, or for the tuning that comes first.

    Data are curated and mixed here; a bundle needs neither sources nor data engine. The number
    format "auto" is settled by this machine. A bundle that is there already is left as it is, its
    results included.

    Args:
        spec: The experiment.
        root: Its run directory; held by the caller.
        to: Directory of the bundles.
        with_model: Copy the base model into each bundle, instead of its digest alone.
        is_packed: Write a .tar instead of a directory.

    Raises:
        SpecError: The specification asks for tasks of lm-evaluation-harness.
        BundleError: ``to`` holds a bundle of the same name with other contents.
        InputError: As of curation and mixing.
    """
    if spec.evaluation.harness:
        raise SpecError(
            "`evaluation.harness` cannot be exported: its tasks load data and libraries of their"
            " own. Export without it (--set evaluation.harness=[]), or use `tell run`"
        )
    if _is_inside(to, root):
        raise InputError(f"--to {to} lies inside the run directory {root}; choose another place")
    curated = curate_stage(spec, root)
    check_references_of(spec, curated)
    jobs = [job for trainings in _tuning_jobs(spec, curated) for job in trainings]
    is_tuning = not all(job.is_finished for job in jobs)
    if not is_tuning:
        jobs = list(_cell_jobs(spec, curated))
    waiting = [job for job in jobs if not job.is_finished]
    with explain_disk_errors(to):
        to.mkdir(parents=True, exist_ok=True)
        bundles = [_write(job, to, with_model=with_model, is_packed=is_packed) for job in waiting]
    return Export(is_tuning, bundles, len(jobs) - len(waiting))


def is_exported(bundle: Mapping[str, Any], root: Path) -> bool:
    """Whether bundle.json is, to the last byte, one that was exported from a run directory."""
    return bundle[DIGEST] in _exported(root)


def _exported(root: Path) -> list[str]:
    path = root / _EXPORTED_FILE
    return list(read_json(path)) if path.exists() else []


def _note_exported(root: Path, digest: str) -> None:
    known = _exported(root)
    if digest not in known:
        write_json(root / _EXPORTED_FILE, sorted([*known, digest]))


def _is_inside(path: Path, directory: Path) -> bool:
    return path.absolute().is_relative_to(directory.absolute())


def _tuning_jobs(spec: ExperimentSpec, curated: Stage) -> Iterator[list[_Job]]:
    """The trainings that tuning compares, a list per arm."""
    for cell in tuning_cells(spec):
        yield [
            _job(spec, cell, curated, settings, is_tuning=True)
            for settings in spec.training.candidates
        ]


def _cell_jobs(spec: ExperimentSpec, curated: Stage) -> Iterator[_Job]:
    tables = [_table(jobs) for jobs in _tuning_jobs(spec, curated)]
    tuning = {table["arm"]: table for table in tables}
    for cell in plan_cells(spec):
        settings = chosen_settings(spec, tuning, cell.arm)
        yield _job(spec, cell, curated, settings, is_tuning=False)


def _table(jobs: Sequence[_Job]) -> dict[str, Any]:
    """The comparison of one arm's trainings, all finished."""
    trainings = []
    for job in jobs:
        assert job.settings is not None
        assert job.train is not None
        trained = Stage("train", job.train, job.mixed.root, reused=True)
        is_usable = find_stage(trained.root, "train", job.train) is not None
        trainings.append((job.settings, trained if is_usable else None))
    return compare_candidates(jobs[0].cell, trainings) | {"arm": jobs[0].cell.arm}


def _job(
    spec: ExperimentSpec, cell: Cell, curated: Stage, settings: Candidate, *, is_tuning: bool
) -> _Job:
    spec = settled(spec, settings)
    mixed = mix_stage(spec, cell, curated)
    if not parse_arm(cell.arm).is_trained:
        return _Job(spec, cell, None, mixed, None, evaluate_fingerprint(spec, mixed, None))
    train = train_fingerprint(spec, mixed)
    trained = Stage("train", train, mixed.root, reused=False)
    evaluate = None if is_tuning else evaluate_fingerprint(spec, mixed, trained)
    return _Job(spec, cell, settings, mixed, train, evaluate)


def _write(job: _Job, to: Path, *, with_model: bool, is_packed: bool) -> Path:
    """Write one bundle, or find the very same one there, perhaps with results."""
    with tempfile.TemporaryDirectory(prefix=".export-", dir=to) as aside:
        made = Path(aside) / job.name
        sealed = _fill(job, made, with_model=with_model)
        _note_exported(job.mixed.root, sealed[DIGEST])
        final, is_same = to / job.name, _is_same_bundle
        if is_packed:
            made, final, is_same = pack(made), to / f"{job.name}.tar", _is_same_file
        if not final.exists():
            made.rename(final)
        elif not is_same(made, final):
            raise BundleError(
                f"{final} is there already, made from other data, settings or options, or packed"
                " again after it was run; choose another --to, or remove it"
            )
    return final


def _is_same_bundle(one: Path, other: Path) -> bool:
    return read_sealed(one / BUNDLE_FILE) == read_sealed(other / BUNDLE_FILE)


def _is_same_file(one: Path, other: Path) -> bool:
    return file_digest(one) == file_digest(other)


def _fill(job: _Job, directory: Path, *, with_model: bool) -> dict[str, Any]:
    """Write everything of a bundle, bundle.json last; returns what that holds."""
    inputs = directory / INPUTS
    inputs.mkdir(parents=True)
    if job.train:
        open_mixture(job.mixed.path).save(inputs / MIXTURE_FILE)
    for name in _ITEM_FILES if job.evaluate else _TRAINING_FILES:
        shutil.copyfile(job.mixed.path / name, inputs / name)
    base = resolve_model(job.spec.model.id, job.spec.model.revision)
    if with_model:
        _copy_model(base, directory / MODEL)
    fields = _description(job, base) | {"files": describe_files(directory, files_below(directory))}
    if job.train and find_stage(job.mixed.root, "train", job.train):
        stage = stage_path(job.mixed.root, "train", job.train)
        shutil.copytree(stage, directory / STAGES / stage.name)
    return write_sealed(directory / BUNDLE_FILE, fields)


def _description(job: _Job, base: Path) -> dict[str, Any]:
    model = job.spec.model
    return {
        "kind": "cell" if job.evaluate else "tuning",
        "name": job.name,
        "experiment": job.spec.name,
        "cell": asdict(job.cell),
        "spec": job.spec.model_dump(mode="json"),
        "dtype": number_format(job.spec),
        "needs_text": bool(job.evaluate) and needs_text(job.spec.evaluation),
        "stages": {"mix": job.mixed.fingerprint, "train": job.train, "evaluate": job.evaluate},
        "model": {
            "id": model.id,
            "revision": model.revision,
            "digest": base_digest(model.id, model.revision),
            "files": describe_files(base, _matching(base, _TOKENIZER_FILES)),
        },
    }


def _matching(directory: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in directory.glob(pattern)})


def _copy_model(base: Path, to: Path) -> None:
    to.mkdir()
    for path in _matching(base, _MODEL_FILES):
        shutil.copyfile(path, to / path.name)
