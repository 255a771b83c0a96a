"""Stage directories: written aside, sealed by a marker, never half-accepted.

A stage directory is ``<root>/stages/<stage>-<fingerprint>``. It is built as
``<...>.partial``, then sealed: every file is synced, the marker ``_SUCCESS`` with sizes and
digests is written last, and the directory is renamed. A directory without a marker, or whose
files differ from it, does not count as finished.
"""

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tell_core.errors import StoreError
from tell_core.spec.identity import file_digest

MARKER = "_SUCCESS"
# No space, over quota, over the size limit of a file, read-only, not permitted.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def stage_path(root: Path, stage: str, fp: str) -> Path:
    """Where the finished outputs of a stage lie."""
    return root / "stages" / f"{stage}-{fp}"


def partial_path(final: Path) -> Path:
    """Where a stage directory is built until it is finished."""
    return final.with_name(final.name + ".partial")


def find_stage(root: Path, stage: str, fp: str) -> Path | None:
    """The finished stage directory, or None when it is missing, unfinished or damaged."""
    path = stage_path(root, stage, fp)
    return path if is_intact(path) else None


def is_intact(directory: Path) -> bool:
    """Whether the marker is there and every file it names has its size and sha256."""
    try:
        marker = json.loads((directory / MARKER).read_text())
    except (OSError, ValueError):
        return False
    return all(_matches(directory / name, record) for name, record in marker["files"].items())


@contextmanager
def write_stage(root: Path, stage: str, fp: str, *, resume: bool = False) -> Iterator[Path]:
    """Yield a directory to write into; seal and rename it when the block ends well.

    Args:
        root: The run directory.
        stage: Name of the stage.
        fp: Fingerprint of the stage's inputs.
        resume: Keep what an interrupted attempt left (training checkpoints) instead of
            starting from an empty directory.

    Raises:
        StoreError: The disk is full or not writable; what was finished before is untouched.
    """
    with write_beside(stage_path(root, stage, fp), resume=resume) as partial:
        yield partial


@contextmanager
def write_beside(final: Path, *, resume: bool = False) -> Iterator[Path]:
    """As `write_stage`, for a stage directory wherever it lies.

    Args:
        final: Where the finished stage is to lie, named ``<stage>-<fingerprint>``.
        resume: As there.

    Raises:
        StoreError: As there.
    """
    stage, _, fp = final.name.rpartition("-")
    partial = partial_path(final)
    with explain_disk_errors(partial):
        if partial.exists() and not resume:
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        yield partial
        _seal(partial, stage, fp)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        sync_path(final.parent)


@contextmanager
def explain_disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space", "read-only", "permission denied" and such into a StoreError with the mend.

    Args:
        path: What is written; named where the error names no file.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        if number not in _DISK_ERRORS:
            raise
        free = shutil.disk_usage(_existing_parent(path)).free
        raise StoreError(
            f"cannot write {getattr(error, 'filename', None) or path}: {os.strerror(number)};"
            f" {free / 1e9:.1f} GB are free there. Finished stages are intact: free some space or"
            " choose another --out, then run the same command again."
        ) from error


def _error_number(error: OSError | SafetensorError) -> int | None:
    """The operating system's error number; safetensors writes it as "(os error 28)"."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def write_text(path: Path, text: str) -> None:
    """Replace a file by ``text`` in one step: readers see the old content or the new one."""
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Replace a file by ``value`` as JSON in one step; NaN and Infinity are refused."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """The text that `write_json` writes."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        StoreError: The file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {path}: {error}") from error


def sync_below(directory: Path) -> None:
    """Have all files below a directory, and their names, on disk before anything else is written.

    A loss of power may otherwise keep what was written last and empty what it speaks of.
    """
    for path in directory.rglob("*"):
        if path.is_file() or path.is_dir():
            sync_path(path)
    sync_path(directory)


def sync_path(path: Path) -> None:
    """Have a file's content, or the names in a directory, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _seal(directory: Path, stage: str, fp: str) -> None:
    sync_below(directory)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    records = {}
    for path in files:
        name = path.relative_to(directory).as_posix()
        if name != MARKER:
            records[name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    marker = {"stage": stage, "fingerprint": fp, "finished": time.time(), "files": records}
    write_json(directory / MARKER, marker)
    sync_path(directory)


def _matches(path: Path, record: dict[str, Any]) -> bool:
    try:
        has_size = path.stat().st_size == int(record["bytes"])
        return has_size and file_digest(path) == record["sha256"]
    except OSError:
        return False


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())
