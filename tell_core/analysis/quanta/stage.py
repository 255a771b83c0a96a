"""Quanta discovery as a stage: of a cell of a finished run, or of a model and files of examples.

The stage directory holds ``summary.json``, ``clusters.json``, ``tokens.parquet`` and
``gradients.safetensors``; it counts only when whole. A link to what was found last is kept in
``quanta/<name>.json`` of the run directory, with the page beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from tell_core.analysis.cells import AnalysedCell
from tell_core.analysis.quanta.browser import Items, cluster_records
from tell_core.analysis.quanta.discovery import Discovery, DiscoverySettings, Progress, discover
from tell_core.analysis.quanta.gradients import project_gradients
from tell_core.analysis.quanta.loading import load_subject, read_examples
from tell_core.analysis.quanta.projection import build_projection
from tell_core.analysis.traces import CellTrace, read_trace
from tell_core.data.encoding import EncodedExamples, concatenate
from tell_core.data.token_store import open_mixture
from tell_core.errors import InputError
from tell_core.evaluation.items import ItemSet
from tell_core.results import read_run
from tell_core.spec.identity import fingerprint
from tell_core.spec.loading import load_spec
from tell_core.spec.model import ExperimentSpec
from tell_core.store import find_stage, read_json, write_json, write_stage
from tell_core.training.devices import resolve_device
from tell_core.training.models import model_digest, resolve_model

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

DIRECTORY = "quanta"
_VERSION = 2
# General examples whose gradients are compared with the clusters'.
NUM_PUSHING = 256
_TOKEN_COLUMNS = ("item_id", "role", "position", "token_id", "token", "loss", "cluster")


@dataclass(frozen=True)
class Subject:
    """What is looked at: a cell of a finished run, or a model on files of examples.

    Attributes:
        root: Directory of the run, or where the quanta of a model go.
        name: Name of the cell or model.
        model: Directory or hub id of the model; None for a cell.
        files: Files of examples; none for a cell, which has items of its own.
    """

    root: Path
    name: str
    model: str | None = None
    files: tuple[str, ...] = ()

    @classmethod
    def choose(cls, source: str, *, cell: str | None, files: Sequence[str], out: Path) -> Subject:
        """What a person means by ``source``, checked before anything is computed.

        Args:
            source: Directory of a finished run, or a model's directory or hub id.
            cell: Cell of a run; by default `tell` at its largest budgets.
            files: Files of examples; needed for a model, and only there.
            out: Where the quanta of a model go.

        Raises:
            InputError: A model without examples, a run with some, or no such cell.
        """
        root = Path(source)
        is_run = (root / "manifest.json").exists()
        if is_run and files:
            raise InputError(f"{source} is a run: its own items are looked at, leave out --data")
        if is_run:
            name = cell or default_cell(root)
            _require_cell(root, read_run(root)["cells"], name)
            return cls(root, name)
        if not files:
            raise InputError(
                f"{source} is no finished run; for a model give examples with --data FILE"
            )
        if cell is not None:
            raise InputError(f"{source} is a model and has no cells; leave out --cell {cell}")
        return cls(out, root.name, source, tuple(files))


@dataclass(frozen=True)
class Found:
    """A finished discovery.

    Attributes:
        name: Name of the cell or model.
        path: Directory of the stage.
        reused: Whether it was already there.
    """

    name: str
    path: Path
    reused: bool

    @property
    def summary(self) -> dict[str, Any]:
        """What was found, without tokens."""
        summary: dict[str, Any] = read_json(self.path / "summary.json")
        return summary


@dataclass(frozen=True)
class _Material:
    """What is written out beside a discovery."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    items: Items
    traces: dict[str, CellTrace]
    general: EncodedExamples | None


