"""The stages of an experiment, each with its fingerprint, as plain functions.

A stage looks for its finished directory first and works only when there is none, so calling
the same stage again costs a look at the files. The orchestrator wraps these functions; a
notebook or a benchmark calls them directly.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq

from tell_core.data.corpus import parse_extra
from tell_core.data.curation import curate, curation_inputs
from tell_core.data.mixtures import build_cell_inputs
from tell_core.data.rendering import ChatRenderer, load_chat_template
from tell_core.data.token_store import has_stores
from tell_core.errors import StoreError
from tell_core.evaluation.metrics import metric_identity
from tell_core.evaluation.scoring import check_references, evaluate_cell
from tell_core.spec.arms import parse_arm
from tell_core.spec.cells import Cell, tuning_cells
from tell_core.spec.identity import fingerprint
from tell_core.spec.model import Candidate, ExperimentSpec
from tell_core.store import find_stage, read_json, stage_path, write_json, write_stage
from tell_core.training.devices import resolve_device, resolve_precision
from tell_core.training.identity import training_fields
from tell_core.training.loop import train_cell
from tell_core.training.models import context_tokens, load_tokenizer, model_digest, resolve_model
from tell_core.training.trainer import DivergedError

CORPUS_PAGE = "corpus.html"
# Raised by hand when a change of code changes what a stage puts out.
STAGE_VERSIONS = {
    "curate": 5,
    "gradients": 1,
    "mix": 4,
    "train": 1,
    "evaluate": 2,
    "analyse": 1,
    "report": 1,
}
# Which items there are belongs to the mix stage; how many side by side, and where files lie,
# changes no answer.
_NOT_SCORING: Any = {
    "max_items": True,
    "num_shots": True,
    "batch_size": True,
    "harness": {"__all__": {"tasks_dir"}},
}
_REASON = "reason.json"
Progress = Callable[[str, int, int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """A finished stage.

    Attributes:
        name: Name of the stage.
        fingerprint: Identity of its inputs, 16 hexadecimal digits.
        root: The run directory.
        reused: Whether it was already there.
    """

    name: str
    fingerprint: str
    root: Path
    reused: bool

    @property
    def path(self) -> Path:
        """Directory of its outputs."""
        return stage_path(self.root, self.name, self.fingerprint)


@dataclass(frozen=True)
class CellOutcome:
    """What one cell left behind.

    Attributes:
        cell: The cell.
        mixed: Its data.
        trained: Its training, or None for an arm without one.
        evaluated: Its scores.
        settings: What it was trained with, or None for an arm without training.
    """

    cell: Cell
    mixed: Stage
    trained: Stage | None
    evaluated: Stage
    settings: Candidate | None

    def record(self) -> dict[str, Any]:
        """What the analysis needs of the cell."""
        return {
            "cell": self.cell.name,
            "arm": self.cell.arm,
            "task_budget_tokens": self.cell.task_budget_tokens,
            "general_budget_tokens": self.cell.general_budget_tokens,
            "seed": self.cell.seed,
            "ledger": read_json(self.mixed.path / "ledger.json"),
            "evaluate": self.evaluated.path,
            "train": self.trained.path if self.trained else None,
            "mix": self.mixed.path,
        }


def curate_stage(spec: ExperimentSpec, root: Path, on_progress: Progress | None = None) -> Stage:
    """Read, clean and count every source; resolve the anchor prompt."""
    renderer = renderer_of(spec)
    identity = _fingerprint(
        "curate",
        curation_inputs(spec),
        spec.curation.model_dump(exclude={"max_memory_gb"}),
        spec.anchor,
        spec.task.dev_examples,
        renderer.digest,
    )

    def work(out: Path) -> None:
        from tell_core.report.corpus_page import write_corpus_page  # draws, so it loads much

        curate(spec, renderer.tokenizer, out, on_progress)
        write_corpus_page(out, out / CORPUS_PAGE, identity)

    return _stage(root, "curate", identity, work)


def check_references_of(spec: ExperimentSpec, curated: Stage) -> None:
    """Know before anything is trained that every metric can be computed on the test items.

    Raises:
        InputError: A reference has no answer, or is none of the metric's labels.
    """
    columns = pq.read_table(
        curated.path / "task_test.parquet",
        columns=["example_id", "prompt", "response", "extra"],
    ).to_pylist()
    rows = [
        {
            "item_id": row["example_id"],
            "prompt": row["prompt"],
            "reference": row["response"],
            "extra": parse_extra(row["extra"]),
        }
        for row in columns
    ]
    check_references(rows, spec.evaluation)


def gradients_stage(
    spec: ExperimentSpec, curated: Stage, on_progress: Progress | None = None
) -> Stage:
    """Project the gradients of task and general examples on the base model, once for all cells."""
    model = spec.model
    identity = _fingerprint("gradients", curated.fingerprint, base_digest(model.id, model.revision))

    def work(out: Path) -> None:
        from tell_core.alignment import write_gradients  # few experiments need it

        write_gradients(
            model.id,
            curated.path,
            renderer_of(spec),
            out,
            revision=model.revision,
            device=spec.training.device,
            on_progress=on_progress,
        )

    return _stage(curated.root, "gradients", identity, work)


def gradients_for(spec: ExperimentSpec, cell: Cell, curated: Stage) -> Stage | None:
    """The gradients that a cell selects its general data by, or None when it needs none."""
    is_aligned = parse_arm(cell.arm).selection == "alignment"
    return gradients_stage(spec, curated) if is_aligned else None


def mix_stage(spec: ExperimentSpec, cell: Cell, curated: Stage) -> Stage:
    """Draw a cell's budgets and lay out its mixture, test items and probe set."""
    evaluation = spec.evaluation
    selected = gradients_for(spec, cell, curated)
    identity = _fingerprint(
        "mix",
        curated.fingerprint,
        [cell.arm, cell.task_budget_tokens, cell.general_budget_tokens, cell.seed],
        [spec.training.num_epochs, spec.training.min_steps, spec.training.batch_size],
        evaluation.max_items,
        evaluation.num_shots if parse_arm(cell.arm).has_shots else None,
        {source.name: source.weight for source in spec.general},
        [spec.budgets.unit, spec.budgets.stratify_by],
        *([selected.fingerprint] if selected else []),
    )
    return _stage(
        curated.root,
        "mix",
        identity,
        lambda out: build_cell_inputs(
            spec,
            cell,
            curated.path,
            renderer_of(spec),
            out,
            context_tokens=context_of(spec),
            gradients=selected.path if selected else None,
        ),
        is_usable=has_stores,
    )


