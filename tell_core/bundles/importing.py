"""Import what bundles brought back: verified, scored, filed as finished stages."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tell_core.bundles.exporting import is_exported
from tell_core.bundles.layout import (
    BundleError,
    check_files,
    find_bundles,
    read_bundle,
    read_result,
    unpack,
)
from tell_core.bundles.running import DIVERGED
from tell_core.errors import InputError
from tell_core.evaluation.measuring import MEASURED_FILE, Measured
from tell_core.evaluation.scoring import score_measured
from tell_core.pipeline import (
    Stage,
    base_digest,
    evaluate_fingerprint,
    find_diverged,
    note_diverged,
    number_format,
    train_fingerprint,
)
from tell_core.results import open_run
from tell_core.spec.model import ExperimentSpec
from tell_core.store import MARKER, find_stage, stage_path, write_stage

NEW, KNOWN, WAITING = "imported", "was there", "not run yet"


class Imported(NamedTuple):
    """What became of one bundle.

    Attributes:
        bundle: Its name.
        outcome: "imported", "was there", or "not run yet".
    """

    bundle: str
    outcome: str


def import_bundles(paths: Sequence[Path], root: Path) -> list[Imported]:
    """File the results of bundles in the run directory that they were exported from.

    Every digest is verified first; nothing of a refused bundle is kept, and the others are
    imported all the same. The settings in a bundle name functions that are imported and called, so
    they are read only in bundles that this run directory exported. Metrics are computed here, from
    the answers and log-probabilities that were measured there.

    Args:
        paths: Bundles, .tar files of them, or directories that hold them.
        root: The run directory; held by the caller.

    Returns:
        What became of each, in their order.

    Raises:
        BundleError: Some are damaged, hold links, lead elsewhere, were not exported from here, or
            belong to another version; all of these are named.
    """
    found, refused = [], []
    with tempfile.TemporaryDirectory(prefix=".import-", dir=root) as aside:
        for number, path in enumerate(find_bundles(paths)):
            try:
                directory = path if path.is_dir() else _unpacked(path, Path(aside) / str(number))
                found.append(_import(directory, root))
            except InputError as error:
                refused.append(f"{path.name}: {error}")
    if refused:
        reasons = "\n".join(refused)
        raise BundleError(f"{len(refused)} of {len(found) + len(refused)} refused:\n{reasons}")
    return found


def _unpacked(archive: Path, to: Path) -> Path:
    to.mkdir()
    return unpack(archive, to)


def _import(directory: Path, root: Path) -> Imported:
    bundle = read_bundle(directory)
    _check_exported(bundle, root)
    name = bundle["name"]
    result = read_result(directory, bundle)
    if result is None:
        return Imported(name, WAITING)
    spec = ExperimentSpec.model_validate(bundle["spec"])
    open_run(spec, root)
    _check_base(spec, bundle)
    mixed = _mixed(bundle, root)
    trained = _trained(spec, bundle, mixed)
    stages = bundle["stages"]
    if result["outcome"] == DIVERGED:
        if find_diverged(root, stages["train"]):
            return Imported(name, KNOWN)
        note_diverged(root, stages["train"], result["message"])
        return Imported(name, NEW)
    is_new = _file_training(directory, result, trained) if trained else False
    if stages["evaluate"]:
        is_new = _score(directory, result, spec, bundle, mixed, trained) or is_new
    return Imported(name, NEW if is_new else KNOWN)


def _check_exported(bundle: Mapping[str, Any], root: Path) -> None:
    """Before anything that a bundle says is acted on, see that it was said here."""
    if not is_exported(bundle, root):
        raise BundleError(
            f"it was not exported from {root}, or was changed since: import into the run directory"
            " that `tell cell export` was given. If that is this one, repeat that command with the"
            " same --to: results in the bundles there are kept"
        )


def _check_base(spec: ExperimentSpec, bundle: Mapping[str, Any]) -> None:
    """See that a run here would take the same base model in the same number format."""
    model = spec.model
    if base_digest(model.id, model.revision) != bundle["model"]["digest"]:
        raise BundleError(f"the base model {model.id} has changed since the export; export again")
    if number_format(spec) != bundle["dtype"]:
        raise BundleError(
            f"it was exported for {bundle['dtype']}, a run on this machine would use"
            f" {number_format(spec)}; name one with --set model.dtype=… and export again"
        )


def _mixed(bundle: Mapping[str, Any], root: Path) -> Stage:
    """The data that the bundle was exported with."""
    mix = bundle["stages"]["mix"]
    if not find_stage(root, "mix", mix):
        raise BundleError(
            f"{root} does not hold the data mix-{mix} of this bundle; import into the run directory"
            " that `tell cell export` was given"
        )
    return Stage("mix", mix, root, reused=True)


def _trained(spec: ExperimentSpec, bundle: Mapping[str, Any], mixed: Stage) -> Stage | None:
    """The training that the bundle made, proven to be the one that a run here would look for."""
    train = bundle["stages"]["train"]
    if train is None:
        return None
    expected = train_fingerprint(spec, mixed)
    if train != expected:
        raise BundleError(
            f"its training train-{train} is not the one that this version of tell asks for"
            f" (train-{expected}); export the cell again"
        )
    return Stage("train", train, mixed.root, reused=True)


def _file_training(directory: Path, result: Mapping[str, Any], trained: Stage) -> bool:
    """Copy the training; returns whether it was not there."""
    if find_stage(trained.root, "train", trained.fingerprint):
        return False
    source = stage_path(directory, "train", trained.fingerprint)
    files = _files_below(directory, source, result)
    with write_stage(trained.root, "train", trained.fingerprint) as out:
        for name in files:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, out / name)
        check_files(out, files)
    return True


def _files_below(directory: Path, stage: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """The verified files of a stage, without its marker, by their path in it.

    Raises:
        BundleError: The result names none.
    """
    prefix = PurePosixPath(stage.relative_to(directory).as_posix())
    files = {
        PurePosixPath(name).relative_to(prefix).as_posix(): record
        for name, record in result["files"].items()
        if PurePosixPath(name).is_relative_to(prefix)
    }
    files.pop(MARKER, None)
    if not files:
        raise BundleError(f"its result holds no {stage.name}; run the bundle again")
    return files


def _score(
    directory: Path,
    result: Mapping[str, Any],
    spec: ExperimentSpec,
    bundle: Mapping[str, Any],
    mixed: Stage,
    trained: Stage | None,
) -> bool:
    """Compute the metrics of what was measured; returns whether they were not there."""
    identity = evaluate_fingerprint(spec, mixed, trained)
    if find_stage(mixed.root, "evaluate", identity):
        return False
    source = stage_path(directory, "measure", bundle["stages"]["evaluate"])
    if MEASURED_FILE not in _files_below(directory, source, result):
        raise BundleError(f"its result holds no {MEASURED_FILE}; run the bundle again")
    measured = Measured.load(source / MEASURED_FILE)
    with write_stage(mixed.root, "evaluate", identity) as out:
        score_measured(mixed.path, measured, spec.evaluation, out)
    return True
