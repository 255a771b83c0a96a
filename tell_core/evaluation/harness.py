"""Tasks of lm-evaluation-harness, run on the model in memory, with a value for every item.

The harness builds prompts, asks the model and judges; kept is what its metric says of each item, so
that the same bootstrap applies as for every other metric. Only means over items can be kept so.
"""

from __future__ import annotations

import copy
import difflib
import importlib.metadata
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tell_core.errors import InputError
from tell_core.evaluation.base import MeanMetric, ScoredItem
from tell_core.evaluation.extras import optional_module
from tell_core.evaluation.parsing import Answer
from tell_core.spec.identity import file_digest
from tell_core.spec.model import HarnessSpec, MetricSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INSTALL = "pip install 'tell[harness]'"
_UNFILTERED = "none"


class HarnessMetric(MeanMetric):
    """The mean over a harness task's items of what the task's own metric says of each.

    Items of a group of tasks weigh the same, whatever task they are of. `limits` are unknown here:
    they are the metric's own.
    """

    needs_generation = False
    limits = (-math.inf, math.inf)

    def __init__(self, spec: HarnessSpec) -> None:
        self.name = f"harness/{spec.task}/{spec.metric}"
        self.items = f"harness/{spec.task}"
        self.harness = spec
        super().__init__(MetricSpec(name=self.name))

    @property
    def signature(self) -> str:
        """Examples in the prompt and items asked for."""
        limit = "all" if self.harness.max_items is None else self.harness.max_items
        return f"num_shots:{self.harness.num_shots}|max_items:{limit}"

    def _value(self, item: ScoredItem) -> float:
        return float(item.extra[self.harness.metric])


def harness_metrics(specs: Sequence[HarnessSpec]) -> tuple[HarnessMetric, ...]:
    """A metric for each entry of ``evaluation.harness``.

    Raises:
        InputError: Entries of one task differ in more than their metric.
    """
    _by_task(specs)
    return tuple(HarnessMetric(spec) for spec in specs)


def check_harness(specs: Sequence[HarnessSpec]) -> None:
    """Know before anything is trained that tasks and their data are there and metrics are means.

    Raises:
        InputError: The harness is not installed; a task or metric is unknown, its data cannot be
            loaded, or its metric is no mean over items.
    """
    for task, group in _by_task(specs).items():
        _load_tasks(task, group)


def harness_identity(specs: Sequence[HarnessSpec]) -> dict[str, Any]:
    """Version of the harness and digests of all files in `tasks_dir`; empty without tasks.

    Data that lies elsewhere is not looked at.

    Raises:
        InputError: The harness is not installed.
    """
    if not specs:
        return {}
    try:
        version = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            f"`evaluation.harness` needs lm-evaluation-harness; install it with `{_INSTALL}`, or"
            " remove the tasks from the specification"
        ) from error
    directories = sorted({spec.tasks_dir for spec in specs if spec.tasks_dir})
    return {"lm_eval": version, "files": [_digests(Path(path)) for path in directories]}


def run_harness(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    specs: Sequence[HarnessSpec],
    *,
    batch_size: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[ScoredItem]]:
    """Run every task on the model.

    Prompts are the harness's own, without chat template, as in its published numbers. Nothing is
    cached; the random seeds are the harness's.

    Args:
        model: Causal language model in evaluation mode, with or without adapters.
        tokenizer: Its tokenizer.
        specs: The tasks.
        batch_size: Requests side by side.
        on_progress: Called after each task with tasks done and tasks in all.

    Returns:
        By kind of items ("harness/" and the task): its items. ``extra`` holds the value of each
        metric asked for, by the metric's name in the specification.

    Raises:
        InputError: As `check_harness`; or the harness failed.
    """
    found: dict[str, list[ScoredItem]] = {}
    groups = _by_task(specs)
    for task, group in groups.items():
        manager, tasks = _load_tasks(task, group)
        samples = _samples(_wrapped(model, tokenizer, batch_size), manager, tasks, group[0])
        found[f"harness/{task}"] = [
            item for name, rows in samples.items() for item in _items(name, rows, group)
        ]
        if on_progress:
            on_progress(len(found), len(groups))
    return found


def _by_task(specs: Sequence[HarnessSpec]) -> dict[str, list[HarnessSpec]]:
    """Entries by task: a task with several metrics runs once."""
    groups: dict[str, list[HarnessSpec]] = {}
    for spec in specs:
        group = groups.setdefault(spec.task, [])
        group.append(spec)
        if spec != group[0].model_copy(update={"metric": spec.metric}):
            raise InputError(
                f"harness task {spec.task!r} is named twice with different settings; entries of"
                " one task may differ in `metric` alone"
            )
    return groups


