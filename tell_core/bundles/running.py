"""Run a bundle: train and measure one cell, without network, scores left to the import.

Needs torch, transformers, peft, safetensors and numpy. Everything may be killed at any instant; the
same call goes on, training from its last checkpoint.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from tell_core.bundles.layout import (
    INPUTS,
    MODEL,
    RESULT_FILE,
    STAGES,
    BundleError,
    check_files,
    describe_files,
    files_below,
    read_bundle,
    read_result,
    write_sealed,
)
from tell_core.bundles.settings import Settings, TrainingSettings
from tell_core.store import MARKER, explain_disk_errors, find_stage, stage_path, write_stage

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

FINISHED, DIVERGED = "finished", "diverged"
_LOCK = ".lock"
_VERSIONED = ("torch", "transformers", "peft", "safetensors", "numpy")


def run_bundle(
    directory: Path,
    *,
    model: Path | None = None,
    device: str | None = None,
    threads: int | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Do what a bundle asks for, or find that it is done.

    Args:
        directory: The bundle.
        model: Directory of the base model; by default the bundle's own copy, else the directory
            or hub id that the bundle was exported with.
        device: auto, cpu or cuda; by default as in the specification.
        threads: CPU threads; by default as in the specification.
        on_progress: Called with the phase, units done and units in all.

    Returns:
        The contents of result.json: ``outcome`` "finished", or "diverged" for a candidate of the
        tuning whose learning rate was too high; digests of the files made; where and with what.

    Raises:
        BundleError: The bundle is damaged, or the base model is not the one it was made for.
        DivergedError: The loss of a cell is not finite.
        TellError: As of `train_cell` and `measure_cell`.
    """
    bundle = read_bundle(directory)
    with _sole_worker(directory):
        result = _whole_result(directory, bundle)
        if result is not None:
            return result
        base = find_model(directory, bundle, model)
        started = time.monotonic()
        outcome, message = _work(directory, bundle, base, device, threads, on_progress)
        return write_sealed(
            directory / RESULT_FILE,
            {
                "bundle": bundle["digest"],
                "outcome": outcome,
                "message": message,
                "seconds": time.monotonic() - started,
                "machine": _machine(),
                "files": describe_files(directory, _made(directory)),
            },
        )


@contextmanager
def _sole_worker(directory: Path) -> Iterator[None]:
    """Hold the bundle against other processes; the lock ends with the process that holds it."""
    with explain_disk_errors(directory), (directory / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that runs %s", directory.name)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _whole_result(directory: Path, bundle: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result that is there already, unless it is damaged: then its stages are made anew."""
    try:
        return read_result(directory, bundle)
    except BundleError as error:
        logger.warning("%s; what is damaged is made again", error)
        return None


def find_model(directory: Path, bundle: Mapping[str, Any], model: Path | None) -> Path:
    """The base model's directory, proven to be the one that the bundle was made for.

    Raises:
        BundleError: Weights, configuration or tokenizer differ.
        ModelError: There is no model.
    """
    from tell_core.training.models import model_digest, resolve_model

    described = bundle["model"]
    if model is None and (directory / MODEL).is_dir():
        model = directory / MODEL
    id_, revision = (str(model), None) if model else (described["id"], described["revision"])
    base = resolve_model(id_, revision)
    if model_digest(base) != described["digest"]:
        raise BundleError(
            f"{base} is not the base model that {directory.name} was exported with: the digest of"
            f" its configuration and weights differs from {described['digest'][:16]}…; copy"
            f" {described['id']} from the machine that exported it"
        )
    check_files(base, described["files"], may_be_links=True)
    return base


def _work(
    directory: Path,
    bundle: Mapping[str, Any],
    base: Path,
    device: str | None,
    threads: int | None,
    on_progress: Progress | None,
) -> tuple[str, str | None]:
    """Train and measure; returns the outcome and, where it diverged, why."""
    from tell_core.training.trainer import DivergedError

    changes = {"device": device, "threads": threads}
    training = TrainingSettings(bundle["spec"]["training"]).replaced(
        **{name: value for name, value in changes.items() if value is not None}
    )
    if bundle["stages"]["train"]:
        try:
            _train(directory, bundle, base, training, on_progress)
        except DivergedError as error:
            if bundle["kind"] != "tuning":
                raise
            return DIVERGED, str(error)
    if bundle["stages"]["evaluate"]:
        _measure(directory, bundle, base, training, on_progress)
    return FINISHED, None


def _train(
    directory: Path,
    bundle: Mapping[str, Any],
    base: Path,
    training: Settings,
    on_progress: Progress | None,
) -> None:
    from tell_core.training.loop import train_cell

    identity = bundle["stages"]["train"]
    if find_stage(directory, "train", identity):
        return
    with write_stage(directory, "train", identity, resume=True) as out:
        train_cell(
            model_path=str(base),
            revision=None,
            inputs=directory / INPUTS,
            training=cast("Any", training),
            seed=bundle["cell"]["seed"],
            out=out,
            dtype=bundle["dtype"],
            on_progress=_per_step(on_progress),
        )


def _measure(
    directory: Path,
    bundle: Mapping[str, Any],
    base: Path,
    training: Settings,
    on_progress: Progress | None,
) -> None:
    from tell_core.evaluation.measuring import measure_cell

    stages = bundle["stages"]
    if find_stage(directory, "measure", stages["evaluate"]):
        return
    with write_stage(directory, "measure", stages["evaluate"]) as out:
        measure_cell(
            model_path=str(base),
            revision=None,
            inputs=directory / INPUTS,
            trained=stage_path(directory, "train", stages["train"]) if stages["train"] else None,
            evaluation=cast("Any", Settings(bundle["spec"]["evaluation"])),
            needs_text=bundle["needs_text"],
            out=out,
            dtype=bundle["dtype"],
            device=training.device,
            threads=training.threads,
            on_progress=on_progress,
        )


def _per_step(on_progress: Progress | None) -> Callable[[int, int, Any], None] | None:
    if on_progress is None:
        return None
    return lambda done, total, _record: on_progress("training", done, total)


def _made(directory: Path) -> list[Path]:
    """Files of the finished stages; what a training that diverged left is no result."""
    stages = (path for path in (directory / STAGES).iterdir() if (path / MARKER).is_file())
    return [file for path in sorted(stages) for file in files_below(path)]


def _machine() -> dict[str, Any]:
    import torch

    return {
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "versions": {name: _version(name) for name in _VERSIONED},
    }


def _version(name: str) -> str | None:
    """Version of a package; None where it was copied into place without its metadata."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
