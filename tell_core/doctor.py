"""Whether training on this machine, with this model and these data, computes what it should.

The checks are invariants: they compare two ways to the same number on the user's own model and
examples, so they need no reference values. They take about a minute and train nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import psutil
import torch
from packaging.requirements import Requirement
from torch import nn

from tell_core.data.encoding import EncodedExamples, IntArray, Mixture
from tell_core.data.pools import open_pools
from tell_core.data.rendering import ChatRenderer, label_mask_pieces, load_chat_template
from tell_core.data.token_store import open_mixture
from tell_core.errors import TellError
from tell_core.evaluation.generation import generate_greedy
from tell_core.pipeline import Stage, curate_stage, mix_stage, renderer_of, settled
from tell_core.spec.arms import parse_arm
from tell_core.spec.cells import Cell, plan_cells
from tell_core.spec.model import ExperimentSpec
from tell_core.store import read_json
from tell_core.training.attention import TOLERANCE, attended, packing_refusal
from tell_core.training.batching import Limits, share_rows
from tell_core.training.collation import collate
from tell_core.training.devices import (
    Precision,
    cpu_threads,
    exclusive_device,
    resolve_device,
    resolve_precision,
)
from tell_core.training.gradients import step_gradients
from tell_core.training.losses import supervised_nll
from tell_core.training.models import LoadedModel, attach_lora, detach_adapter, load_model
from tell_core.training.trainer import seed_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Verdict = Literal["ok", "warning", "fail"]
Sample = list[tuple[str, bool]]  # text of each token, and whether it is supervised

_NUM_EXAMPLES = 8
_NEW_TOKENS = 16
_IN_ONE_BATCH = Limits("padded")
_LEAST_DISK_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Attributes:
        name: What was looked at.
        verdict: ok; warning: works, but; fail: results would be wrong or the run would stop.
        detail: What was found, with numbers; for anything but ok also what to do.
    """

    name: str
    verdict: Verdict
    detail: str


def check_environment(root: Path) -> list[Check]:
    """Versions of the packages, device, memory and disk."""
    return [_check_versions(), _check_device(), _check_memory(), _check_disk(root)]


def check_experiment(spec: ExperimentSpec, root: Path) -> tuple[list[Check], list[Sample]]:
    """The invariants of training and evaluation, on the experiment's own model and data.

    Args:
        spec: The experiment.
        root: Its run directory; curation and one mixture are kept there and reused by the run.

    Returns:
        The checks, and sample examples whose label mask a person should look at.

    Raises:
        InputError: The experiment cannot be run at all.
    """
    spec = settled(spec, spec.training.candidates[0])
    curated = curate_stage(spec, root)
    cell = _richest_cell(spec)
    mixed = mix_stage(spec, cell, curated)
    mixture = open_mixture(mixed.path)
    device = resolve_device(spec.training.device)
    with exclusive_device(device), cpu_threads(spec.training.threads):
        base = load_model(
            spec.model.id, revision=spec.model.revision, dtype=spec.model.dtype, device=device,
            is_full=spec.training.method == "full",
        )  # fmt: skip
        checks = [
            _check_digests(spec, curated, mixture.examples, base),
            _check_labels(mixture.examples, base),
            _check_texts(spec, cell, curated, mixture.examples, base),
            *_check_numbers(spec, mixture, base, device),
        ]
    return checks, _samples(mixture.examples, base)


def _richest_cell(spec: ExperimentSpec) -> Cell:
    """A trained cell with task and general data where there is one, at the smallest budgets."""
    cells = [cell for cell in plan_cells(spec) if parse_arm(cell.arm).is_trained]
    if not cells:
        raise TellError("no arm of this experiment is trained: there is nothing to check")
    return next((cell for cell in cells if parse_arm(cell.arm).is_tell), cells[0])


def _check_versions() -> Check:
    """Every requirement of this package against what is installed."""
    wrong = []
    for line in importlib.metadata.requires("tell") or ():
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found}, needed {requirement.specifier}")
    if wrong:
        return Check("packages", "fail", "; ".join(wrong) + ". Install with constraints.txt")
    return Check("packages", "ok", f"Python {platform.python_version()}, torch {torch.__version__}")


def _check_device() -> Check:
    if not torch.cuda.is_available():
        threads = os.environ.get("OMP_NUM_THREADS", "not set")
        return Check("device", "ok", f"CPU, {os.cpu_count()} cores; OMP_NUM_THREADS {threads}")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    format_ = "bfloat16" if torch.cuda.is_bf16_supported() else "float32 only"
    return Check(
        "device", "ok", f"{', '.join(names)}; {format_}; a training each, or each rank of one"
    )


def _check_memory() -> Check:
    memory = psutil.virtual_memory()
    detail = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    return Check("memory", "ok" if memory.available > 1e9 else "warning", detail)