def train_fingerprint(spec: ExperimentSpec, mixed: Stage) -> str:
    """Identity of a training: its mixture, base model and everything that shapes the weights.

    Args:
        spec: The experiment, settled: one learning rate, one number of epochs.
        mixed: The cell's mixture.
    """
    return _fingerprint(
        "train",
        mixed.fingerprint,
        base_digest(spec.model.id, spec.model.revision),
        number_format(spec),
        training_fields(spec.training),
    )


def train_stage(
    spec: ExperimentSpec, cell: Cell, mixed: Stage, on_progress: Progress | None = None
) -> Stage:
    """Train one cell with settled settings; an interrupted training goes on from its checkpoint.

    Raises:
        DivergedError: The loss is not finite, here or where a bundle of it was run.
    """
    identity = train_fingerprint(spec, mixed)
    if reason := find_diverged(mixed.root, identity):
        raise DivergedError(reason)
    return _stage(
        mixed.root,
        "train",
        identity,
        lambda out: train_cell(
            model_path=spec.model.id,
            revision=spec.model.revision,
            inputs=mixed.path,
            training=spec.training,
            seed=cell.seed,
            out=out,
            dtype=spec.model.dtype,
            on_progress=per_step("training", on_progress),
        ),
        resume=True,
    )


def find_diverged(root: Path, identity: str) -> str | None:
    """Why a training that was run as a bundle diverged, or None when that is not known."""
    found = find_stage(root, "diverged", identity)
    return str(read_json(found / _REASON)["reason"]) if found else None


