"""The best cell of an experiment becomes a version of its model in MLflow's registry."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pyarrow.parquet as pq
from mlflow.tracking import MlflowClient

from tell_core.pipeline import CellOutcome, Stage, renderer_of
from tell_core.registered import (
    CARD_PAGE,
    ITEMS_FILE,
    VERSION_DIRECTORY,
    VERSION_FORMAT,
    write_version,
)
from tell_core.report_card import report_card
from tell_core.results import git_commit
from tell_core.spec.model import ExperimentSpec
from tell_core.store import read_json

_MAX_DESCRIPTION = 4900  # MLflow's file and SQL stores take 5000 characters
_NUM_EXAMPLES = 2
_ABOUT = (
    "Each version: trained weights, anchor prompt and report card; not the base model, which is"
    " checked by its digest. `challenger` is the last one registered; `champion` moves by"
    " `tell promote` alone, when the paired lower bound on the same test items is above 0, or by"
    " force with a reason."
)
_SERVED_MODEL = Path(__file__).with_name("served_model.py")
_LIBRARY = Path(__file__).parent.parent / "tell_core"
# What `tell_core` needs to load and ask a model.
_SERVED_WITH = (
    *("jinja2", "numpy", "pandas", "peft", "psutil", "pydantic", "pyyaml", "safetensors"),
    *("scipy", "torch", "transformers"),
)


def register_best(
    client: MlflowClient,
    spec: ExperimentSpec,
    root: Path,
    record: Mapping[str, Any],
    curated: Stage,
    outcomes: Sequence[CellOutcome],
) -> str | None:
    """Register the cell with the lowest dev loss, unless it is registered already."""
    trained = [outcome for outcome in outcomes if outcome.trained and _uses_task(outcome)]
    if not trained:
        return None
    best = min(trained, key=_dev_loss)
    assert best.trained is not None
    name = f"{spec.name}-{spec.task.name}"
    identity = best.trained.fingerprint
    for known in _versions(client, name):
        if _is_version_of(known.tags, identity):
            client.set_registered_model_alias(name, "challenger", known.version)
            return f"models:/{name}/{known.version}"
    info = _log_model(spec, root, record["parent"], curated, outcomes, best)
    registered = mlflow.register_model(info.model_uri, name, tags=_version_tags(spec, root, best))
    describe_version(client, name, str(registered.version), root / VERSION_DIRECTORY)
    client.set_registered_model_alias(name, "challenger", registered.version)
    return f"models:/{name}/{registered.version}"


def describe_version(client: MlflowClient, name: str, version: str, directory: Path) -> None:
    """Show the report card on the version's page, and on the model's what its versions are."""
    card = (directory / CARD_PAGE).read_text(encoding="utf-8")
    if len(card) > _MAX_DESCRIPTION:
        whole_lines = card[:_MAX_DESCRIPTION].rpartition("\n")[0]
        card = f"{whole_lines}\n\nThe rest stands in the artifact {VERSION_DIRECTORY}/{CARD_PAGE}."
    client.update_model_version(name, version, description=card)
    client.update_registered_model(name, description=_ABOUT)


def _is_version_of(tags: Mapping[str, str], identity: str) -> bool:
    is_same = tags.get("tell.train_fingerprint") == identity
    return is_same and tags.get("tell.version_format") == VERSION_FORMAT


def _version_tags(spec: ExperimentSpec, root: Path, best: CellOutcome) -> dict[str, str]:
    """What tells versions apart in a list."""
    assert best.trained is not None
    card_metric = spec.analysis.primary_metric
    score = read_json(best.evaluated.path / "scores.json")[card_metric]["score"]
    return {
        "tell.train_fingerprint": best.trained.fingerprint,
        "tell.version_format": VERSION_FORMAT,
        "tell.experiment": spec.name,
        "tell.cell": best.cell.name,
        "tell.arm": best.cell.arm,
        "tell.seed": str(best.cell.seed),
        "tell.task_budget_tokens": str(best.cell.task_budget_tokens),
        "tell.general_budget_tokens": str(best.cell.general_budget_tokens),
        "tell.dev_loss": f"{_dev_loss(best):.6f}",
        "tell.primary_metric": card_metric,
        "tell.score": f"{score:.6g}",
        "tell.git_commit": git_commit() or "unknown",
        "tell.report": str(root.absolute() / "report.html"),
    }


def _uses_task(outcome: CellOutcome) -> bool:
    return outcome.cell.task_budget_tokens is not None


def _dev_loss(outcome: CellOutcome) -> float:
    assert outcome.trained is not None
    return float(read_json(outcome.trained.path / "summary.json")["kept_dev_loss"])


def _versions(client: MlflowClient, name: str) -> Sequence[Any]:
    return list(client.search_model_versions(f"name = '{name}'"))


def _log_model(
    spec: ExperimentSpec,
    root: Path,
    parent: str,
    curated: Stage,
    outcomes: Sequence[CellOutcome],
    best: CellOutcome,
) -> Any:
    """Log weights and the files of the version; the input example is of the test set."""
    assert best.trained is not None
    card, serving = report_card(spec, root, curated, outcomes, best), _serving_config(spec, best)
    version = write_version(root, curated, outcomes, best, card, serving)
    with mlflow.start_run(run_id=parent):
        return mlflow.pyfunc.log_model(
            name="model",
            python_model=str(_SERVED_MODEL),
            artifacts={"trained": str(best.trained.path), VERSION_DIRECTORY: str(version)},
            code_paths=[str(_LIBRARY)],
            model_config=serving,
            pip_requirements=[f"{name}=={installed(name)}" for name in _SERVED_WITH],
            signature=_signature(),
            input_example=pd.DataFrame({"prompt": _example_prompts(version / ITEMS_FILE)}),
        )


def _example_prompts(items: Path) -> list[str]:
    """Bare prompts of the first test items."""
    table = pq.read_table(items, columns=["prompt"]).slice(0, _NUM_EXAMPLES)
    return list(table["prompt"].to_pylist())


def _serving_config(spec: ExperimentSpec, best: CellOutcome) -> dict[str, Any]:
    path = Path(spec.model.id)
    return {
        "base_model": str(path.absolute()) if path.is_dir() else spec.model.id,
        "base_revision": spec.model.revision,
        "dtype": spec.model.dtype,
        "arm": best.cell.arm,
        "anchor_seed": best.cell.seed,
        "max_new_tokens": spec.evaluation.max_new_tokens,
        "stop": list(spec.evaluation.stop),
        "batch_size": spec.evaluation.batch_size,
        "chat_template": renderer_of(spec).chat_template,
    }


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec("string", "prompt")]),
        outputs=Schema([ColSpec("string", "response")]),
    )
