"""Controls with a known answer, at their acceptance numbers."""

import pytest

from tell_core.analysis.quanta.acceptance import CONTROLS, Check, chosen_controls, run_control
from tell_core.analysis.quanta.controls import planted_mixture
from tell_core.analysis.quanta.cost import compare_schemes, random_model, random_samples
from tell_core.errors import InputError

FAST = ["gradients", "cost", "mixture", "gaussian"]
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


def test_a_scheme_that_goes_backward_more_than_once_is_counted():
    model, samples = random_model(width=16, num_layers=1), random_samples(6)

    found = compare_schemes(model, samples, num_blocks=3)

    # Blocks of 2: three times the left one, and one to three times the right ones.
    assert found.recomputing_backwards == 2 * (3 + 3 + 2 + 1)
    assert found.once_backwards == 6
    assert found.cosine_error < 2


def test_all_controls_are_chosen_when_none_is_named():
    assert chosen_controls([]) == list(CONTROLS)


def test_chosen_controls_keep_the_order_of_the_table():
    assert chosen_controls(["random", "gradients"]) == ["gradients", "random"]


def test_an_unknown_control_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="gaussian"):
        chosen_controls(["gausian"])
