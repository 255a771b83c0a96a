import numpy as np
import pytest

from tell_core.analysis import controls
from tell_core.analysis.parity import LOG_2, ParityRun, ParitySetting
from tell_core.analysis.power_law import zipf_frequencies


def ideal_run(beta: float, sharpness: float = 4.0) -> ParityRun:
    """A training whose subtasks are learned exactly at 40 times relative frequency ** -beta."""
    setting = ParitySetting()
    frequencies = zipf_frequencies(setting.num_subtasks, setting.alpha)
    times = 40 * (frequencies / frequencies[0]) ** -beta
    steps = np.unique(np.geomspace(1, 6000, 80).round()).astype(np.int64)
    losses = LOG_2 / (1 + (steps[:, None] / times) ** sharpness)
    return ParityRun(setting, frequencies, steps, losses)


@pytest.mark.parametrize("beta", [0.7, 0.9, 1.05])
def test_the_findings_of_an_ideal_training_are_its_own_parameters(beta: float) -> None:
    found = controls.parity_findings(ideal_run(beta))

    assert found.beta == pytest.approx(beta, abs=0.03)
    assert found.rank_correlation > 0.99
    assert found.predicted_slope == pytest.approx(found.slope, abs=0.02)


def test_the_sum_over_finitely_many_quanta_is_steeper_than_its_limit() -> None:
    found = controls.parity_findings(ideal_run(0.9))

    assert found.slope < found.asymptotic_slope - 0.07


@pytest.mark.parametrize("control", [controls.model_selection, controls.power_law, controls.probe])
def test_a_control_of_the_fits_is_accepted(control) -> None:
    assert [check for check in control() if not check.passed] == []
