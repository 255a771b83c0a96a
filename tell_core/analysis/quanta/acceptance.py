"""Acceptance of the mechanism's analysis: experiments whose answer is known beforehand.

Each control plants an answer (or the lack of one), runs the analysis on it and compares. Controls
are named here as ``module:function`` so that listing them loads nothing; a control is a function
without arguments that returns a list of `Check`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import NamedTuple

from tell_core.errors import InputError


class Check(NamedTuple):
    """One line of the acceptance table.

    Attributes:
        name: What was checked.
        accept: What is asked for, in words and numbers.
        value: What was measured.
        passed: Whether it is accepted.
        seconds: CPU seconds that it took.
    """

    name: str
    accept: str
    value: str
    passed: bool
    seconds: float


CONTROLS: Mapping[str, str] = MappingProxyType(
    {
        "gradients": "tell_core.analysis.quanta.controls:check_gradients",
        "projection": "tell_core.analysis.quanta.controls:check_projection",
        "cost": "tell_core.analysis.quanta.cost:check_cost",
        "mixture": "tell_core.analysis.quanta.controls:check_planted_mixture",
        "random": "tell_core.analysis.quanta.controls:check_random_vectors",
        "gaussian": "tell_core.analysis.quanta.controls:check_gaussian_subtasks",
        "language-model": "tell_core.analysis.quanta.controls:check_language_model",
        "sparse-parity-gradients": "tell_core.analysis.quanta.controls:check_sparse_parity",
        "sparse-parity": "tell_core.analysis.controls:parity",
        "power-law": "tell_core.analysis.controls:power_law",
        "model-selection": "tell_core.analysis.controls:model_selection",
        "probe": "tell_core.analysis.controls:probe",
    }
)
"""Control -> ``module:function``, in the order of the table."""


def measured(name: str, accept: str, measure: Callable[[], tuple[str, bool]]) -> Check:
    """Run one check and time it.

    Args:
        name: What is checked.
        accept: What is asked for.
        measure: Returns what was measured, in words and numbers, and whether it is accepted.
    """
    started = time.process_time()
    value, passed = measure()
    return Check(name, accept, value, passed, time.process_time() - started)


def chosen_controls(names: Sequence[str]) -> list[str]:
    """The named controls in the order of the table; all of them when none is named.

    Raises:
        InputError: There is no control of that name.
    """
    unknown = sorted(set(names) - set(CONTROLS))
    if unknown:
        raise InputError(
            f"no control is named {', '.join(map(repr, unknown))}; there are {', '.join(CONTROLS)}"
        )
    return [name for name in CONTROLS if not names or name in names]


def run_control(name: str) -> list[Check]:
    """Run one control of `CONTROLS`."""
    module, function = CONTROLS[name].split(":")
    checks: list[Check] = getattr(import_module(module), function)()
    return checks
