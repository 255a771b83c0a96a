"""Arms: the ways of training that an experiment compares (arXiv 2404.00914)."""

import difflib
import re
from dataclasses import dataclass, replace
from typing import Literal

from tell_core.errors import SpecError

TaskAnchor = Literal["own", "anchor", "none", "random"]
OrderKind = Literal["shuffle", "task_first", "task_last", "blocks"]
Selection = Literal["random", "diversity", "alignment"]


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        name: As written in the specification.
        is_trained: False for the base model as it is.
        uses_task: Whether task data of the task budget is used.
        uses_general: Whether general data of the general budget is mixed in.
        task_anchor: What stands on task prompts, in training and at evaluation: the task's
            own instruction only, the anchor prompt, nothing, or random text of equal length.
        anchors_general: Whether general prompts carry the anchor prompt too.
        order: How task and general data follow each other.
        num_blocks: Number of blocks of `order` "blocks", else None.
        matches_steps: Repeat the task data to the optimiser steps of `tell`.
        has_shots: Whether solved task examples stand in the prompt.
        selection: Which general examples a budget takes: at random, those that together stand best
            for the pool, or those whose gradients point where the task's do.
    """

    name: str
    is_trained: bool = True
    uses_task: bool = True
    uses_general: bool = True
    task_anchor: TaskAnchor = "anchor"
    anchors_general: bool = False
    order: OrderKind = "shuffle"
    num_blocks: int | None = None
    matches_steps: bool = False
    has_shots: bool = False
    selection: Selection = "random"

    @property
    def is_tell(self) -> bool:
        """Whether the arm trains on task and general data together."""
        return self.is_trained and self.uses_task and self.uses_general


_UNTRAINED = Arm("", is_trained=False, uses_task=False, uses_general=False)
_SFT = Arm("", uses_general=False, task_anchor="own")
_TELL = Arm("")

_ARMS = {
    "base": _UNTRAINED,
    "base_few_shot": replace(_UNTRAINED, has_shots=True),
    "sft": _SFT,
    "sft_matched": replace(_SFT, matches_steps=True),
    "tell": _TELL,
    "tell_no_anchor": replace(_TELL, task_anchor="none"),
    "tell_random_anchor": replace(_TELL, task_anchor="random"),
    "tell_anchor_all": replace(_TELL, anchors_general=True),
    "tell_task_first": replace(_TELL, order="task_first"),
    "tell_task_last": replace(_TELL, order="task_last"),
    "tell_diverse": replace(_TELL, selection="diversity"),
    "tell_aligned": replace(_TELL, selection="alignment"),
    "general_only": replace(_TELL, uses_task=False),
}
ARM_NAMES = (*_ARMS, "tell_blocks(k)")
SFT_ARMS = ("sft", "sft_matched")  # what TELL is compared with


def parse_arm(name: str) -> Arm:
    """Look up an arm by its name; ``tell_blocks(k)`` takes the number of blocks.

    Raises:
        SpecError: There is no such arm; the nearest name is given.
    """
    if name in _ARMS:
        return replace(_ARMS[name], name=name)
    if match := re.fullmatch(r"tell_blocks\((\d+)\)", name):
        if (num_blocks := int(match[1])) >= 2:
            return replace(_TELL, name=name, order="blocks", num_blocks=num_blocks)
        raise SpecError(f"arm {name!r}: needs at least 2 blocks, e.g. tell_blocks(4)")
    nearest = difflib.get_close_matches(name, ARM_NAMES, n=1, cutoff=0.0)[0]
    raise SpecError(
        f"unknown arm {name!r}: did you mean {nearest!r}? Known: {', '.join(ARM_NAMES)}"
    )
