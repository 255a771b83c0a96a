"""Controls with a known answer, at their acceptance numbers."""

import pytest

from tell_core.analysis.quanta.acceptance import CONTROLS, Check, chosen_controls, run_control
from tell_core.analysis.quanta.controls import planted_mixture
from tell_core.errors import InputError

FAST = ["gradients", "mixture", "gaussian"]
SLOW = ["projection", "random", "language-model", "sparse-parity-gradients"]


def missed(checks: list[Check]) -> list[Check]:
    return [check for check in checks if not check.passed]


@pytest.mark.parametrize("name", FAST)
def test_a_control_is_met(name: str):
    assert missed(run_control(name)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_slow_control_is_met(name: str):
    assert missed(run_control(name)) == []


def test_a_control_can_be_missed(monkeypatch):
    def too_noisy(*arguments, noise, **options):
        return planted_mixture(*arguments, noise=8.0, **options)

    monkeypatch.setattr("tell_core.analysis.quanta.controls.planted_mixture", too_noisy)

    assert missed(run_control("mixture"))


def test_all_controls_are_chosen_when_none_is_named():
    assert chosen_controls([]) == list(CONTROLS)


def test_chosen_controls_keep_the_order_of_the_table():
    assert chosen_controls(["random", "gradients"]) == ["gradients", "random"]


def test_an_unknown_control_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="gaussian"):
        chosen_controls(["gausian"])
