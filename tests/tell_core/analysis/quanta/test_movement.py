import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from tell_core.analysis.directions import group_cosines
from tell_core.analysis.quanta.gradients import layer_shapes, linear_layers
from tell_core.analysis.quanta.movement import Movement, measure_movement, projected_change
from tell_core.analysis.quanta.projection import CountSketch, Exact
from tell_core.errors import AnalysisError
from tell_core.training.collation import collate
from tell_core.training.losses import supervised_nll

RATE = 1e-3


def moved(model: torch.nn.Module, scale: float, seed: int = 0) -> torch.nn.Module:
    """A copy whose linear layers have moved at random."""
    torch.manual_seed(seed)
    later = copy.deepcopy(model)
    with torch.no_grad():
        for layer in linear_layers(later).values():
            layer.weight += scale * torch.randn_like(layer.weight)
    return later


def after_a_step(model: torch.nn.Module, examples) -> torch.nn.Module:
    """A copy after one plain gradient step down the examples' mean loss."""
    later = copy.deepcopy(model)
    weights = [layer.weight for layer in linear_layers(later).values()]
    for weight in weights:
        weight.requires_grad_(True)
    batch = collate(examples, list(range(len(examples))), torch.device("cpu"))
    loss = supervised_nll(later, batch).sum() / len(examples)
    with torch.no_grad():
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=False):
            weight -= RATE * gradient
    return later


@pytest.mark.parametrize("name", ["exact", "countsketch"])
def test_a_gradient_step_goes_straight_down_the_loss_of_its_examples(barely_trained, name) -> None:
    model, examples, _ = barely_trained
    samples = examples.select(np.arange(12))
    later = after_a_step(model, samples)
    projection = Exact(layer_shapes(model)) if name == "exact" else CountSketch(1024)

    found = measure_movement({0: model, 1: later}.__getitem__, [0, 1], samples, projection)

    assert group_cosines(found, np.ones((1, 12))) == pytest.approx(1.0, abs=1e-3)


def test_to_first_order_the_loss_falls_by_what_the_movement_goes_along(barely_trained) -> None:
    model, examples, _ = barely_trained
    samples = examples.select(np.arange(12))
    later = moved(model, 1e-4)
    projection = Exact(layer_shapes(model))

    found = measure_movement(
        {0: model, 1: later, 2: later}.__getitem__, [0, 1, 2], samples, projection
    )

    length = np.linalg.norm(projected_change(model, later, projection))
    fall = found.losses[0] - found.losses[1]
    assert fall == pytest.approx(length * found.along[0], rel=0.1, abs=1e-4)


def test_weights_that_did_not_move_go_along_nothing(barely_trained) -> None:
    model, examples, _ = barely_trained

    found = measure_movement(lambda _: model, [0, 5], examples.select([0, 1]), CountSketch(64))

    assert (found.along == 0).all()


def test_a_change_is_projected_as_a_gradient_of_the_same_numbers(barely_trained) -> None:
    model, _, _ = barely_trained
    later = moved(model, 1.0)
    layers, after = linear_layers(model), linear_layers(later)

    exact = projected_change(model, later, Exact(layer_shapes(model)))

    expected = [(after[name].weight - layer.weight).flatten() for name, layer in layers.items()]
    assert exact == pytest.approx(torch.cat(expected).detach().numpy())


def test_a_movement_reads_back_as_it_was_written(barely_trained, tmp_path: Path) -> None:
    model, examples, _ = barely_trained
    found = measure_movement(
        {0: model, 3: moved(model, 0.01)}.__getitem__,
        [0, 3],
        examples.select([0, 1, 2]),
        CountSketch(64),
    )

    found.save(tmp_path / "movement.npz")

    again = Movement.load(tmp_path / "movement.npz")
    assert again.steps.tolist() == [0, 3]
    assert again.gram == pytest.approx(found.gram)
    assert again.along == pytest.approx(found.along)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "movement.npz"
    path.write_bytes(b"no arrays")

    with pytest.raises(AnalysisError, match=r"movement\.npz"):
        Movement.load(path)
