"""Random projections of per-sample gradients, streamed layer by layer.

A linear layer's gradient for one sample is ``sum over t of delta_t input_t^T``. Every projection
here adds up, over the layers, a random linear map of that matrix, so that S samples need S x d
numbers however many weights the model has, and inner products are kept in expectation. Equal seeds
give equal maps on every machine; a layer's map depends on its name, not on the order of calls.

The root mean square error of a cosine is about ``1 / sqrt(d)`` for `CountSketch` and `Rademacher`,
and somewhat larger for `Kronecker`, which never forms the gradient.

Shape letters: B samples, T positions, O outputs, I inputs of a layer, D projected dimensions.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
import torch

from tell_core.data.seeding import seeded_generator
from tell_core.errors import InputError

ProjectionName = Literal["countsketch", "rademacher", "kronecker", "exact"]
PROJECTIONS: tuple[ProjectionName, ...] = ("countsketch", "rademacher", "kronecker")
"""Those that keep fewer numbers than there are weights."""
# Side of a sketch of `Kronecker`.
MAX_SIDE = 16
# Signs drawn at once by `Rademacher`, in numbers: 64 MB of float32.
_BLOCK_NUMBERS = 1 << 24


class Projection(Protocol):
    """A random linear map of a model's gradient, given layer by layer."""

    num_dimensions: int

    def add(
        self,
        layer: str,
        delta_BTO: torch.Tensor,
        input_BTI: torch.Tensor,
        out_BD: torch.Tensor,
    ) -> None:
        """Add one layer's projected gradients to ``out_BD``.

        Args:
            layer: Name of the layer; it fixes the layer's part of the map.
            delta_BTO: float32. Gradient of each sample's loss by the layer's output.
            input_BTI: float32. The layer's input.
            out_BD: float32. Sum over the layers so far; changed in place.
        """
        ...


def build_projection(
    name: ProjectionName,
    num_dimensions: int,
    seed: int = 0,
    layers: Mapping[str, tuple[int, int]] | None = None,
) -> Projection:
    """The projection of that name.

    Args:
        name: ``exact`` keeps every number: for small models and as the yardstick.
        num_dimensions: D; not read by ``exact``.
        seed: Seed of the map.
        layers: Layer -> (outputs, inputs); needed by ``exact`` only.

    Raises:
        InputError: An unknown name, or fewer than two dimensions.
    """
    if name == "exact":
        return Exact(layers or {})
    if num_dimensions < 2:
        raise InputError(f"{num_dimensions} dimensions were asked for; needed: at least 2")
    kinds: dict[str, Callable[[int, int], Projection]] = {
        "countsketch": CountSketch,
        "rademacher": Rademacher,
        "kronecker": Kronecker,
    }
    if name not in kinds:
        raise InputError(f"no projection is named {name!r}; there are exact, {', '.join(kinds)}")
    return kinds[name](num_dimensions, seed)


class Exact:
    """The gradients themselves, one layer after the other."""

    def __init__(self, layers: Mapping[str, tuple[int, int]]) -> None:
        """Lay out the layers, given as name -> (outputs, inputs)."""
        sizes = [outputs * inputs for outputs, inputs in layers.values()]
        starts = np.cumsum([0, *sizes]).tolist()
        self._places = {
            name: slice(start, start + size)
            for name, start, size in zip(layers, starts, sizes, strict=False)
        }
        self.num_dimensions = int(starts[-1])

    def add(
        self,
        layer: str,
        delta_BTO: torch.Tensor,
        input_BTI: torch.Tensor,
        out_BD: torch.Tensor,
    ) -> None:
        """Put the layer's gradients into their place."""
        out_BD[:, self._places[layer]] += _gradient(delta_BTO, input_BTI).flatten(1)


