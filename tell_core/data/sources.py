"""Sources: which files, or which hub dataset, a source of the specification means."""

import glob
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tell_core.errors import DataError
from tell_core.spec.identity import file_digest
from tell_core.spec.model import ExperimentSpec, SourceSpec

FileKind = Literal["json", "csv", "parquet"]
Role = Literal["task_train", "task_dev", "task_test", "general", "retention"]

_KINDS: dict[str, FileKind] = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
_IN_DIRECTORIES = (".jsonl", ".ndjson", ".csv", ".parquet")
_COMPRESSIONS = (".gz", ".zst")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILE_TYPES = "JSONL (.jsonl, .ndjson, .json; also .gz, .zst), CSV (also .gz, .zst) or Parquet"


@dataclass(frozen=True)
class ResolvedSource:
    """A source with the files it means.

    Attributes:
        spec: The source as specified.
        role: What its examples are for.
        key: Where it stands in the specification, for messages.
        files: Its files in sorted order; empty for a hub dataset.
    """

    spec: SourceSpec
    role: Role
    key: str
    files: tuple[Path, ...]

    @property
    def is_hub(self) -> bool:
        """Whether the source is a dataset on the hub."""
        return not self.files


def resolve_sources(spec: ExperimentSpec) -> tuple[ResolvedSource, ...]:
    """All sources of an experiment: task train, dev and test, then general and retention ones.

    Raises:
        DataError: A path matches nothing and is no hub id either.
    """
    sources = [resolve_source(spec.task.train, "task_train", "task.train")]
    if spec.task.dev is not None:
        sources.append(resolve_source(spec.task.dev, "task_dev", "task.dev"))
    sources.append(resolve_source(spec.task.test, "task_test", "task.test"))
    for position, source in enumerate(spec.general):
        sources.append(resolve_source(source, "general", f"general[{position}]"))
    for position, source in enumerate(spec.retention):
        sources.append(resolve_source(source, "retention", f"retention[{position}]"))
    return tuple(sources)


def resolve_source(spec: SourceSpec, role: Role, key: str) -> ResolvedSource:
    """The files of one source; none when its path has to be a hub id.

    Raises:
        DataError: Nothing is there, or it is no file of a known type.
    """
    path = Path(spec.path).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _suffix(file) in _IN_DIRECTORIES)
        if not files:
            raise DataError(
                f"{key}: directory {path} holds no {', '.join(_IN_DIRECTORIES)} file (or one of"
                " these with .gz or .zst). A .json file in a directory may describe data as well as"
                " hold it: name it itself, or a glob such as `data/*.json`."
            )
    elif path.is_file():
        files = [path]
    else:
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob: relative only)
        files = sorted(Path(match) for match in matches)
        files = [file for file in files if file.is_file()]
    unknown = [file for file in files if _suffix(file) not in _KINDS]
    if unknown:
        raise DataError(f"{key}: {unknown[0]} is of no known type; needed is {_FILE_TYPES}.")
    if not files and not _HUB_ID.fullmatch(spec.path):
        raise DataError(
            f"{key}: nothing is at {spec.path!r}: no file, no directory, no match as a glob"
            f" (looked in {Path.cwd()}), and it is no hub dataset id (owner/name) either. Correct"
            " the path; relative paths start at the working directory."
        )
    return ResolvedSource(spec, role, key, tuple(files))


def kind_of(path: Path) -> FileKind:
    """How a file is read, by its name."""
    return _KINDS[_suffix(path)]


def source_identity(source: ResolvedSource) -> dict[str, Any]:
    """What decides about a source's rows, without reading them: contents, never places."""
    spec = source.spec
    identity: dict[str, Any] = {
        "role": source.role,
        "name": spec.name,
        "format": spec.format,
        "columns": dict(spec.columns),
    }
    if source.is_hub:
        hub = {"id": spec.path, "subset": spec.subset, "revision": spec.revision}
        return identity | {"hub": hub | {"split": spec.split}}
    return identity | {
        "files": [
            {"file": file.name, "sha256": file_digest(file), "bytes": file.stat().st_size}
            for file in source.files
        ]
    }


def _suffix(path: Path) -> str:
    """Last suffix of a name, that of a compression left out; "" for no file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""
