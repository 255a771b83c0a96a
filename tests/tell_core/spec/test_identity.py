import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell_core.spec.identity import canonical_json, file_digest, fingerprint
from tell_core.spec.model import AnchorSpec

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(plain)
def test_canonical_json_reads_back_as_the_value(value):
    assert json.loads(canonical_json(value)) == value


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_order_of_keys_does_not_enter_identity(value):
    turned = dict(reversed(list(value.items())))

    assert fingerprint(value) == fingerprint(turned)


@given(plain, plain)
def test_parts_do_not_run_into_each_other(first, second):
    assert fingerprint([first], second) != fingerprint(first, [second]) or first == [] == second


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: "a"}, {1, 2}, object(), b"x"])
def test_what_has_no_stable_text_is_refused(value):
    with pytest.raises((TypeError, ValueError)):
        canonical_json(value)


def test_a_changed_default_changes_the_fingerprint():
    assert fingerprint(AnchorSpec()) != fingerprint(AnchorSpec(position="after"))


def test_fingerprint_is_equal_in_another_process():
    code = (
        "from tell_core.spec.identity import fingerprint;print(fingerprint({'b':[1,2.5],'a':'é'}))"
    )

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == fingerprint({"a": "é", "b": [1, 2.5]}) == "a7d69d60a9f8e676"


def test_file_digest_is_sha256_of_the_bytes(tmp_path: Path):
    (tmp_path / "f").write_bytes(b"abc" * 1_000_000)

    assert file_digest(tmp_path / "f") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()