def _check_disk(root: Path) -> Check:
    place = next(path for path in (root, *root.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    verdict: Verdict = "ok" if free > _LEAST_DISK_BYTES else "warning"
    return Check("disk", verdict, f"{free / 1e9:.1f} GB free at {place}")


def _check_digests(
    spec: ExperimentSpec, curated: Stage, examples: EncodedExamples, base: LoadedModel
) -> Check:
    """Tokenizer and template of the model are those that the data were tokenized with."""
    name = "data and model belong together"
    renderer = ChatRenderer(base.tokenizer, load_chat_template(spec.model.chat_template))
    profile = read_json(curated.path / "profile.json")
    for what in ("tokenizer", "template"):
        given, needed = getattr(renderer, f"{what}_digest"), profile[f"{what}_digest"]
        if given != needed:
            detail = (
                f"the model's {what} is {given[:12]}, the data were tokenized with {needed[:12]};"
                f" remove {curated.path} and curate again"
            )
            return Check(name, "fail", detail)
    largest = int(examples.tokens.max(initial=0))
    size = cast("nn.Embedding", base.model.get_input_embeddings()).num_embeddings
    if largest >= size:
        detail = (
            f"token {largest} of the data, the model embeds {size}; its tokenizer is not its own"
        )
        return Check(name, "fail", detail)
    detail = (
        f"tokenizer {renderer.tokenizer_digest[:12]}, template {renderer.template_digest[:12]},"
        f" weights {base.digest[:12]}"
    )
    return Check(name, "ok", detail)


def _check_labels(examples: EncodedExamples, base: LoadedModel) -> Check:
    """Every example has supervised tokens, and ends with one that ends the turn."""
    empty = int((examples.supervised_counts < 1).sum())
    unprompted = int((examples.response_starts < 1).sum())
    if empty or unprompted:
        detail = f"{empty} examples without supervised tokens, {unprompted} without a prompt"
        return Check("label mask", "fail", f"{detail}; check the chat template")
    last = {int(examples.example(row)[-1]) for row in range(len(examples))}
    ends = set(base.tokenizer.all_special_ids) | set(base.tokenizer.added_tokens_decoder)
    if last - ends:
        names = base.tokenizer.convert_ids_to_tokens(sorted(last - ends)[:3])
        detail = f"responses end with {names}, which end no turn: the model will not learn to stop"
        return Check("label mask", "warning", f"{detail}; check the chat template")
    share = examples.num_supervised_tokens / examples.num_tokens
    detail = f"{len(examples)} examples, {share:.0%} of their tokens supervised, all end the turn"
    return Check("label mask", "ok", detail)


def _check_texts(
    spec: ExperimentSpec,
    cell: Cell,
    curated: Stage,
    examples: EncodedExamples,
    base: LoadedModel,
) -> Check:
    """Decoded again, prompts hold the anchor prompt and responses are those of the corpus."""
    pools = open_pools(curated.path, renderer_of(spec))
    responses = pools.corpus("task_train").records(
        np.arange(pools.corpus("task_train").num_examples), ("response",)
    )
    known = {_plain(record["response"]) for record in responses}
    anchor = _plain(pools.anchor.text) if parse_arm(cell.arm).task_anchor == "anchor" else ""
    rows = np.flatnonzero(examples.is_task)
    for row in rows.tolist():
        ids, start = examples.example(row).tolist(), int(examples.response_starts[row])
        prompt = _plain(str(base.tokenizer.decode(ids[:start], skip_special_tokens=True)))
        response = _plain(str(base.tokenizer.decode(ids[start:], skip_special_tokens=True)))
        if anchor not in prompt:
            return Check("texts", "fail", f"task example {row} lost its anchor prompt: {prompt!r}")
        if response not in known:
            detail = f"the supervised tokens of task example {row} are no response: {response!r}"
            return Check("texts", "fail", f"{detail}; check the chat template")
    return Check("texts", "ok", f"{len(rows)} task examples keep anchor prompt and whole response")


def _plain(text: str) -> str:
    return "".join(text.split())


def _check_numbers(
    spec: ExperimentSpec, mixture: Mixture, base: LoadedModel, device: torch.device
) -> Iterator[Check]:
    """Batches against single examples, whole steps against micro-batches."""
    precision = resolve_precision(spec.model.dtype, device, spec.training.method)
    tolerance = TOLERANCE[precision.name]
    rows = np.unique(mixture.order[: spec.training.batch_size])[:_NUM_EXAMPLES].astype(np.int64)
    examples = mixture.examples
    yield _compare(
        "batch equals single examples (loss)",
        lambda: _losses_apart(base.model, examples, rows, device, precision),
        tolerance,
    )
    batches = {"one batch equals micro-batches (gradient)": _IN_ONE_BATCH}
    refusal = packing_refusal(base.model, examples, rows, device, precision)
    if refusal is None:
        batches["packed equals single examples (gradient)"] = Limits("packed")
    else:
        detail = f"refused for this model, which is trained length_grouped: {refusal}"
        asked = spec.training.batching == "packed"
        yield Check("packing", "fail" if asked else "warning", detail)
    with _gradient_of(spec, base, examples, rows, device, precision) as gradient:
        alone = gradient(Limits("padded", max_examples=1), 1)
        for name, limits in batches.items():
            yield _compare(name, partial(_apart, alone, gradient(limits, 1)), tolerance)
        yield _compare(
            "two ranks equal one process (gradient)",
            lambda: _apart(alone, gradient(_IN_ONE_BATCH, 2)),
            tolerance,
        )
    yield _check_generation(base, examples, rows, device, precision)


def _compare(name: str, difference: Callable[[], float], tolerance: float) -> Check:
    found = difference()
    detail = f"relative difference {found:.1e}, at most {tolerance:.0e} is rounding"
    if found <= tolerance:
        return Check(name, "ok", detail)
    return Check(
        name, "fail",
        f"{detail}: this model mixes examples of a batch; train with `micro_batch_size: 1` and"
        " evaluate with `batch_size: 1`, or use another attention implementation",
    )  # fmt: skip


def _losses_apart(
    model: nn.Module,
    examples: EncodedExamples,
    rows: IntArray,
    device: torch.device,
    precision: Precision,
) -> float:
    """Largest relative difference of an example's loss in a batch and alone."""
    with torch.inference_mode(), precision.autocast(device):
        batch = collate(examples, rows, device)
        together = batch.sum_by_row(supervised_nll(model, batch).double().cpu().numpy())
        alone = np.asarray(
            [
                float(supervised_nll(model, collate(examples, [row], device)).double().sum())
                for row in rows
            ]
        )
    return float(np.max(np.abs(together - alone) / np.maximum(np.abs(alone), 1e-6)))


Gradient = Callable[[Limits, int], torch.Tensor]


@contextmanager
def _gradient_of(
    spec: ExperimentSpec,
    base: LoadedModel,
    examples: EncodedExamples,
    rows: IntArray,
    device: torch.device,
    precision: Precision,
) -> Iterator[Gradient]:
    """A function from a layout and a number of ranks to the gradient of one step, shape (P,)."""
    is_full = spec.training.method == "full"
    seed_step(0, 0)
    without_dropout = spec.training.model_copy(update={"lora_dropout": 0.0})
    model = base.model if is_full else attach_lora(base.model, without_dropout)
    if is_full:
        model.requires_grad_(True)

    def gradient(limits: Limits, num_ranks: int) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        with attended(cast("PreTrainedModel", model), limits):
            for share in share_rows(examples.lengths[rows], num_ranks):
                step_gradients(
                    model, examples, rows,
                    limits=limits, device=device, precision=precision, share=share,
                )  # fmt: skip
        found = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        return torch.cat(found)

    try:
        yield gradient
    finally:
        detach_adapter(model)


def _apart(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Norm of the difference over that of what is expected."""
    return float((expected - found).norm() / expected.norm().clamp(min=1e-30))


def _check_generation(
    base: LoadedModel,
    examples: EncodedExamples,
    rows: IntArray,
    device: torch.device,
    precision: Precision,
) -> Check:
    """Answers in a batch against answers one by one."""
    prompts = [examples.example(row)[: examples.response_starts[row]] for row in rows]
    with precision.autocast(device):
        together, alone = (
            generate_greedy(
                base.model, base.tokenizer, prompts,
                max_new_tokens=_NEW_TOKENS, batch_size=size, device=device,
            )
            for size in (len(prompts), 1)
        )  # fmt: skip
    different = sum(a != b for a, b in zip(together, alone, strict=True))
    detail = f"{different} of {len(prompts)} answers of {_NEW_TOKENS} tokens differ"
    if not different:
        return Check("batched generation equals single", "ok", detail)
    hint = "ties within rounding; `evaluation.num_repeats: 2` measures what they are worth"
    verdict: Verdict = "fail" if precision.name == "float32" else "warning"
    return Check("batched generation equals single", verdict, f"{detail}: {hint}")


def _samples(examples: EncodedExamples, base: LoadedModel) -> list[Sample]:
    """A task example and a general one."""
    rows = [np.flatnonzero(examples.is_task == is_task)[:1] for is_task in (True, False)]
    return [
        label_mask_pieces(
            base.tokenizer, examples.example(row).tolist(), int(examples.response_starts[row])
        )
        for row in np.concatenate(rows).tolist()
    ]


def worst(checks: Sequence[Check]) -> Verdict:
    """The worst verdict."""
    return max((check.verdict for check in checks), key=["ok", "warning", "fail"].index)
