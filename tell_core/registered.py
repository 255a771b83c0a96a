"""A registered version on disk: what is put into it, and how it is asked and tested again.

A version holds the trained weights, the anchor prompt, the report card, the specification, the
items it was tested on and what it did on each. It does not hold the base model.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tell_core.analysis.resampling import Resampling
from tell_core.data.anchors import Anchor, apply_anchor, random_anchor
from tell_core.data.corpus import Corpus, example_from_row, parse_extra
from tell_core.data.encoding import EncodedExamples, from_lists
from tell_core.data.reading import read_source
from tell_core.data.rendering import ChatRenderer, Example
from tell_core.data.sources import ResolvedSource
from tell_core.data.workspace import fetch_one, open_workspace, stream_batches
from tell_core.errors import InputError, ModelError, StoreError
from tell_core.evaluation.base import PREDICTIONS_FILE, Metric
from tell_core.evaluation.measuring import Progress
from tell_core.evaluation.metrics import build_metrics, metric_identity
from tell_core.evaluation.scoring import evaluate_cell
from tell_core.pipeline import CellOutcome, Stage
from tell_core.promotion import Rows
from tell_core.report_card import card_markdown
from tell_core.results import write_parquet
from tell_core.spec.arms import parse_arm
from tell_core.spec.identity import fingerprint
from tell_core.spec.loading import load_spec
from tell_core.spec.model import ExperimentSpec
from tell_core.store import read_json, write_json, write_text
from tell_core.training.models import full_model, load_tokenizer, model_digest, resolve_model

VERSION_DIRECTORY = "version"
VERSION_FORMAT = "2"
"""Raised by hand when what a version holds changes: older ones are then registered anew."""
CARD_FILE = "report_card.json"
CARD_PAGE = "report_card.md"
ANCHOR_FILE = "anchor.json"
SPEC_FILE = "spec.resolved.yaml"
SERVING_FILE = "serving.json"
ITEMS_FILE = "test_items.parquet"
RESULTS_FILE = "results.jsonl"
BASE_RESULTS_FILE = "base_results.jsonl"
_ITEM_COLUMNS = ("system", "history", "prompt", "response", "extra")
_SCHEMA = pa.schema([(name, pa.string()) for name in _ITEM_COLUMNS])
_BATCH_ROWS = 4096
# Items are compared one by one; the others change neither a trained model's answers nor the way
# they are scored.
_NOT_SCORING = {"max_items", "num_shots", "batch_size", "backend", "harness"}


@dataclass(frozen=True)
class RegisteredVersion:
    """The files of a version, fetched from the registry.

    Attributes:
        name: For people, e.g. ``demo-veil version 3``.
        version: Directory with the files of `write_version`.
        trained: Directory of the train stage.
    """

    name: str
    version: Path
    trained: Path

    @classmethod
    def at(cls, name: str, artifacts: Path) -> "RegisteredVersion":
        """The version whose artifacts lie in a directory.

        Raises:
            InputError: It was not registered by this project, or by an older release of it.
        """
        version = artifacts / VERSION_DIRECTORY
        trained = [path for path in artifacts.glob("train-*") if path.is_dir()]
        if not (version / CARD_FILE).is_file() or len(trained) != 1:
            raise InputError(
                f"{name} does not hold what is needed (its report card, test items and weights):"
                " it was registered by something else or by an older release. Run its experiment"
                " again, which registers it anew"
            )
        return cls(name, version, trained[0])

    @property
    def card(self) -> dict[str, Any]:
        """Its report card."""
        return dict(read_json(self.version / CARD_FILE))

    @property
    def anchor(self) -> Anchor:
        """Its anchor prompt."""
        return Anchor.load(self.version / ANCHOR_FILE)

    @property
    def items(self) -> Path:
        """Parquet file of the items it was tested on."""
        return self.version / ITEMS_FILE

    def spec(self, settings: Sequence[str] = ()) -> ExperimentSpec:
        """The experiment it comes from, with changes as ``name=value``."""
        return load_spec(self.version / SPEC_FILE, settings)

    def scoring(self) -> dict[str, Any]:
        """How its kept results were measured: what may change an answer or its score.

        Returns:
            Plain JSON. ``sources`` has the sha256 of the source file of each metric of the user's
            own; None where an older release kept none.
        """
        evaluation = self.spec().evaluation
        kept = self.card["reproduce"].get("metric_sources", {})
        own = [metric.name for metric in evaluation.metrics if ":" in metric.name]
        fields = evaluation.model_dump(mode="json", exclude=_NOT_SCORING)
        return {"evaluation": fields, "sources": {name: kept.get(name) for name in own}}

    def results(self) -> Rows:
        """What it did on each item."""
        return _read_lines(self.version / RESULTS_FILE)

    def base_results(self) -> Rows | None:
        """What the base model did on the same items, or None when that was not measured."""
        path = self.version / BASE_RESULTS_FILE
        return _read_lines(path) if path.exists() else None


def write_version(
    root: Path,
    curated: Stage,
    outcomes: Sequence[CellOutcome],
    chosen: CellOutcome,
    card: Mapping[str, Any],
    serving: Mapping[str, Any],
) -> Path:
    """Write what a version holds beside its weights; returns the directory.

    Args:
        root: The run directory.
        curated: Its data.
        outcomes: All finished cells; arm `base` among them gives the base model's results.
        chosen: The cell to be registered.
        card: Its report card.
        serving: What its answers depend on beside weights and anchor prompt.
    """
    out = root / VERSION_DIRECTORY
    write_json(out / CARD_FILE, dict(card))
    write_text(out / CARD_PAGE, card_markdown(card))
    write_json(out / SERVING_FILE, dict(serving))
    write_json(out / ANCHOR_FILE, read_json(curated.path / ANCHOR_FILE))
    write_text(out / SPEC_FILE, (root / SPEC_FILE).read_text(encoding="utf-8"))
    corpus = Corpus(curated.path / "task_test.parquet")
    tested = _read_lines(chosen.mixed.path / "items.jsonl")
    rows = np.asarray([_row_of(item["item_id"]) for item in tested], dtype=np.int64)
    items = corpus.records(rows, _ITEM_COLUMNS)
    write_parquet(pa.Table.from_pylist(items, schema=_SCHEMA), out / ITEMS_FILE)
    digests = [item_digest(item) for item in items]
    _write_results(chosen.evaluated.path, digests, out / RESULTS_FILE)
    (out / BASE_RESULTS_FILE).unlink(missing_ok=True)
    for outcome in outcomes:
        if outcome.cell.arm == "base":
            _write_results(outcome.evaluated.path, digests, out / BASE_RESULTS_FILE)
            break
    return out


def item_digest(item: Mapping[str, Any]) -> str:
    """Identity of a test item by what it asks and what it wants, wherever it stands."""
    return fingerprint(*(item[name] for name in ("system", "history", "prompt", "response")))


def read_items(source: ResolvedSource, anchor: Anchor, out: Path) -> int:
    """Read fresh test items of the shape of an experiment's test source; returns their number.

    Rows that cannot be read are left out, as in curation; the task's constant beginning is taken
    off prompts that have it.

    Args:
        source: Where they lie.
        anchor: Of the version that is to be tested.
        out: Parquet file to write.

    Raises:
        DataError: A file cannot be read, or no row is usable.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with open_workspace(out.parent) as connection:
        read_source(connection, source, 0)
        num_items = int(fetch_one(connection, "select count(*) from examples"))
        query = f"select {', '.join(_ITEM_COLUMNS)} from examples order by id"
        items = [row for rows in stream_batches(connection, query, _BATCH_ROWS) for row in rows]
    prompts = bare_prompts([item["prompt"] for item in items], anchor)
    bare = [item | {"prompt": prompt} for item, prompt in zip(items, prompts, strict=True)]
    write_parquet(pa.Table.from_pylist(bare, schema=_SCHEMA), out)
    return num_items


