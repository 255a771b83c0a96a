"""What a person sees on Prefect's pages: plan, rejects, results, the leverage figure, links."""

import base64
import math
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.cache_policies import NO_CACHE

from tell_core.analysis.summary import verdict_sentence
from tell_core.pipeline import CORPUS_PAGE, Stage
from tell_core.plan import Plan, plan_rows
from tell_core.results import SCORES_SQL, query, source_rows
from tell_core.store import read_json


@task(name="show plan", task_run_name="show plan", cache_policy=NO_CACHE)
def show_plan(plan: Plan) -> None:
    """Cells with their exact tokens and steps, before anything is trained."""
    create_table_artifact(key="plan", table=plan_rows(plan), description="Cells, tokens and steps")


@task(name="show curation", task_run_name="show curation", cache_policy=NO_CACHE)
def show_curation(curated: Stage) -> None:
    """What was read, kept and set aside, by source and reason, and where to look at it."""
    rows = source_rows(curated.path)
    create_table_artifact(key="curation", table=rows, description="Sources and rejects")
    page = (curated.path / CORPUS_PAGE).absolute()
    create_link_artifact(key="corpus", link=page.as_uri(), link_text=f"The corpus: {page}")


@task(name="show results", task_run_name="show results", cache_policy=NO_CACHE)
def show_results(root: Path, model_uri: str | None, tracking_url: str | None) -> None:
    """The answer, the figure, the scores, and where to go on."""
    leverage = read_json(root / "leverage.json")
    answer = "\n\n".join(verdict_sentence(leverage))
    lines = [f"# {root.name}", answer, f"Report: `{root.absolute() / 'report.html'}`"]
    if model_uri:
        lines.append(f"Registered as challenger: {_model_link(model_uri, tracking_url)}")
    if tracking_url:
        lines.append(f"[The run in MLflow]({tracking_url})")
    create_markdown_artifact(key="answer", markdown="\n\n".join(lines))
    columns, rows = query(root, SCORES_SQL)
    create_table_artifact(
        key="scores",
        table=[dict(zip(columns, map(_finite, row), strict=True)) for row in rows],
        description="Mean score over seeds",
    )
    figure = root / "figures" / "learning_curves.png"
    if figure.is_file():
        content = base64.b64encode(figure.read_bytes()).decode()
        create_image_artifact(
            key="leverage", image_url=f"data:image/png;base64,{content}", description=answer
        )


def _model_link(model_uri: str, tracking_url: str | None) -> str:
    """The version, with a link to its page where the store has pages."""
    if tracking_url is None:
        return f"`{model_uri}`"
    name, version = model_uri.removeprefix("models:/").rsplit("/", 1)
    pages = tracking_url.partition("#")[0]
    return f"[{model_uri}]({pages}#/models/{name}/versions/{version})"


def _finite(value: Any) -> Any:
    """Prefect stores Infinity as invalid JSON and then shows no table at all."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
