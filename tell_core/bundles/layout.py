"""What a bundle is on disk, and the proof that it is whole.

```text
<name>/
  bundle.json     what is to be done: settings, fingerprints, digests of all files below
  inputs/         mixture, probe set and test items as token ids and JSON lines
  model/          the base model, only where it was asked for
  stages/         made by the run: train-<fingerprint>/ and measure-<fingerprint>/
  result.json     what came of it: outcome, digests of all files under stages/
```

``bundle.json`` and ``result.json`` carry a digest of themselves. Digests find damage and mistakes;
they are no signatures: who can write a bundle can write its digests too. So a run directory keeps
the digests of what was exported from it, and takes results of nothing else.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from tell_core.errors import InputError, StoreError
from tell_core.spec.identity import canonical_json, file_digest
from tell_core.store import explain_disk_errors, json_text, read_json, write_json

FORMAT = 1
BUNDLE_FILE = "bundle.json"
RESULT_FILE = "result.json"
INPUTS = "inputs"
MODEL = "model"
STAGES = "stages"
DIGEST = "digest"


class BundleError(InputError):
    """A bundle is damaged, unfit, or not what its digests say."""


def find_bundles(paths: Iterable[Path]) -> list[Path]:
    """Bundles among ``paths``: directories, .tar files, and directories that hold such.

    A .tar beside a directory of its name is passed over: the directory is where it was unpacked.

    Raises:
        BundleError: A path is none of these.
    """
    found: list[Path] = []
    for path in paths:
        inside = list(_bundles_in(path))
        if not inside:
            raise BundleError(
                f"{path} is no bundle: needed is what `tell cell export` wrote, a directory with"
                f" {BUNDLE_FILE}, a .tar of one, or a directory of these"
            )
        found += inside
    return found


def _bundles_in(path: Path) -> Iterator[Path]:
    if (path / BUNDLE_FILE).is_file() or (path.suffix == ".tar" and path.is_file()):
        yield path
    elif path.is_dir():
        for inside in sorted(path.iterdir(), key=_unpacked_name):
            is_unpacked = inside.suffix == ".tar" and inside.with_suffix("").is_dir()
            is_bundle = inside.suffix == ".tar" or (inside / BUNDLE_FILE).is_file()
            if is_bundle and not is_unpacked:
                yield inside


def _unpacked_name(path: Path) -> str:
    """What orders bundles, packed or not, so that unpacking changes nobody's share."""
    return path.name.removesuffix(".tar")


def read_bundle(directory: Path) -> dict[str, Any]:
    """Read bundle.json and verify every file that it names.

    Raises:
        BundleError: Something is missing, damaged, a link, or of another format.
    """
    bundle = read_sealed(directory / BUNDLE_FILE)
    check_files(directory, bundle["files"])
    return bundle


def read_result(directory: Path, bundle: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read result.json and verify every file that it names; None where there is none yet.

    Raises:
        BundleError: It is damaged, or the result of another bundle.
    """
    if not (directory / RESULT_FILE).exists():
        return None
    result = read_sealed(directory / RESULT_FILE)
    if result["bundle"] != bundle[DIGEST]:
        raise BundleError(
            f"{directory / RESULT_FILE} is the result of another bundle; run it again"
        )
    check_files(directory, result["files"])
    return result


def write_sealed(path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``fields`` as JSON with a digest of themselves; returns what was written."""
    sealed = {"format": FORMAT, **fields}
    sealed[DIGEST] = _digest_of(sealed)
    write_json(path, sealed)
    return sealed


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `write_sealed` wrote.

    Raises:
        BundleError: It is missing, damaged, a link, or of another format.
    """
    _refuse_links(path.parent, PurePosixPath(path.name))
    try:
        sealed: dict[str, Any] = read_json(path)
    except StoreError as error:
        raise BundleError(f"{error}; copy or export the bundle again") from error
    is_whole = isinstance(sealed, dict) and sealed.get(DIGEST) == _digest_of(sealed)
    if not is_whole or path.read_bytes() != json_text(sealed).encode():
        raise BundleError(
            f"{path} is not as it was written (its digest differs); copy or export the bundle again"
        )
    if sealed["format"] != FORMAT:
        raise BundleError(
            f"{path} has format {sealed['format']}, this version reads {FORMAT}; use the version of"
            " tell that wrote it, or export again"
        )
    return sealed


def _digest_of(fields: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in fields.items() if name != DIGEST}
    return hashlib.sha256(canonical_json(rest).encode()).hexdigest()


def describe_files(root: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of files below ``root``, by their path from there."""
    return {
        path.relative_to(root).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": file_digest(path),
        }
        for path in files
    }