def bare_prompts(prompts: Sequence[str], anchor: Anchor) -> list[str]:
    """Prompts without the task's constant beginning, where all of them have it.

    The model adds its anchor prompt by itself: raw task files already hold it, and it would stand
    there twice.
    """
    prefix = anchor.own_instruction
    has_prefix = bool(prefix) and all(prompt.startswith(prefix) for prompt in prompts)
    return [prompt[len(prefix) :] for prompt in prompts] if has_prefix else list(prompts)


def evaluate_version(
    version: RegisteredVersion,
    items: Path,
    out: Path,
    *,
    evaluate_as: RegisteredVersion | None = None,
    base_only: bool = False,
    on_progress: Progress | None = None,
) -> Rows:
    """Test a version on items; returns and keeps in ``out`` what it did on each.

    Args:
        version: The version.
        items: Parquet file with the columns of a version's test items.
        out: Directory to write into.
        evaluate_as: Version whose metrics, parsing and decoding are used; its own by default.
        base_only: Test the base model without what was trained.
        on_progress: As of `scoring.evaluate_cell`.

    Raises:
        DataError: An item does not fit into the model's context.
        ModelError: The base model cannot be found, or is not the one that was trained on.
        EvaluationError: The weights give no finite log-probability.
    """
    spec = version.spec()
    serving = read_json(version.version / SERVING_FILE)
    evaluation = (evaluate_as or version).spec().evaluation.model_copy(update={"harness": ()})
    rows = pq.read_table(items).to_pylist()
    if base_only or not full_model(version.trained):
        _require_base(version, serving)
    looks = _Looks.of(version, serving, "base" if base_only else serving["arm"])
    _write_inputs(rows, looks, out / "inputs")
    evaluate_cell(
        model_path=serving["base_model"],
        revision=serving["base_revision"],
        inputs=out / "inputs",
        trained=None if base_only else version.trained,
        evaluation=evaluation,
        out=out,
        dtype=serving["dtype"],
        device=spec.training.device,
        threads=spec.training.threads,
        on_progress=on_progress,
    )
    digests = [item_digest(row) for row in rows]
    _write_results(out, digests, out / RESULTS_FILE)
    return _read_lines(out / RESULTS_FILE)


