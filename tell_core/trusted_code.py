"""Code that models bring: which of it the user of this machine has read and allowed.

A model whose architecture transformers does not know brings Python files that would run as the
user. None of it runs unless every file has a digest on the user's own list: so a revision is
allowed, not a name; a changed file is refused, whoever published it; and no specification, bundle
or registry can allow anything. The list lies in the user's home directory.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tell_core.errors import ModelError, StoreError
from tell_core.spec.identity import file_digest
from tell_core.store import read_json, write_json

_LIST = Path(".config") / "tell" / "trusted_code.json"
# Where transformers looks for the classes of a model's own.
_NAMING_FILES = ("config.json", "tokenizer_config.json")
_ELSEWHERE = "--"  # in "owner/model--file.Class": code of another repository, at no fixed revision


@dataclass(frozen=True)
class Allowed:
    """A file of code that may run.

    Attributes:
        digest: sha256 of the file, in hexadecimal digits.
        file: Its name within the model.
        model: Directory or hub id it was read in.
        revision: Commit on the hub, or None.
        since: When it was allowed, in UTC, as ISO 8601.
    """

    digest: str
    file: str
    model: str
    revision: str | None
    since: str


def trusted_file() -> Path:
    """The list of the user who runs this process."""
    return Path.home() / _LIST


def allowed_code() -> list[Allowed]:
    """Everything on the list.

    Raises:
        ModelError: The list cannot be read.
    """
    path = trusted_file()
    if not path.is_file():
        return []
    try:
        return [Allowed(**entry) for entry in read_json(path)]
    except (StoreError, TypeError) as error:
        raise ModelError(
            f"{path} cannot be read ({error}); mend it, or remove it and allow again with"
            " `tell trust add`"
        ) from error


def code_files(directory: Path) -> dict[str, str]:
    """sha256 of every Python file of a model, by name within it."""
    return {
        path.relative_to(directory).as_posix(): file_digest(path)
        for path in sorted(directory.rglob("*.py"))
    }


def brings_code(directory: Path) -> bool:
    """Whether a model names classes of its own."""
    return any(True for _ in _own_classes(directory))


def may_run_code(directory: Path) -> bool:
    """Whether a model brings code and all of it is allowed."""
    files, classes = code_files(directory), list(_own_classes(directory))
    if not files or not classes or any(_ELSEWHERE in name for name in classes):
        return False
    return set(files.values()) <= {entry.digest for entry in allowed_code()}


def allow(directory: Path, model: str, revision: str | None) -> list[Allowed]:
    """Put every file of a model's code on the list; returns the entries.

    Args:
        directory: Where the model lies.
        model: What the user calls it: directory or hub id.
        revision: Full commit on the hub; None for a directory.

    Raises:
        ModelError: It brings no code, or takes code from another repository.
    """
    files, classes = code_files(directory), list(_own_classes(directory))
    if elsewhere := [name for name in classes if _ELSEWHERE in name]:
        raise ModelError(
            f"{model} takes code from another repository ({elsewhere[0]}), at whatever revision is"
            " there on the day; copy that file into a copy of the model and name it without the"
            " repository"
        )
    if not files or not classes:
        raise ModelError(f"{model} brings no code; there is nothing to allow")
    since = datetime.now(UTC).isoformat(timespec="seconds")
    new = [Allowed(digest, name, model, revision, since) for name, digest in files.items()]
    kept = [entry for entry in allowed_code() if entry.digest not in set(files.values())]
    _write([*kept, *new])
    return new


def forbid(model: str) -> list[Allowed]:
    """Take everything that was allowed for a model off the list; returns those entries."""
    entries = allowed_code()
    if found := [entry for entry in entries if entry.model == model]:
        _write([entry for entry in entries if entry.model != model])
    return found


def _write(entries: list[Allowed]) -> None:
    path = trusted_file()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_json(path, [asdict(entry) for entry in entries])


def _own_classes(directory: Path) -> Iterator[str]:
    """The classes of its own that a model names, as ``file.Class``."""
    for name in _NAMING_FILES:
        path = directory / name
        named = _read(path)
        own = named.get("auto_map") if isinstance(named, dict) else None
        for value in own.values() if isinstance(own, dict) else [own]:
            for one in value if isinstance(value, list | tuple) else [value]:
                if isinstance(one, str):
                    yield one


def _read(path: Path) -> Any:
    """The content of a JSON file; None where loading the model will say what is wrong with it."""
    try:
        return read_json(path)
    except StoreError:
        return None