def files_below(directory: Path) -> list[Path]:
    """Every file below a directory, in a fixed order."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def check_files(
    root: Path, files: Mapping[str, Mapping[str, Any]], *, may_be_links: bool = False
) -> None:
    """Verify that the files lie below ``root`` and are as described.

    Args:
        root: The directory.
        files: Size and sha256 by path, as of `describe_files`.
        may_be_links: Whether links are followed, as in a model hub's cache; else refused.

    Raises:
        BundleError: One is not; it is named.
    """
    for name, record in files.items():
        path = _inside(root, name, may_be_link=may_be_links)
        if not path.is_file():
            raise BundleError(f"{path} is missing; copy or export the bundle again")
        if path.stat().st_size != record["bytes"] or file_digest(path) != record["sha256"]:
            raise BundleError(
                f"{path} is damaged: its size or sha256 is not the recorded one; copy or export"
                " the bundle again"
            )


def _inside(root: Path, name: str, *, may_be_link: bool) -> Path:
    """The path of a file below ``root``; refuses names that lead out of it."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or not relative.parts or "\\" in name:
        raise BundleError(f"{root} names the file {name!r}, which leads out of the bundle; refused")
    if not may_be_link:
        _refuse_links(root, relative)
    return root / relative


def _refuse_links(root: Path, relative: PurePosixPath) -> None:
    path = root
    for part in relative.parts:
        path = path / part
        if path.is_symlink():
            raise BundleError(f"{path} is a link; a bundle holds files of its own alone; refused")


def pack(directory: Path) -> Path:
    """Write a bundle as ``<directory>.tar``, the same bytes each time; returns its path."""
    archive = directory.with_name(directory.name + ".tar")
    partial = archive.with_name(f".{archive.name}.partial")
    with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as tar:
        for path in files_below(directory):
            member = tarfile.TarInfo(f"{directory.name}/{path.relative_to(directory).as_posix()}")
            member.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(member, file)
    partial.replace(archive)
    return archive


def unpack(archive: Path, to: Path) -> Path:
    """Unpack a bundle below ``to``; returns its directory, which is left alone when it is there.

    Nothing is written before every member was found to be a plain file below one directory, and
    the directory appears when all are written.

    Raises:
        BundleError: The archive is damaged, or a member is a link, a device, or leads elsewhere.
    """
    aside = to / f".{archive.stem}.partial"
    try:
        with tarfile.open(archive, "r:") as tar:
            members = [member for member in tar.getmembers() if not member.isdir()]
            roots = {_checked_member(archive, member) for member in members}
            if len(roots) != 1:
                raise BundleError(f"{archive} holds {len(roots)} directories; needed: one bundle")
            final = to / roots.pop()
            if final.is_dir():
                return final
            shutil.rmtree(aside, ignore_errors=True)
            with explain_disk_errors(to):
                for member in members:
                    tar.extract(member, aside, set_attrs=False, filter="data")
                (aside / final.name).rename(final)
    except tarfile.TarError as error:
        raise BundleError(f"{archive} cannot be unpacked: {error}; copy it again") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def _checked_member(archive: Path, member: tarfile.TarInfo) -> str:
    """Name of the directory that a member lies in."""
    path = PurePosixPath(member.name)
    is_inside = len(path.parts) >= 2 and ".." not in path.parts and not path.is_absolute()
    if not member.isreg() or not is_inside or "\\" in member.name:
        raise BundleError(
            f"{archive} holds {member.name!r}, which is no plain file below one directory; refused"
        )
    return path.parts[0]
