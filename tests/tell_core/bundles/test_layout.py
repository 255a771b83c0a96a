import io
import shutil
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tell_core.bundles.layout import (
    BUNDLE_FILE,
    RESULT_FILE,
    BundleError,
    find_bundles,
    pack,
    read_bundle,
    read_result,
    read_sealed,
    unpack,
    write_sealed,
)

quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def flip(path: Path, position: int, mask: int) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= mask
    path.write_bytes(content)


def archive_of(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@quick
@given(data=st.data(), mask=st.integers(1, 255), position=st.integers(0))
def test_a_flipped_byte_anywhere_is_refused(
    done: Path, data: st.DataObject, mask: int, position: int
):
    files = sorted(path for path in done.rglob("*") if path.is_file() and path.name != ".lock")
    victim = data.draw(st.sampled_from([f for f in files if f.stat().st_size]))
    content = victim.read_bytes()

    flip(victim, position, mask)

    with pytest.raises(BundleError):
        read_result(done, read_bundle(done))
    victim.write_bytes(content)
    assert read_result(done, read_bundle(done)) is not None


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "inputs/../../secret", "a\\b", ""])
def test_a_file_name_that_leads_out_is_refused(bundle: Path, name: str):
    fields = read_sealed(bundle / BUNDLE_FILE)
    write_sealed(bundle / BUNDLE_FILE, fields | {"files": {name: {"bytes": 0, "sha256": ""}}})

    with pytest.raises(BundleError, match="leads out of the bundle"):
        read_bundle(bundle)


@pytest.mark.parametrize("name", ["inputs", "inputs/items.jsonl", BUNDLE_FILE])
def test_a_link_is_refused_even_to_the_very_same_content(bundle: Path, tmp_path: Path, name: str):
    (bundle / name).rename(tmp_path / "elsewhere")
    (bundle / name).symlink_to(tmp_path / "elsewhere")

    with pytest.raises(BundleError, match="is a link"):
        read_bundle(bundle)


def test_a_result_of_another_bundle_is_refused(done: Path, finished: Path):
    shutil.copyfile(finished / "base-s0" / RESULT_FILE, done / RESULT_FILE)

    with pytest.raises(BundleError, match="of another bundle"):
        read_result(done, read_bundle(done))


def test_another_format_is_refused(bundle: Path):
    fields = {k: v for k, v in read_sealed(bundle / BUNDLE_FILE).items() if k != "digest"}
    write_sealed(bundle / BUNDLE_FILE, fields | {"format": 99})

    with pytest.raises(BundleError, match="format 99"):
        read_bundle(bundle)


def test_a_packed_bundle_is_the_same_bytes_each_time_and_unpacks_to_the_same(
    bundle: Path, tmp_path: Path
):
    archive = pack(bundle)
    content = archive.read_bytes()

    unpacked = unpack(archive, tmp_path / "there")

    assert pack(bundle).read_bytes() == content
    assert read_bundle(unpacked) == read_bundle(bundle)
    assert [path.name for path in unpacked.parent.iterdir()] == [bundle.name]


def test_unpacking_again_leaves_results_alone(bundle: Path, tmp_path: Path):
    archive = pack(bundle)
    unpacked = unpack(archive, tmp_path / "there")
    (unpacked / RESULT_FILE).write_text("of hours")

    unpack(archive, tmp_path / "there")

    assert (unpacked / RESULT_FILE).read_text() == "of hours"


@pytest.mark.parametrize(
    "bad",
    [
        member("../out"),
        member("/abs/out"),
        member("x/../../out"),
        member("alone"),
        member("x/link", tarfile.SYMTYPE, "/etc/passwd"),
        member("x/hard", tarfile.LNKTYPE, "x/ok"),
        member("x/pipe", tarfile.FIFOTYPE),
        member("y/second"),
    ],
    ids=lambda info: info.name,
)
def test_an_archive_with_a_bad_member_writes_nothing(tmp_path: Path, bad: tarfile.TarInfo):
    archive = archive_of(tmp_path / "x.tar", (member("x/ok"), b"ok"), (bad, b""))

    with pytest.raises(BundleError):
        unpack(archive, tmp_path / "there")

    assert [path.name for path in tmp_path.rglob("*")] == ["x.tar"]


def test_a_damaged_archive_is_refused(bundle: Path):
    archive = pack(bundle)
    archive.write_bytes(archive.read_bytes()[:2000])

    with pytest.raises(BundleError):
        unpack(archive, archive.parent / "there")


@given(st.sets(st.from_regex(r"[a-c][a-c.-]{0,2}", fullmatch=True), min_size=1), st.data())
@quick
def test_unpacking_changes_neither_number_nor_order_of_bundles(
    tmp_path_factory: pytest.TempPathFactory, names: set[str], data: st.DataObject
):
    to = tmp_path_factory.mktemp("order")
    for name in names:
        (to / f"{name}.tar").touch()
    packed = [path.name.removesuffix(".tar") for path in find_bundles([to])]

    for name in data.draw(st.sets(st.sampled_from(sorted(names)))):
        (to / name).mkdir()
        (to / name / BUNDLE_FILE).touch()

    assert [path.name.removesuffix(".tar") for path in find_bundles([to])] == packed


def test_what_holds_no_bundle_is_named(tmp_path: Path):
    with pytest.raises(BundleError, match="tell cell export"):
        find_bundles([tmp_path])
