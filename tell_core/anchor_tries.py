"""The record of the searches for an anchor in a run directory: what was compared on which items.

One file, ``anchor_tries.json``, replaced in one step. A comparison that was made once stays in it,
whatever is done later; the same comparison made again, with the same outcome, is the same.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tell_core.errors import StoreError
from tell_core.spec.identity import fingerprint
from tell_core.store import read_json, write_json

TRIES_FILE = "anchor_tries.json"


class Family(NamedTuple):
    """The comparisons of all tries on the same dev items.

    Attributes:
        num_tries: How many searches there were, this one counted.
        others: Uncorrected p-values of the comparisons that are not this search's newest.
    """

    num_tries: int
    others: list[float]


def family_of(
    root: Path, search: str, dev_items: Sequence[str], p_values: Mapping[str, Sequence[float]]
) -> Family:
    """Record the comparisons of a search and return all others on the same dev items.

    Args:
        root: The run directory.
        search: Fingerprint of the search.
        dev_items: Ids of the dev items, those of both halves.
        p_values: Uncorrected p-values of this search by where they were measured: on the base
            model, after training. A search without a candidate has none and is a try all the same.

    Raises:
        StoreError: The record is damaged, or cannot be written.
    """
    items = fingerprint("anchor dev items", sorted(dev_items))
    tries = _read(root / TRIES_FILE)
    mine = [_entry(items, search, where, values) for where, values in p_values.items()]
    tries += [entry for entry in mine if entry not in tries]
    write_json(root / TRIES_FILE, tries)
    same = [entry for entry in tries if entry["dev_items"] == items]
    others = [p for entry in same if entry not in mine for p in entry["p_values"]]
    return Family(len({entry["search"] for entry in same}), others)


def _entry(items: str, search: str, where: str, values: Sequence[float]) -> dict[str, Any]:
    return {"dev_items": items, "search": search, "where": where, "p_values": list(values)}


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    tries = read_json(path)
    keys = {"dev_items", "search", "where", "p_values"}
    if not isinstance(tries, list) or not all(
        isinstance(entry, dict) and keys <= set(entry) for entry in tries
    ):
        raise StoreError(
            f"{path} is not a record of searches for an anchor. Without it p-values would be"
            " too small: restore the file, or search in another run directory"
        )
    return list(tries)
