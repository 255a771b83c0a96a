"""Projections: linear, unbiased, as good as their dimensions allow."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tell_core.analysis.quanta.projection import CountSketch, Exact, build_projection
from tell_core.errors import InputError

NAMES = ["countsketch", "rademacher", "kronecker"]
LAYERS = {"wide": (5, 40), "tall": (30, 7), "square": (16, 16)}


def draw_layers(seed: int, num_samples: int = 6, num_positions: int = 3):
    """Layer -> gradients by outputs and inputs."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tuple(
            torch.randn(num_samples, num_positions, size, generator=generator) for size in shape
        )
        for name, shape in LAYERS.items()
    }


def project(projection, layers) -> np.ndarray:
    first = next(iter(layers.values()))[0]
    out = torch.zeros(len(first), projection.num_dimensions)
    for name, (delta, given_input) in layers.items():
        projection.add(name, delta, given_input, out)
    return out.numpy()


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31), name=st.sampled_from(NAMES), size=st.integers(2, 70))
def test_a_projection_is_linear(seed: int, name: str, size: int):
    projection = build_projection(name, size, seed=seed)
    layers = draw_layers(seed)
    doubled = {layer: (2 * delta, given_input) for layer, (delta, given_input) in layers.items()}

    np.testing.assert_allclose(
        project(projection, doubled), 2 * project(projection, layers), rtol=1e-4, atol=1e-3
    )


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31), name=st.sampled_from(NAMES))
def test_the_order_of_layers_does_not_matter(seed: int, name: str):
    projection = build_projection(name, 32, seed=3)
    layers = draw_layers(seed)

    backwards = project(projection, dict(reversed(layers.items())))

    np.testing.assert_allclose(backwards, project(projection, layers), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_inner_products_are_kept_in_expectation(name: str):
    layers = draw_layers(0)
    exact = project(Exact(LAYERS), layers)
    truth = exact @ exact.T

    drawn = [project(build_projection(name, 16, seed), layers) for seed in range(800)]
    mean = np.mean([vectors @ vectors.T for vectors in drawn], axis=0)

    scale = np.sqrt(np.outer(np.diag(truth), np.diag(truth)))
    assert np.abs((mean - truth) / scale).max() < 0.06


@pytest.mark.parametrize("size", [8, 64, 512])
def test_countsketch_errs_by_no_more_than_its_dimensions_allow(size: int):
    layers = draw_layers(1, num_samples=20)
    exact = project(Exact(LAYERS), layers)
    pairs = np.triu_indices(len(exact), 1)

    def cosines(vectors: np.ndarray) -> np.ndarray:
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return (unit @ unit.T)[pairs]

    errors = [
        cosines(project(CountSketch(size, seed), layers)) - cosines(exact) for seed in range(20)
    ]

    assert np.sqrt(np.mean(np.square(errors)) * size) <= 1.2


def one_sided(cosine: float, size: int, generator: np.random.Generator) -> np.ndarray:
    """Two unit vectors of random signs with that cosine, shape (2, size)."""
    signs = generator.choice([-1.0, 1.0], (2, size))
    num_equal = round((1 + cosine) / 2 * size)
    signs[1, :num_equal] = signs[0, :num_equal]
    signs[1, num_equal:] = -signs[0, num_equal:]
    return signs / np.sqrt(size)


@pytest.mark.parametrize(("size", "side"), [(64, 8), (256, 16), (1024, 16), (4096, 16)])
def test_kronecker_errs_as_the_cosines_of_its_sides_say_and_no_more_with_more_dimensions(
    size: int, side: int
):
    a, b = 0.5, 0.25
    generator = np.random.default_rng(0)
    u, v = one_sided(a, 200, generator), one_sided(b, 120, generator)
    layers = {"layer": tuple(torch.tensor(part, dtype=torch.float32)[:, None] for part in (u, v))}

    found = [project(build_projection("kronecker", size, seed), layers) for seed in range(400)]

    errors = [float(vectors[0] @ vectors[1]) - a * b for vectors in found]
    interaction = side * (a**2 * (1 + b**2) + b**2 * (1 + a**2))
    expected = (1 + a**2) * (1 + b**2) + interaction
    assert np.mean(np.square(errors)) * size == pytest.approx(expected, rel=0.25)


def test_countsketch_puts_every_weight_into_one_bucket():
    out = torch.zeros(1, 8)
    delta, given_input = torch.zeros(1, 1, 30), torch.zeros(1, 1, 7)
    delta[0, 0, 11], given_input[0, 0, 3] = 2.0, 3.0

    CountSketch(8).add("layer", delta, given_input, out)

    assert sorted(out.abs().flatten().tolist()) == [0.0] * 7 + [6.0]


def test_exact_lays_layers_one_after_another():
    layers = draw_layers(2, num_samples=1)

    found = project(Exact(LAYERS), layers)[0]

    expected = [
        (delta[0].T @ given_input[0]).flatten().numpy() for delta, given_input in layers.values()
    ]
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-5, atol=1e-5)


def test_an_unknown_projection_is_refused():
    with pytest.raises(InputError, match="countsketch"):
        build_projection("countskech", 64)


def test_one_dimension_is_refused():
    with pytest.raises(InputError, match="at least 2"):
        build_projection("countsketch", 1)