def _load_tasks(task: str, specs: Sequence[HarnessSpec]) -> tuple[Any, dict[str, Any]]:
    """The harness's task manager, and the tasks by name: one, or those of a group."""
    tasks = optional_module("lm_eval.tasks", "`evaluation.harness`", _INSTALL)
    directory = specs[0].tasks_dir
    if directory is not None and not Path(directory).is_dir():
        raise InputError(f"harness task {task!r}: `tasks_dir` {directory} is no directory")
    manager = tasks.TaskManager(include_path=directory, include_defaults=directory is None)
    if task not in manager.all_tasks:
        near = difflib.get_close_matches(task, manager.all_tasks, n=3, cutoff=0.0)
        where = f"in {directory}" if directory else "in lm-evaluation-harness"
        raise InputError(f"there is no task {task!r} {where}; near it: {', '.join(near)}")
    with _explained(task, "cannot be loaded; offline, its data must be local"):
        loaded: dict[str, Any] = manager.load([task])["tasks"]
    for found in loaded.values():
        for spec in specs:
            _check_metric(found, spec)
    return manager, loaded


def _check_metric(task: Any, spec: HarnessSpec) -> None:
    """Refuse what cannot be kept as a mean over items, higher being better."""
    metric, _, filter_name = spec.metric.partition(",")
    aggregations = task.aggregation()
    name = f"metric {metric!r} of harness task {spec.task!r}"
    if metric not in aggregations:
        raise InputError(f"there is no {name}; it has {', '.join(sorted(aggregations))}")
    mean = optional_module("lm_eval.api.metrics", "`evaluation.harness`", _INSTALL).mean
    if aggregations[metric] is not mean:
        raise InputError(
            f"{name} is no mean over items (the task computes it from all of them together), so"
            " it has no interval over items here; take another of the task's metrics:"
            f" {', '.join(sorted(m for m, how in aggregations.items() if how is mean)) or 'none'}"
        )
    if not task.higher_is_better().get(metric, True):
        raise InputError(f"{name} is better when it is lower; only the others are supported")
    filters = [entry["name"] for entry in task.get_config("filter_list") or []] or [_UNFILTERED]
    if (filter_name or filters[0]) not in filters or (not filter_name and len(filters) > 1):
        raise InputError(
            f"{name}: the task reads answers in the ways {', '.join(filters)}; name one of them,"
            f" `metric: '{metric},{filters[0]}'`"
        )
    if spec.num_shots and task.get_config("num_fewshot") == 0:
        raise InputError(
            f"harness task {spec.task!r} says itself that its prompts hold no examples; remove"
            " `num_shots`"
        )


def _wrapped(model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """The model as the harness takes it; its tokenizer is a copy, for the harness changes it."""
    models = optional_module("lm_eval.models.huggingface", "`evaluation.harness`", _INSTALL)
    return models.HFLM(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),
        backend="causal",
        batch_size=batch_size,
    )


def _samples(
    wrapped: Any, manager: Any, tasks: Mapping[str, Any], spec: HarnessSpec
) -> dict[str, list[dict[str, Any]]]:
    """What the harness says of every item, by task."""
    lm_eval = optional_module("lm_eval", "`evaluation.harness`", _INSTALL)
    with _explained(spec.task, "failed"):
        results = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=list(tasks.values()),
            num_fewshot=spec.num_shots,
            limit=spec.max_items,
            bootstrap_iters=0,
            log_samples=True,
            task_manager=manager,
        )
    return {name: results["samples"][name] for name in tasks}


def _items(
    task: str, samples: Sequence[Mapping[str, Any]], specs: Sequence[HarnessSpec]
) -> list[ScoredItem]:
    """Items of one task in their order, each with the value of every metric asked for."""
    values: dict[int, dict[str, float]] = {}
    answers: dict[int, Mapping[str, Any]] = {}
    for sample in samples:
        answers.setdefault(sample["doc_id"], sample)
        for spec in specs:
            metric, _, filter_name = spec.metric.partition(",")
            if sample["filter"] == (filter_name or sample["filter"]):
                values.setdefault(sample["doc_id"], {})[spec.metric] = _number(
                    sample.get(metric), f"{task}-{sample['doc_id']}", spec
                )
    return [
        ScoredItem(
            item_id=f"{task}-{doc:05d}",
            prediction=_prediction(sample),
            reference=Answer(str(sample["target"]), False),
            extra=values[doc],
            nll=0.0,
            num_tokens=1,
            num_bytes=1,
        )
        for doc, sample in sorted(answers.items())
    ]


def _number(value: Any, item: str, spec: HarnessSpec) -> float:
    if not isinstance(value, Real) or not math.isfinite(value):
        raise InputError(
            f"metric {spec.metric!r} of harness task {spec.task!r} is {value!r} for item {item};"
            " only metrics with a number for every item are supported"
        )
    return float(value)


def _prediction(sample: Mapping[str, Any]) -> Answer | None:
    """The text that was generated; None where the task compares probabilities."""
    texts = [text for text in sample["filtered_resps"] if isinstance(text, str)]
    return Answer(texts[0], False) if texts else None


def _digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): file_digest(path) for path in files}


@contextmanager
def _explained(task: str, what: str) -> Iterator[None]:
    """Turn whatever the harness or a task's own code raises into an InputError."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"harness task {task!r} {what} ({type(error).__name__}: {error})"
        ) from error
