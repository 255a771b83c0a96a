"""Gradients of task and general examples on the base model, for selection by alignment.

Each example's gradient by the weights of the linear layers is projected to a few hundred numbers
(`tell_core.analysis.quanta`), once for all cells of an experiment: what a cell may look at, and so
the order it takes general examples in, is decided later, from these numbers. It costs a forward
and a backward pass of the base model for every example of both pools, whatever the budgets are:
about as much as one epoch over all general data.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tell_core.analysis.quanta.gradients import project_gradients
from tell_core.analysis.quanta.loading import load_subject
from tell_core.analysis.quanta.projection import CountSketch
from tell_core.data.encoding import EncodedExamples, IntArray
from tell_core.data.pools import Look, open_pools
from tell_core.data.rendering import ChatRenderer
from tell_core.data.selection import GENERAL_GRADIENTS, TASK_GRADIENTS
from tell_core.training.devices import DeviceName, resolve_device

NUM_DIMENSIONS = 1024
"""Numbers kept of a gradient; cosines are off by about 1 / sqrt(1024) = 0.03."""
_BLOCK_EXAMPLES = 4096
Progress = Callable[[str, int, int], None]
Encode = Callable[[IntArray], EncodedExamples]


def write_gradients(
    model_path: str,
    curated: Path,
    renderer: ChatRenderer,
    out: Path,
    *,
    revision: str | None = None,
    device: DeviceName = "auto",
    on_progress: Progress | None = None,
) -> None:
    """Write the projected gradients of the task's training data and of general data.

    Task examples carry the anchor prompt, as the arms that select by alignment see them.

    Args:
        model_path: Directory or hub id of the base model.
        curated: Directory written by `curate`.
        renderer: Renderer of the base model.
        out: Existing directory for ``task_train.npy`` and ``general.npy``, each of shape
            (examples of the corpus, 1024), float32.
        revision: Commit, tag or branch on the hub.
        device: Where to compute, as in the specification.
        on_progress: Called with the corpus, examples done and examples in all.

    Raises:
        ModelError: The model is missing, damaged or without linear layers.
    """
    pools = open_pools(curated, renderer)
    where = resolve_device(device)
    model, _ = load_subject(model_path, revision=revision, device=where)
    encoders: dict[str, tuple[str, Encode]] = {
        "task_train": (
            TASK_GRADIENTS,
            lambda rows: pools.encoded("task_train", rows, Look("anchor"), is_task=True),
        ),
        "general": (
            GENERAL_GRADIENTS,
            lambda rows: pools.corpus("general").encoded(rows, is_task=False),
        ),
    }
    for part, (name, encode) in encoders.items():
        count = pools.corpus(part).num_examples
        shape = (count, NUM_DIMENSIONS)
        kept = np.lib.format.open_memmap(out / name, mode="w+", dtype=np.float32, shape=shape)
        for start in range(0, count, _BLOCK_EXAMPLES):
            rows = np.arange(start, min(start + _BLOCK_EXAMPLES, count))
            projected = project_gradients(
                model, encode(rows), CountSketch(NUM_DIMENSIONS), device=where
            )
            kept[rows] = projected.vectors
            if on_progress:
                on_progress(f"gradients of {part}", int(rows[-1]) + 1, count)
        kept.flush()