def default_cell(root: Path) -> str:
    """The `tell` cell with the largest budgets and the first seed.

    Raises:
        InputError: The run has none.
    """
    cells: dict[str, Any] = read_run(root)["cells"]
    found = [name for name, cell in cells.items() if cell["arm"] == "tell" and cell["train"]]
    if not found:
        raise InputError(f"{root} has no cell of arm `tell`; choose one of {', '.join(cells)}")
    return max(
        found,
        key=lambda name: (
            cells[name]["task_budget_tokens"] or 0,
            cells[name]["general_budget_tokens"] or 0,
            -cells[name]["seed"],
        ),
    )


def _require_cell(root: Path, cells: Mapping[str, Any], name: str) -> None:
    if name not in cells:
        raise InputError(f"{root} has no cell {name!r}; there are {', '.join(cells)}")


def quanta_of_cell(
    root: Path,
    name: str,
    settings: DiscoverySettings,
    on_progress: Progress | None = None,
) -> Found:
    """Look at what a cell of a finished run has learned, or find that this was done.

    Tokens are chosen among the responses of dev, held-out general, retention and test items.

    Args:
        root: The run directory.
        name: Name of the cell.
        settings: How.
        on_progress: Called with phase, done and total.

    Raises:
        InputError: There is no finished run, or no such cell.
        DataError: Too few tokens qualify.
    """
    cells = read_run(root)["cells"]
    _require_cell(root, cells, name)
    spec = load_spec(root / "spec.resolved.yaml")
    compared = {arm: cell for arm, cell in _compared(cells, name).items() if cells[cell]["train"]}
    stages = [
        cells[name]["mix"],
        cells[name]["train"],
        *(cells[c]["train"] for c in compared.values()),
    ]
    identity = fingerprint("quanta", _VERSION, stages, asdict(settings))

    def material() -> _Material:
        trained = root / "stages" / cells[name]["train"] if cells[name]["train"] else None
        model, tokenizer = load_subject(
            spec.model.id, revision=spec.model.revision, trained=trained, device=_device(spec)
        )
        mixed = root / "stages" / cells[name]["mix"]
        traces = {
            arm: read_trace(_analysed(root, cell, cells[cell])) for arm, cell in compared.items()
        }
        return _Material(
            model,
            tokenizer,
            items_of(mixed),
            {arm: trace for arm, trace in traces.items() if trace is not None},
            _general_of(mixed) if trained else None,
        )

    return _stage(root, name, identity, settings, material, on_progress)


def quanta_of_model(
    model_id: str,
    files: Sequence[str],
    root: Path,
    settings: DiscoverySettings,
    *,
    max_tokens: int,
    max_examples: int,
    on_progress: Progress | None = None,
) -> Found:
    """Look at a model on the responses of prompt-response pairs, or find that this was done.

    Args:
        model_id: Directory or hub id.
        files: Files of examples, in any format that a specification takes.
        root: Directory to write to.
        settings: How.
        max_tokens: Longer examples are passed over.
        max_examples: Most examples to choose tokens from.
        on_progress: Called with phase, done and total.

    Raises:
        ModelError: The model cannot be loaded.
        DataError: The files cannot be read, or too few tokens qualify.
    """
    directory = resolve_model(model_id)
    model, tokenizer = load_subject(model_id)
    examples = read_examples(
        files, tokenizer, max_tokens=max_tokens, limit=max_examples, seed=settings.seed
    )
    tokens = fingerprint("tokens", examples.tokens.tolist(), examples.response_starts.tolist())
    identity = fingerprint("quanta", _VERSION, model_digest(directory), tokens, asdict(settings))
    names = [f"example-{row}" for row in range(len(examples))]
    items = Items(examples, names, ["general"] * len(examples), [""] * len(examples))
    return _stage(
        root,
        directory.name,
        identity,
        settings,
        lambda: _Material(model, tokenizer, items, {}, None),
        on_progress,
    )


def items_of(mixed: Path) -> Items:
    """Probe and test items of a mix stage."""
    sets = [
        ItemSet.load(mixed / "probe_items.jsonl", mixed / "probe.safetensors"),
        ItemSet.load(mixed / "items.jsonl", mixed / "test.safetensors"),
    ]
    rows = [row for part in sets for row in part.rows]
    return Items(
        examples=concatenate([part.examples for part in sets]),
        ids=[str(row["item_id"]) for row in rows],
        roles=[str(row["role"]) for row in rows],
        skills=[_skills(row.get("extra") or {}) for row in rows],
    )


