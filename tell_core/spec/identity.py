"""Identity of specifications and stages: canonical JSON and its digest."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_READ_BYTES = 1 << 20


def canonical_json(value: Any) -> str:
    """Serialise ``value`` so that equal values give equal text, on every machine.

    Keys are sorted, no whitespace, non-ASCII kept as is. Accepts None, booleans, integers,
    finite floats, strings, lists, tuples, mappings with string keys and pydantic models.

    Raises:
        TypeError: A value of another type, for which no stable text is known.
        ValueError: A float that is not finite.
    """
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def fingerprint(*parts: Any) -> str:
    """Digest of ``parts``: the first 16 hexadecimal digits of sha256 of their canonical JSON."""
    return hashlib.sha256(canonical_json(list(parts)).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if callable(dump := getattr(value, "model_dump", None)):  # pydantic, without importing it
        return _plain(dump())
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} has no place in an identity: only finite numbers do")
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"identity needs string keys, got {sorted(map(repr, value))}")
        return {key: _plain(item) for key, item in value.items()}
    raise TypeError(f"no stable text is known for a {type(value).__name__}: {value!r}")
