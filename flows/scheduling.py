"""What scheduled flows share: asking whether there is work, and saying so when it failed.

Runs that come late or overlap must not pile up: each first asks whether its work is done or under
way, and ends at once when it is.

Prefect imports a flow's file to deploy it, and once more to look for hooks before it says that a
run is cancelled. So the files of deployed flows import late what computes or records.
"""

import json
from pathlib import Path
from typing import Any, Literal

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.objects import FlowRun, State
from prefect.events import emit_event
from prefect.flows import Flow
from prefect.states import Completed

from tasks.stores import tracking_uri
from tell_core.errors import StoreError, TellError
from tell_core.spec.model import ExperimentSpec

WorkState = Literal["finished", "under way", "to do"]
HOUR = 3600
DAY = 24 * HOUR
FAILED_EVENT = "tell.flow.failed"


def is_under_way(root: Path) -> bool:
    """Whether another process works in a run directory."""
    from tell_core.results import sole_owner

    if not root.is_dir():
        return False
    try:
        with sole_owner(root):
            return False
    except StoreError:
        return True


def work_state(spec: ExperimentSpec, root: Path, *, track: bool, is_adaptive: bool) -> WorkState:
    """Whether an experiment is to be run.

    Raises:
        InputError: A source or the base model is missing, or the directory is another's.
    """
    from tell_core.results import is_finished, open_run

    if is_under_way(root):
        return "under way"
    open_run(spec, root)
    tracked_at = tracking_uri(root) if track else None
    done = is_finished(spec, root, tracked_at=tracked_at, is_adaptive=is_adaptive)
    return "finished" if done else "to do"


def nothing_to_do(message: str) -> State[None]:
    """Final state of a run that found its work done or under way; told apart in lists."""
    return Completed(name="NothingToDo", message=message)


def can_retry_help(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether another try may end better: not where the input is wrong or our own code said no."""
    try:
        state.result()
    except TellError:
        return False
    except Exception:
        return True
    return False


# What a machine without a server or hub for a while needs; a wrong input needs no second try.
RETRIES: dict[str, Any] = {
    "retries": 2,
    "retry_delay_seconds": [10, 60],
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": can_retry_help,
}


def tell_failure(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Leave what happened on the run's page, and emit an event that can become a message."""
    _emit_failure(flow, flow_run, state)
    rows = [{"run": flow_run.name, "state": state.name, "message": state.message or "none"}]
    # A crash is told by the worker, outside of the run; a table, as the message may quote data.
    with get_client(sync_client=True) as client:
        client.create_artifact(
            ArtifactCreate(
                key="failure",
                type="table",
                description="What happened. The same run goes on from what was finished.",
                data=json.dumps(rows),
                flow_run_id=flow_run.id,
            )
        )


def _emit_failure(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    emit_event(
        event=FAILED_EVENT,
        resource={
            "prefect.resource.id": f"tell.flow.{flow.name.replace(' ', '-')}",
            "prefect.resource.name": flow.name,
        },
        related=[
            {
                "prefect.resource.id": f"prefect.flow-run.{flow_run.id}",
                "prefect.resource.role": "flow-run",
            }
        ],
        payload={"flow_run": flow_run.name, "state": state.name, "message": state.message},
    )