def _skills(extra: dict[str, Any]) -> str:
    skills = extra.get("skills")
    return " then ".join(map(str, skills)) if isinstance(skills, list) else ""


def _compared(cells: dict[str, Any], name: str) -> dict[str, str]:
    """Arm -> cell whose losses are shown: the cell itself, and SFT at the same budget and seed."""
    shown = cells[name]
    found = {shown["arm"]: name}
    for other, cell in cells.items():
        is_same = all(cell[field] == shown[field] for field in ("task_budget_tokens", "seed"))
        if is_same and cell["arm"] in ("sft", "sft_matched") and cell["arm"] not in found:
            found[cell["arm"]] = other
    return found


def _analysed(root: Path, name: str, cell: dict[str, Any]) -> AnalysedCell:
    stages = root / "stages"
    paths = {
        part: stages / cell[part] if cell[part] else None for part in ("mix", "train", "evaluate")
    }
    return AnalysedCell.from_record({"cell": name, **cell, **paths})


def _general_of(mixed: Path) -> EncodedExamples:
    """The first general examples of a cell's mixture; which come first is drawn by its seed."""
    examples = open_mixture(mixed).examples
    return examples.select(np.flatnonzero(~examples.is_task)[:NUM_PUSHING])


def _device(spec: ExperimentSpec) -> Any:
    return resolve_device(spec.training.device)


def _stage(
    root: Path,
    name: str,
    identity: str,
    settings: DiscoverySettings,
    material: Callable[[], _Material],
    on_progress: Progress | None,
) -> Found:
    path = find_stage(root, "quanta", identity)
    if path is None:
        with write_stage(root, "quanta", identity) as out:
            _write(out, name, settings, material(), on_progress)
    found = Found(name, root / "stages" / f"quanta-{identity}", reused=path is not None)
    (root / DIRECTORY).mkdir(exist_ok=True)
    write_json(
        root / DIRECTORY / f"{name}.json",
        {"stage": found.path.name, "verdict": found.summary["verdict"]},
    )
    return found


def _write(
    out: Path,
    name: str,
    settings: DiscoverySettings,
    given: _Material,
    on_progress: Progress | None,
) -> None:
    device = next(given.model.parameters()).device
    found = discover(
        given.model, given.items.examples, settings, device=device, on_progress=on_progress
    )
    pushing = None
    if given.general is not None and len(given.general):
        projection = build_projection(settings.projection, settings.num_dimensions, settings.seed)
        pushing = project_gradients(given.model, given.general, projection, device=device).vectors
    general = given.general if pushing is not None else given.items.examples
    assert general is not None
    clusters = cluster_records(found, given.items, given.tokenizer, given.traces, general, pushing)
    write_json(out / "summary.json", {"name": name} | found.summary())
    write_json(out / "clusters.json", clusters)
    pq.write_table(_token_table(found, given), out / "tokens.parquet", compression="zstd")
    save_file({"vectors": found.gradients.vectors}, out / "gradients.safetensors")


def _token_table(found: Discovery, given: _Material) -> pa.Table:
    """A row per token: where it stands, what it is, its loss and its cluster."""
    items, tokens = given.items, found.tokens
    rows = tokens.examples.tolist()
    ids = items.examples.tokens[items.examples.offsets[tokens.examples] + tokens.positions]
    columns = (
        [items.ids[row] for row in rows],
        [items.roles[row] for row in rows],
        (tokens.positions - items.examples.response_starts[tokens.examples]).tolist(),
        ids.tolist(),
        [str(given.tokenizer.decode([token])) for token in ids.tolist()],
        tokens.losses.tolist(),
        found.clustering.labels.tolist(),
    )
    return pa.table(dict(zip(_TOKEN_COLUMNS, columns, strict=True)))