def measured_alike(version: RegisteredVersion, other: RegisteredVersion) -> bool:
    """Whether the kept results of both were measured in one way, so that they can be compared."""
    scoring = version.scoring()
    return None not in scoring["sources"].values() and scoring == other.scoring()


def measured_as_today(version: RegisteredVersion) -> bool:
    """Whether the metrics of the user's own that scored it are what they are today.

    Raises:
        InputError: A metric's module is not there.
    """
    evaluation = version.spec().evaluation.model_copy(update={"harness": ()})
    today: dict[str, str] = metric_identity(evaluation).get("metrics", {})
    return bool(version.scoring()["sources"] == today)


def primary_metric(version: RegisteredVersion) -> Metric:
    """The metric on which a version is judged.

    Raises:
        InputError: It is not one on test items.
    """
    spec = version.spec()
    name = spec.analysis.primary_metric
    metric = next(metric for metric in build_metrics(spec.evaluation) if metric.name == name)
    if metric.items != "test":
        raise InputError(
            f"{version.name} is judged by {name}, which is not measured on test items: nothing can"
            " be compared. Set `analysis.primary_metric` to one of its test metrics"
        )
    return metric


def resampling_of(version: RegisteredVersion) -> Resampling:
    """How intervals are made, as the version's experiment says."""
    return Resampling.of(version.spec().analysis)


@dataclass(frozen=True)
class _Looks:
    """How bare test items look to a version."""

    renderer: ChatRenderer
    anchor: Anchor
    arm: str
    random_text: str

    @classmethod
    def of(cls, version: RegisteredVersion, serving: Mapping[str, Any], arm: str) -> "_Looks":
        full = full_model(version.trained)  # complete in itself, wherever its base is by now
        tokenizer = (
            load_tokenizer(str(full))
            if full
            else load_tokenizer(serving["base_model"], serving["base_revision"])
        )
        anchor = version.anchor
        num_tokens = anchor.num_tokens if parse_arm(arm).task_anchor == "random" else 0
        text = random_anchor(tokenizer, num_tokens, serving["anchor_seed"])
        return cls(ChatRenderer(tokenizer, serving["chat_template"]), anchor, arm, text)

    def encoded(self, rows: Sequence[Mapping[str, Any]]) -> EncodedExamples:
        shown = [self._shown(example_from_row(dict(row))) for row in rows]
        return from_lists(self.renderer.encode(shown), is_task=True)

    def _shown(self, example: Example) -> Example:
        kind = parse_arm(self.arm).task_anchor
        system, prompt = apply_anchor(
            kind, self.anchor, example.prompt, example.system, self.random_text
        )
        return example._replace(system=system, prompt=prompt)


def _require_base(version: RegisteredVersion, serving: Mapping[str, Any]) -> None:
    """Scores on another base model would be those of another model.

    Raises:
        ModelError: It is missing, or another.
    """
    base = resolve_model(serving["base_model"], serving["base_revision"])
    wanted, found = version.card["base_digest"], model_digest(base)
    if found != wanted:
        raise ModelError(
            f"the base model in {base} has digest {found[:12]}, but {version.name} was trained on"
            f" {wanted[:12]}: put the right one there"
        )


def _write_inputs(rows: Sequence[Mapping[str, Any]], looks: _Looks, out: Path) -> None:
    """The files that an evaluation reads, without any probe item."""
    out.mkdir(parents=True, exist_ok=True)
    encoded = looks.encoded(rows)
    encoded.save(out / "test.safetensors")
    encoded.select([]).save(out / "probe.safetensors")
    lines = [
        {
            "item_id": f"test-{index:05d}",
            "role": "task",
            "prompt_digest": item_digest(row),
            "prompt": row["prompt"],
            "reference": row["response"],
            "extra": parse_extra(row["extra"] or "{}"),
        }
        for index, row in enumerate(rows)
    ]
    write_text(out / "items.jsonl", _lines(lines))
    write_text(out / "probe_items.jsonl", "")


def _write_results(evaluated: Path, digests: Sequence[str], out: Path) -> None:
    """Per item its digest, statistics and scores: all that a comparison needs."""
    rows = _read_lines(evaluated / PREDICTIONS_FILE)
    kept = [
        {"item": digest, "stats": row["stats"], "scores": row["scores"]}
        for digest, row in zip(digests, rows, strict=True)
    ]
    write_text(out, _lines(kept))


def _row_of(item_id: str) -> int:
    """Row of an item in the curated test set, which its id ends with."""
    return int(item_id.rpartition("-")[2])


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return list(_parsed(path))
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {path}: {error}") from error


def _parsed(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