def note_diverged(root: Path, identity: str, reason: str) -> None:
    """Remember that a training diverged elsewhere, so that it is not tried again here."""
    with write_stage(root, "diverged", identity) as out:
        write_json(out / _REASON, {"reason": reason})


def evaluate_fingerprint(spec: ExperimentSpec, mixed: Stage, trained: Stage | None) -> str:
    """Identity of an evaluation: its items, its weights and how answers are scored."""
    base = base_digest(spec.model.id, spec.model.revision)
    weights = trained.fingerprint if trained else [base, number_format(spec)]
    scoring = spec.evaluation.model_dump(exclude=_NOT_SCORING)
    own = metric_identity(spec.evaluation)
    return _fingerprint("evaluate", mixed.fingerprint, weights, scoring, own)


def evaluate_stage(
    spec: ExperimentSpec,
    mixed: Stage,
    trained: Stage | None,
    on_progress: Progress | None = None,
) -> Stage:
    """Generate, parse and score the test items; keep every item's result."""
    return _stage(
        mixed.root,
        "evaluate",
        evaluate_fingerprint(spec, mixed, trained),
        lambda out: evaluate_cell(
            model_path=spec.model.id,
            revision=spec.model.revision,
            inputs=mixed.path,
            trained=trained.path if trained else None,
            evaluation=spec.evaluation,
            out=out,
            dtype=spec.model.dtype,
            device=spec.training.device,
            threads=spec.training.threads,
            on_progress=on_progress,
        ),
    )


def run_cell(spec: ExperimentSpec, cell: Cell, curated: Stage, settings: Candidate) -> CellOutcome:
    """Mix, train and evaluate one cell in this process."""
    spec = settled(spec, settings)
    mixed = mix_stage(spec, cell, curated)
    if not parse_arm(cell.arm).is_trained:
        return CellOutcome(cell, mixed, None, evaluate_stage(spec, mixed, None), None)
    trained = train_stage(spec, cell, mixed)
    return CellOutcome(cell, mixed, trained, evaluate_stage(spec, mixed, trained), settings)


def expected_outcome(
    spec: ExperimentSpec, cell: Cell, mixed: Stage, settings: Candidate
) -> CellOutcome:
    """What a cell will leave behind, before its training and evaluation are there.

    Args:
        spec: The experiment.
        cell: The cell.
        mixed: Its data.
        settings: What it is trained with.
    """
    trained = None
    if parse_arm(cell.arm).is_trained:
        identity = train_fingerprint(settled(spec, settings), mixed)
        trained = Stage("train", identity, mixed.root, reused=False)
    identity = evaluate_fingerprint(spec, mixed, trained)
    evaluated = Stage("evaluate", identity, mixed.root, reused=False)
    return CellOutcome(cell, mixed, trained, evaluated, settings if trained else None)


def tune(spec: ExperimentSpec, curated: Stage) -> dict[str, Any]:
    """Compare the candidates of every trained arm in this process, one after another."""
    table = {}
    for cell in tuning_cells(spec):
        trainings = [
            (settings, unless_diverged(_try, settled(spec, settings), cell, curated))
            for settings in spec.training.candidates
        ]
        table[cell.arm] = compare_candidates(cell, trainings)
    return table


def _try(spec: ExperimentSpec, cell: Cell, curated: Stage) -> Stage:
    return train_stage(spec, cell, mix_stage(spec, cell, curated))


def unless_diverged(train: Callable[..., T], *arguments: Any) -> T | None:
    """What ``train(*arguments)`` gives, or None when its learning rate was too high."""
    try:
        return train(*arguments)
    except DivergedError:
        return None


