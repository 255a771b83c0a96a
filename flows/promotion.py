"""Promotion with approval: the comparison first, then a person decides on the run's page."""

from typing import TYPE_CHECKING, Annotated, Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from pydantic import Field

from flows.forms import ModelName, Version
from flows.last_words import end_with_worker
from flows.scheduling import DAY, RETRIES, nothing_to_do, tell_failure

if TYPE_CHECKING:
    from tasks.registry import Decision

# How long a person may take to answer, by default and at most.
DECIDE_WITHIN, DECIDE_WITHIN_AT_MOST = DAY, 30 * DAY


class Approval(RunInput):
    """What a person answers."""

    approve: bool = Field(False, description="Whether to go on.")
    force_reason: str = Field(
        "", description="Why it is to be champion though the comparison says no; it is kept."
    )


@flow(
    name="promote",
    flow_run_name="promote · {name} version {version}",
    timeout_seconds=DECIDE_WITHIN_AT_MOST + DAY,
    on_failure=[tell_failure],
    on_crashed=[tell_failure],
)
def promote_with_approval(
    name: ModelName,
    version: Version,
    decide_within_seconds: Annotated[int, Field(ge=1, le=DECIDE_WITHIN_AT_MOST)] = DECIDE_WITHIN,
) -> dict[str, Any] | State[None]:
    """Compare a version with the champion, wait for a person, and move the alias if they say so.

    A version that the comparison refuses is promoted only with a reason.

    Args:
        name: The registered model.
        version: Number of the version.
        decide_within_seconds: How long to wait for an answer; then the run fails.
    """
    end_with_worker()
    summary = compare_with_champion(name, version)
    if summary is None:
        return nothing_to_do(f"{name} version {version} is champion already")
    create_markdown_artifact(key="promotion", markdown=summary)
    answer = pause_flow_run(
        wait_for_input=Approval.with_initial_data(description=summary, approve=False),
        timeout=decide_within_seconds,
        poll_interval=5,
    )
    if not answer.approve:
        return nothing_to_do("a person declined")
    decision = decide(name, version, answer.force_reason.strip() or None)
    get_run_logger().info("%s", decision.sentence())
    # A table: a person's reason is text that Prefect's Markdown would let become a link.
    rows = [{"decision": decision.sentence()}]
    create_table_artifact(key="decision", table=rows, description="What was decided")
    return decision.as_json()


@task(name="compare", cache_policy=NO_CACHE, **RETRIES)
def compare_with_champion(name: str, version: int) -> str | None:
    """The comparison in words; None for one that is champion already."""
    from tasks.registry import champion_of, compare, find_version, open_registry

    client = open_registry()
    candidate = find_version(client, f"models:/{name}/{version}")
    champion = champion_of(client, name)
    if champion is not None and int(champion.version) == version:
        return None
    against, compared = compare(candidate, champion)
    verdict = "It may be promoted." if compared.is_better else "Only by force, with a reason."
    return f"{name} {compared.sentence(f'version {version}', against)}. {verdict}"


@task(name="decide", cache_policy=NO_CACHE, **RETRIES)
def decide(name: str, version: int, force_reason: str | None) -> "Decision":
    """Move the alias, or refuse."""
    from tasks.registry import open_registry, promote

    return promote(open_registry(), name, str(version), force_reason=force_reason)
