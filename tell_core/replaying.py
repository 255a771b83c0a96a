"""Replay: a registered version built again from what it holds, and compared with itself.

Bit-equal: every file of weights has the sha256 that was recorded. Within noise: the score on the
same items differs by no more than two trainings with different seeds do, which the version's own
experiment measured: Student's t times the standard deviation over seeds times the root of 2 (the
interval of a difference between two single trainings).
"""

import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from scipy import stats

from tell_core.data.curation import curation_inputs
from tell_core.pipeline import (
    STAGE_VERSIONS,
    CellOutcome,
    base_digest,
    curate_stage,
    number_format,
    renderer_of,
    run_cell,
)
from tell_core.registered import RegisteredVersion
from tell_core.report_card import weight_digests
from tell_core.results import hardware, open_run, sole_owner, write_spec
from tell_core.spec.cells import plan_cells
from tell_core.spec.model import Candidate, ExperimentSpec
from tell_core.store import read_json, write_json

Verdict = Literal["bit-equal", "within noise", "different"]
REPLAY_FILE = "replay.json"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Replay:
    """A version beside the one built again.

    Attributes:
        verdict: How they compare.
        changed: Inputs that are not what they were, in words.
        metric: Metric of the scores.
        score: What the version scored.
        replayed_score: What the one built again scores on the same items.
        noise: Largest difference that counts as noise; None when the experiment had one seed.
        num_seeds: Seeds from which the noise is known.
        confidence: Coverage of the noise.
        directory: Run directory of the one built again.
    """

    verdict: Verdict
    changed: list[str]
    metric: str
    score: float
    replayed_score: float
    noise: float | None
    num_seeds: int
    confidence: float
    directory: str

    def sentences(self) -> list[str]:
        """The answer in words."""
        scores = f"{self.metric} {self.replayed_score:.6g}, registered {self.score:.6g}"
        if self.noise is None:
            noise = "the experiment had one seed, so its noise is unknown"
        else:
            noise = (
                f"noise {self.noise:.3g}: two trainings of this cell with different seeds differ"
                f" by up to that with {100 * self.confidence:g} % probability"
                f" ({self.num_seeds} seeds)"
            )
        changed = self.changed or ["no recorded input has changed"]
        return [f"{self.verdict} ({scores}; {noise})", *changed]


def replay(
    registered: RegisteredVersion, out: Path, settings: Sequence[str] = (), say: Say | None = None
) -> Replay:
    """Curate, mix, train and evaluate a version's cell again; compare the results.

    What is found finished in ``out`` is reused, so that an interrupted replay goes on.

    Args:
        registered: The version.
        out: New run directory.
        settings: ``name=value`` for what lies elsewhere today, e.g. ``task.train.path=…``.
        say: Called with a line at each step.

    Raises:
        InputError: A source or the base model is missing, or ``out`` belongs to something else.
        TrainingError: The training stopped.
    """
    tell = say or (lambda _line: None)
    spec, card = registered.spec(settings), registered.card
    changed = list(changed_inputs(spec, card))
    for line in changed:
        tell(line)
    open_run(spec, out)
    with sole_owner(out):
        write_spec(spec, out)
        outcome = _rebuild(spec, card, out, tell)
    found = _compare(spec, card, outcome, changed, out)
    write_json(out / REPLAY_FILE, asdict(found))
    return found


def changed_inputs(spec: ExperimentSpec, card: Mapping[str, Any]) -> Iterator[str]:
    """What is not as it was when a version was made, a line each.

    Args:
        spec: Its experiment, as it would run now.
        card: Its report card.

    Raises:
        InputError: A source or the base model is missing.
    """
    redo = card["reproduce"]
    yield from _changed_sources(redo["inputs"], curation_inputs(spec))
    facts = (
        ("base model's digest", card["base_digest"], _base_digest(spec)),
        ("tokenizer's and chat template's digest", card["renderer_digest"], _renderer(spec)),
        ("number format of the weights", redo["number_format"], number_format(spec)),
        ("GPUs", redo["hardware"]["gpus"], hardware()["gpus"]),
        ("processor", redo["hardware"]["machine"], platform.machine()),
    )
    for what, before, now in facts:
        if before != now:
            yield f"changed: {what}: {before} then, {now} now"
    for stage, number in redo["stage_versions"].items():
        if STAGE_VERSIONS.get(stage) != number:
            yield (
                f"changed: code of stage {stage}: version {number} then,"
                f" {STAGE_VERSIONS.get(stage)} now"
            )
    for package, number in redo["versions"].items():
        current = platform.python_version() if package == "python" else _installed(package)
        if number and current != number:
            yield f"changed: {package}: {number} then, {current} now"


def noise_of(scores: Sequence[float], sd: float | None, confidence: float) -> float | None:
    """How far two single trainings with different seeds differ with probability ``confidence``.

    Args:
        scores: One per seed.
        sd: Their standard deviation, or None with a single one.
        confidence: Coverage.
    """
    if sd is None:
        return None
    return float(stats.t.ppf((1 + confidence) / 2, len(scores) - 1) * sd * math.sqrt(2))


def _rebuild(spec: ExperimentSpec, card: Mapping[str, Any], out: Path, say: Say) -> CellOutcome:
    cell = next(cell for cell in plan_cells(spec) if cell.name == card["cell"])
    say("curating")
    curated = curate_stage(spec, out)
    say(f"training and evaluating {cell.label}")
    return run_cell(spec, cell, curated, Candidate(**card["reproduce"]["settings"]))


def _compare(
    spec: ExperimentSpec,
    card: Mapping[str, Any],
    outcome: CellOutcome,
    changed: list[str],
    out: Path,
) -> Replay:
    assert outcome.trained is not None, "only trained cells are registered"
    metric, confidence = card["primary_metric"], spec.analysis.confidence
    score = float(card["scores"][metric]["score"])
    again = float(read_json(outcome.evaluated.path / "scores.json")[metric]["score"])
    noise = noise_of(card["noise"]["scores"], card["noise"]["sd"], confidence)
    verdict: Verdict = "different"
    if weight_digests(outcome.trained.path) == card["reproduce"]["weights"]:
        verdict = "bit-equal"
    elif noise is not None and abs(again - score) <= noise:
        verdict = "within noise"
    return Replay(
        verdict=verdict,
        changed=changed,
        metric=metric,
        score=score,
        replayed_score=again,
        noise=noise,
        num_seeds=len(card["noise"]["scores"]),
        confidence=confidence,
        directory=str(out),
    )


def _changed_sources(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    current = {(entry["role"], entry["name"]): entry for entry in now["sources"]}
    for entry in before["sources"]:
        role, name = entry["role"], entry["name"]
        other = current.get((role, name))
        if other is None:
            yield f"changed: source {name} ({role}) is no longer there"
        elif _digests(other) != _digests(entry):
            yield (
                f"changed: source {name} ({role}): digest {_digests(entry)} then,"
                f" {_digests(other)} now"
            )
    if before["chat_template"] != now["chat_template"]:
        yield "changed: the file of the chat template"


def _digests(source: Mapping[str, Any]) -> str:
    """Contents of a source; how its files are called is of no account."""
    if "hub" in source:
        return str(source["hub"])
    return ", ".join(file["sha256"][:12] for file in source["files"])


def _base_digest(spec: ExperimentSpec) -> str:
    return base_digest(spec.model.id, spec.model.revision)


def _renderer(spec: ExperimentSpec) -> str:
    return renderer_of(spec).digest


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
