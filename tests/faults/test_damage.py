"""A flipped byte or a truncated file in any kind of stage output is noticed and made anew."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tell_core.data.token_store import has_stores
from tell_core.pipeline import curate_stage
from tell_core.spec.loading import load_spec
from tell_core.store import MARKER, find_stage
from tests.faults.whole_run import differences, outputs, run_whole

Damage = Callable[[bytes], bytes]


def flip(content: bytes) -> bytes:
    """The content with one bit in its middle turned round."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def truncate(content: bytes) -> bytes:
    """The first half of the content."""
    return content[: len(content) // 2]


def empty(_content: bytes) -> bytes:
    """Nothing, as after a power cut without a sync."""
    return b""


DAMAGES = (flip, truncate, empty)


def kinds(root: Path) -> dict[str, Path]:
    """One file of every kind that stages put out, by stage and name."""
    return {
        f"{path.relative_to(root / 'stages').parts[0].partition('-')[0]}/{path.name}": path
        for path in sorted((root / "stages").rglob("*"))
        if path.is_file() and path.stat().st_size
    }


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_kind_of_stage_output_is_noticed(damage: Damage, unbroken: Path):
    unnoticed = []
    for kind, path in kinds(unbroken).items():
        content = path.read_bytes()
        path.write_bytes(damage(content))
        directory = unbroken / "stages" / path.relative_to(unbroken / "stages").parts[0]
        stage, _, fingerprint = directory.name.rpartition("-")
        # A flipped bit within the marker's own text may leave it true: its time of writing.
        if find_stage(unbroken, stage, fingerprint) and path.name != MARKER:
            unnoticed.append(kind)
        path.write_bytes(content)

    assert unnoticed == []


def test_a_mixture_whose_token_store_is_damaged_is_not_used(unbroken: Path):
    stores = sorted((unbroken / "stages").glob("tokens-*/*.arrow"))
    mixed = [path.parent for path in (unbroken / "stages").glob("mix-*/mixture_index.safetensors")]
    contents = {path: path.read_bytes() for path in stores}
    for path, content in contents.items():
        path.write_bytes(flip(content))

    usable = [path.name for path in mixed if has_stores(path)]

    for path, content in contents.items():
        path.write_bytes(content)
    assert stores
    assert usable == []


@pytest.mark.parametrize("damage", [flip, truncate])
def test_a_rerun_makes_damaged_stages_anew_with_the_same_bits(
    damage: Damage, unbroken: Path, drill_spec: Path, tmp_path: Path
):
    before = outputs(unbroken)
    root = tmp_path / "tiny"
    shutil.copytree(unbroken, root)
    for path in kinds(root).values():
        path.write_bytes(damage(path.read_bytes()))

    run_whole(drill_spec, root)

    assert differences(outputs(root), before) == []


def test_without_its_marker_a_stage_does_not_count(
    unbroken: Path, drill_spec: Path, tmp_path: Path
):
    root = tmp_path / "tiny"
    shutil.copytree(unbroken, root)
    for marker in root.glob(f"stages/curate-*/{MARKER}"):
        marker.unlink()

    curated = curate_stage(load_spec(drill_spec), root)

    assert not curated.reused
