import os
from pathlib import Path

import pytest
import torch

from tell_core import cost
from tell_core.spec.model import ExperimentSpec
from tell_core.training.devices import Precision
from tests.fixtures.tiny import tiny_fields


def measuring_process(*_: object) -> float:
    return float(os.getpid())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpu_is_measured_by_a_process_that_ends_with_it(
    tiny_world: Path, monkeypatch: pytest.MonkeyPatch, device: str
):
    spec = ExperimentSpec.model_validate(tiny_fields(tiny_world))
    monkeypatch.setattr(cost, "resolve_device", lambda _: torch.device(device))
    monkeypatch.setattr(cost, "resolve_precision", lambda *_: Precision(torch.float32, None))
    monkeypatch.setattr(cost, "_product_flops", measuring_process)

    measured_by = cost._matrix_flops(spec)

    assert (measured_by == os.getpid()) == (device == "cpu")
