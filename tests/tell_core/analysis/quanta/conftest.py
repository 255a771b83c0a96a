"""A tiny language model that has learned something, trained once."""

import numpy as np
import pytest
import torch
from torch import nn

from tell_core.analysis.quanta.controls import planted_language_model
from tell_core.data.encoding import EncodedExamples


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def barely_trained() -> tuple[nn.Module, EncodedExamples, np.ndarray]:
    """Model, examples of one supervised token each, and their groups; leave the model as it is."""
    return planted_language_model(num_steps=20)