class _Sketch(ABC):
    """A random map to D numbers.

    Attributes:
        num_dimensions: D.
    """

    def __init__(self, num_dimensions: int, seed: int = 0) -> None:
        """Map to ``num_dimensions`` numbers, at least 2."""
        self.num_dimensions = num_dimensions
        self._seed = seed

    def add(
        self,
        layer: str,
        delta_BTO: torch.Tensor,
        input_BTI: torch.Tensor,
        out_BD: torch.Tensor,
    ) -> None:
        """Add one layer's projected gradients to ``out_BD``; see `Projection`."""
        projected_BP = self._projected(layer, delta_BTO, input_BTI)
        out_BD[:, : projected_BP.shape[1]] += projected_BP

    @abstractmethod
    def _projected(
        self, layer: str, delta_BTO: torch.Tensor, input_BTI: torch.Tensor
    ) -> torch.Tensor:
        """One layer's projected gradients, shape (B, D) or fewer numbers, the others being 0."""


class CountSketch(_Sketch):
    """Every weight's gradient is added, with a random sign, to one of D buckets.

    The bucket of weight (o, i) is ``shift[o] + place[i] mod D`` with random shifts and a random
    permutation as places, and its sign a product of a row's and a column's. Two weights then share
    a bucket with probability 1 / D at most, as with a hash per weight, but a map costs O + I
    numbers to keep and one contiguous addition per row to apply. A layer is laid out with its
    smaller side as rows.
    """

    def _projected(
        self, layer: str, delta_BTO: torch.Tensor, input_BTI: torch.Tensor
    ) -> torch.Tensor:
        """Form the layer's gradients, then add their rows at their shifts."""
        left, right = delta_BTO, input_BTI
        if left.shape[-1] > right.shape[-1]:
            left, right = right, left
        hashing = _hashing(layer, left.shape[-1], right.shape[-1], self.num_dimensions, self._seed)
        device = left.device
        left = left * hashing.row_signs.to(device)
        right = (right * hashing.column_signs.to(device))[..., hashing.places.to(device)]
        rows_BRC = self._folded(_gradient(left, right))
        width = rows_BRC.shape[-1]
        wide_BD = left.new_zeros(len(left), self.num_dimensions + width)
        for row_BC, shift in zip(rows_BRC.unbind(1), hashing.shifts, strict=True):
            wide_BD[:, shift : shift + width] += row_BC
        wide_BD[:, :width] += wide_BD[:, self.num_dimensions :]
        return wide_BD[:, : self.num_dimensions]

    def _folded(self, rows_BRC: torch.Tensor) -> torch.Tensor:
        """Rows longer than D, wrapped around to D."""
        num_columns = rows_BRC.shape[-1]
        if num_columns <= self.num_dimensions:
            return rows_BRC
        num_turns = math.ceil(num_columns / self.num_dimensions)
        missing = num_turns * self.num_dimensions - num_columns
        padded = torch.nn.functional.pad(rows_BRC, (0, missing))
        return padded.reshape(*rows_BRC.shape[:-1], num_turns, self.num_dimensions).sum(-2)


