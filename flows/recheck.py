"""The champion's check-up: its score on the data of today, and an event when it has fallen."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.events.worker import EventsWorker

from flows.forms import ModelName
from flows.last_words import end_with_worker
from flows.scheduling import HOUR, RETRIES, nothing_to_do, tell_failure
from tell_core.spec.model import SourceSpec

if TYPE_CHECKING:
    from tasks.registry import Recheck

FALLEN_EVENT = "tell.champion.fallen"


@flow(
    name="recheck champion",
    flow_run_name="recheck · {name}",
    timeout_seconds=2 * HOUR,
    on_failure=[tell_failure],
    on_crashed=[tell_failure],
)
def recheck_champion(
    name: ModelName, data: Path | None = None, again: bool = False
) -> dict[str, Any] | State[None]:
    """Evaluate the champion on fresh data; emit an event when it is worse than when registered.

    Args:
        name: The registered model.
        data: Fresh test items; by default what lies now where its test items came from.
        again: Also when these data were looked at before.
    """
    end_with_worker()
    if not has_champion(name):
        return nothing_to_do(f"{name} has no champion yet")
    found = check_champion(name, data, again)
    get_run_logger().info("%s", found.sentence())
    if found.comparison is None:
        return nothing_to_do(found.sentence())
    create_markdown_artifact(key="recheck", markdown=found.sentence())
    if found.has_fallen:
        tell_fall(found)
    note_check(found)
    return {"has_fallen": found.has_fallen, "comparison": found.comparison.as_json()}


@task(name="look for a champion", cache_policy=NO_CACHE, **RETRIES)
def has_champion(name: str) -> bool:
    """Whether the registry has a champion of that name."""
    from tasks.registry import champion_of, open_registry

    client = open_registry()
    known = {model.name for model in client.search_registered_models(f"name = '{name}'")}
    return name in known and champion_of(client, name) is not None


@task(name="evaluate champion", cache_policy=NO_CACHE, **RETRIES)
def check_champion(name: str, data: Path | None, again: bool) -> "Recheck":
    """Score the champion on the data of today."""
    from tasks.registry import open_registry, recheck

    source = SourceSpec(path=str(data)) if data else None
    return recheck(open_registry(), name, source, again=again)


@task(name="note check-up", cache_policy=NO_CACHE, **RETRIES)
def note_check(found: "Recheck") -> None:
    """Remember that these data were looked at."""
    from tasks.registry import note_recheck, open_registry

    note_recheck(open_registry(), found)


def tell_fall(found: "Recheck") -> None:
    """Emit the event and wait until it is sent; an automation may send it on to a person."""
    assert found.comparison is not None, "a fall has been measured"
    emit_event(
        event=FALLEN_EVENT,
        resource={
            "prefect.resource.id": f"tell.model.{found.name}",
            "prefect.resource.name": found.name,
        },
        payload={"version": found.version, "data": found.data, **found.comparison.as_json()},
    )
    EventsWorker.instance().drain()  # events are sent in the background