def compare_candidates(
    cell: Cell, trainings: Sequence[tuple[Candidate, Stage | None]]
) -> dict[str, Any]:
    """Choose the candidate with the lowest dev loss; ties go to the smaller rate, fewer epochs.

    Args:
        cell: The cell that was trained with each.
        trainings: Candidate and training; None where the training diverged.

    Raises:
        DivergedError: All of them did.
    """
    candidates = [settings._asdict() | {"dev_loss": _dev_loss(run)} for settings, run in trainings]
    usable = [entry for entry in candidates if entry["dev_loss"] is not None]
    if not usable:
        rates = sorted({settings.learning_rate for settings, _ in trainings})
        raise DivergedError(
            f"arm {cell.arm}: the loss was not finite with any of the learning rates"
            f" {', '.join(map(str, rates))}; add smaller ones under `training.learning_rate`"
        )
    best = min(usable, key=lambda entry: (entry["dev_loss"], *_settings(entry)))
    return {
        "cell": cell.name,
        "task_budget_tokens": cell.task_budget_tokens,
        "seed": cell.seed,
        "candidates": candidates,
        "chosen": _settings(best)._asdict(),
    }


def _dev_loss(trained: Stage | None) -> float | None:
    return read_json(trained.path / "summary.json")["kept_dev_loss"] if trained else None


def _settings(entry: Mapping[str, Any]) -> Candidate:
    return Candidate(float(entry["learning_rate"]), int(entry["epochs"]))


def chosen_settings(spec: ExperimentSpec, tuning: Mapping[str, Any], arm: str) -> Candidate:
    """The settings of an arm: the tuned ones, or the only ones."""
    return _settings(tuning[arm]["chosen"]) if arm in tuning else spec.training.candidates[0]


def settled(spec: ExperimentSpec, settings: Candidate) -> ExperimentSpec:
    """The experiment with one learning rate and one number of epochs."""
    training = spec.training.model_copy(update=settings._asdict())
    return spec.model_copy(update={"training": training})


def renderer_of(spec: ExperimentSpec) -> ChatRenderer:
    """The base model's chat renderer, loaded once per process."""
    return _renderer(spec.model.id, spec.model.revision, spec.model.chat_template)


def context_of(spec: ExperimentSpec) -> int | None:
    """Longest sequence the base model takes, in tokens, or None when it does not say."""
    return context_tokens(spec.model.id, spec.model.revision)


def number_format(spec: ExperimentSpec) -> str:
    """Number format in which weights are kept, settled: "auto" depends on the device."""
    device = resolve_device(spec.training.device)
    return resolve_precision(spec.model.dtype, device, spec.training.method).name


@lru_cache(maxsize=4)
def _renderer(model: str, revision: str | None, template_path: str | None) -> ChatRenderer:
    template = load_chat_template(template_path)
    return ChatRenderer(load_tokenizer(model, revision), template)


@lru_cache(maxsize=4)
def base_digest(model: str, revision: str | None) -> str:
    """sha256 of the base model's configuration and weights."""
    return model_digest(resolve_model(model, revision))


def per_step(phase: str, on_progress: Progress | None) -> Callable[[int, int, Any], None] | None:
    """Adapt a progress callback to the training loop's."""
    if on_progress is None:
        return None
    return lambda done, total, _record: on_progress(phase, done, total)


def _fingerprint(stage: str, *parts: Any) -> str:
    return fingerprint(stage, STAGE_VERSIONS[stage], *parts)


def _stage(
    root: Path,
    name: str,
    identity: str,
    work: Callable[[Path], Any],
    *,
    resume: bool = False,
    is_usable: Callable[[Path], bool] = lambda _path: True,
) -> Stage:
    found = find_stage(root, name, identity)
    if found and is_usable(found):
        return Stage(name, identity, root, reused=True)
    with write_stage(root, name, identity, resume=resume) as out:
        work(out)
    if not find_stage(root, name, identity):
        raise StoreError(f"stage {name}-{identity} in {root} does not read back as it was written")
    return Stage(name, identity, root, reused=False)
