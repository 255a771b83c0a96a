"""The nightly curation: sources whose content changed are read and cleaned before they are used."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State

from flows.forms import Setting
from flows.last_words import end_with_worker
from flows.scheduling import HOUR, is_under_way, nothing_to_do, tell_failure
from tell_core.spec.identity import fingerprint
from tell_core.spec.loading import load_spec
from tell_core.store import read_json, write_json

NOTE = "sources.json"


@flow(
    name="nightly curation",
    flow_run_name="curation · {spec_file.stem}",
    timeout_seconds=6 * HOUR,
    on_failure=[tell_failure],
    on_crashed=[tell_failure],
)
def curate_changed(
    spec_file: Path, settings: list[Setting] | None = None, out: Path | None = None
) -> dict[str, Any] | State[None]:
    """Curate an experiment's sources if the content of one has changed since the last time.

    Args:
        spec_file: The experiment's YAML.
        settings: ``name=value`` for its variables and fields.
        out: Run directory; ``runs/<experiment name>`` by default.
    """
    end_with_worker()
    from tasks.artifacts import show_curation
    from tasks.stages import curate, value_of
    from tell_core.data.curation import curation_inputs
    from tell_core.results import default_root, open_run, sole_owner

    spec = load_spec(spec_file, settings or [])
    root = out or default_root(spec)
    if is_under_way(root):
        return nothing_to_do(f"{spec.name} is under way in {root}")
    open_run(spec, root)
    with sole_owner(root):
        inputs, note = curation_inputs(spec), root / NOTE
        rows = list(changed_sources(read_json(note) if note.exists() else {"sources": []}, inputs))
        curated = value_of(curate(spec, root))
        if curated.reused and not rows:
            return nothing_to_do(f"none of {len(inputs['sources'])} sources has changed")
        write_json(note, inputs)
    for row in rows:
        get_run_logger().info("%s %s: %s", row["role"], row["source"], row["change"])
    create_table_artifact(key="changes", table=rows, description="Sources that changed")
    show_curation(curated)
    return {"directory": str(curated.path), "changed": rows}


def changed_sources(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """A row per source that is new, changed or gone, by the digest of its content.

    Args:
        before: What `curation_inputs` gave the last time.
        now: What it gives now.
    """
    old, new = _digests(before), _digests(now)
    for role, name in sorted(old.keys() | new.keys()):
        was, is_ = old.get((role, name)), new.get((role, name))
        if was != is_:
            change = "new" if was is None else "gone" if is_ is None else f"{was} became {is_}"
            yield {"role": role, "source": name, "change": change}


def _digests(inputs: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    return {(entry["role"], entry["name"]): fingerprint(entry) for entry in inputs["sources"]}