class Rademacher(_Sketch):
    """A dense random map of signs over ``sqrt(D)``: the textbook projection, and the slowest."""

    def _projected(
        self, layer: str, delta_BTO: torch.Tensor, input_BTI: torch.Tensor
    ) -> torch.Tensor:
        """Multiply the layer's gradients by signs that are drawn again for every call."""
        gradient_BP = _gradient(delta_BTO, input_BTI).flatten(1)
        # torch's generator reads no more than 32 bits of a seed: they have to depend on both.
        drawn = seeded_generator(_layer_seed(layer, self._seed), "rademacher").integers(1 << 32)
        generator = torch.Generator().manual_seed(int(drawn))
        block = max(1, _BLOCK_NUMBERS // self.num_dimensions)
        scale = 1 / math.sqrt(self.num_dimensions)
        projected_BD = gradient_BP.new_zeros(len(gradient_BP), self.num_dimensions)
        for start in range(0, gradient_BP.shape[1], block):
            piece_BP = gradient_BP[:, start : start + block]
            signs_PD = torch.empty(piece_BP.shape[1], self.num_dimensions)
            signs_PD.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
            projected_BD.addmm_(piece_BP, signs_PD.to(piece_BP.device), alpha=scale)
        return projected_BD


class Kronecker(_Sketch):
    """Signs on both sides of each layer's gradient, several times over.

    One sketch maps outputs to k numbers, inputs to k numbers, and keeps their k x k products; the
    gradient is never formed, so this is the cheapest. Between two gradients ``u v^T`` whose sides
    have cosines a and b, the cosine of one sketch has a squared error of about
    ``(a^2 (1 + b^2) + b^2 (1 + a^2)) / k + (1 + a^2) (1 + b^2) / k^2``. With ``k^2 = D`` that is
    ``1 + k (a^2 + b^2)`` over D, ever more above ``1 / D`` as D grows. Here as many sketches as fit
    stand side by side, k being at most `MAX_SIDE`; their errors average out, and how far they are
    above ``1 / D`` depends on the sides' cosines, but on D no longer.
    """

    def __init__(self, num_dimensions: int, seed: int = 0) -> None:
        """Map to ``num_dimensions`` numbers, at least 2; those left over stay 0."""
        super().__init__(num_dimensions, seed)
        self._side = min(math.isqrt(num_dimensions), MAX_SIDE)
        self._num_sketches = num_dimensions // self._side**2

    def _projected(
        self, layer: str, delta_BTO: torch.Tensor, input_BTI: torch.Tensor
    ) -> torch.Tensor:
        """Project both sides, then multiply what is left."""
        left, right = (
            self._sketched(states, f"{layer} {side}")
            for states, side in ((delta_BTO, "outputs"), (input_BTI, "inputs"))
        )
        return (left @ right.transpose(-1, -2)).flatten(1) / math.sqrt(self._num_sketches)

    def _sketched(self, states_BTN: torch.Tensor, name: str) -> torch.Tensor:
        """Shape (B, sketches, k, T)."""
        size = (states_BTN.shape[-1], self._num_sketches * self._side)
        signs = _signs(name, *size, self._seed).to(states_BTN.device) / math.sqrt(self._side)
        sketched_BTM = states_BTN @ signs
        split = sketched_BTM.view(*sketched_BTM.shape[:2], self._num_sketches, self._side)
        return split.movedim(1, -1)


class _Hashing:
    """Where `CountSketch` puts a layer's weights, R rows and C columns.

    Attributes:
        row_signs: Shape (R,).
        column_signs: Shape (C,).
        places: Shape (C,). Which column stands at each place.
        shifts: R integers below the number of buckets.
    """

    def __init__(
        self, generator: np.random.Generator, num_rows: int, num_columns: int, num_buckets: int
    ) -> None:
        signs = generator.integers(0, 2, num_rows + num_columns).astype(np.float32) * 2 - 1
        self.row_signs = torch.from_numpy(signs[:num_rows])
        self.column_signs = torch.from_numpy(signs[num_rows:])
        self.places = torch.from_numpy(generator.permutation(num_columns))
        self.shifts: list[int] = generator.integers(0, num_buckets, num_rows).tolist()


@lru_cache(maxsize=4096)
def _hashing(layer: str, num_rows: int, num_columns: int, num_buckets: int, seed: int) -> _Hashing:
    generator = seeded_generator(_layer_seed(layer, seed), "countsketch")
    return _Hashing(generator, num_rows, num_columns, num_buckets)


@lru_cache(maxsize=4096)
def _signs(name: str, size: int, count: int, seed: int) -> torch.Tensor:
    """Shape (size, count), entries plus or minus 1."""
    generator = seeded_generator(_layer_seed(name, seed), "kronecker")
    return torch.from_numpy(generator.integers(0, 2, (size, count)).astype(np.float32) * 2 - 1)


def _gradient(delta_BTO: torch.Tensor, input_BTI: torch.Tensor) -> torch.Tensor:
    """Shape (B, O, I): each sample's gradient by the layer's weight."""
    return torch.bmm(delta_BTO.transpose(1, 2), input_BTI)


def _layer_seed(layer: str, seed: int) -> int:
    return seed << 32 | zlib.crc32(layer.encode())
