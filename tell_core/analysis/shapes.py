"""Shapes of a curve over time, fitted to many curves at once, and their AICc.

Every shape is ``offset + amplitude * basis(t)`` with a basis of none to two parameters of its own.
Offset and amplitude are linear: given the basis, the residual sum of squares is that of the
centred curve minus the square of its projection on the centred, normalised basis (variable
projection). The parameters of the basis are searched on a grid common to all curves, then on
finer ones around the best place of each curve.

A positive amplitude is a fall: every basis falls with t. Where the sign of the best amplitude is
not the one asked for, the amplitude is 0 and the fit is the constant.

Shape letters: N curves, P points, M candidates, Q parameters of the basis.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from tell_core.analysis.resampling import FloatArray

Direction = Literal["down", "up"]
Basis = Callable[[FloatArray, FloatArray], FloatArray]

SIGMOID_WIDTH = float(2 * np.log(9))  # from 90 % to 10 % of a logistic curve of slope 1
# Losses are not told apart below a thousandth of a nat: that is rounding, not learning.
MIN_NOISE = 1e-3
_DECAY_RANGE = (0.02, 5.0)
_NUM_DECAYS, _NUM_MIDPOINTS, _NUM_SHARPNESSES = 64, 64, 16
_NUM_REFINEMENTS = 6


class Fit(NamedTuple):
    """The best candidate for each curve.

    Attributes:
        residual_sum: Shape (N,). Residual sum of squares.
        parameters: Shape (N, Q). Parameters of the basis.
    """

    residual_sum: FloatArray
    parameters: FloatArray


def fit_constant(curves: FloatArray) -> Fit:
    """No change."""
    return Fit((_centred(curves) ** 2).sum(axis=-1), np.empty((len(curves), 0)))


def fit_line(time: FloatArray, curves: FloatArray, direction: Direction) -> Fit:
    """A straight line."""
    residual_sum, _ = _best_of(-time[None, :], curves, direction)
    return Fit(residual_sum, np.empty((len(curves), 0)))


def fit_decay(time: FloatArray, curves: FloatArray, direction: Direction) -> Fit:
    """``exp(-c t)``; with t = log(step + 1) a power law with offset in step + 1. Parameter: c."""
    grid = np.log(np.geomspace(*_DECAY_RANGE, _NUM_DECAYS))
    fit = _search(_decay, time, curves, [grid], direction)
    return Fit(fit.residual_sum, np.exp(fit.parameters))


def fit_sigmoid(
    time: FloatArray, curves: FloatArray, direction: Direction, max_width: float
) -> Fit:
    """``1 / (1 + exp(s (t - m)))``. Parameters: middle m and sharpness s.

    Args:
        time: Shape (P,), never falling; at least four different values.
        curves: Shape (N, P).
        direction: Whether curves fall or rise.
        max_width: Longest 90-10 % fall, as a share of the range of ``time``. The middle lies
            between the second and the last but one point; the sharpness is at most one at which
            the fall takes half the median distance of points, beyond which nothing changes.
    """
    levels = np.unique(time)  # several curves of one item share their times
    middles = np.linspace(levels[1], levels[-2], _NUM_MIDPOINTS)
    blunt = SIGMOID_WIDTH / (max_width * (levels[-1] - levels[0]))
    sharp = max(2 * SIGMOID_WIDTH / float(np.median(np.diff(levels))), 2 * blunt)
    sharpnesses = np.log(np.geomspace(blunt, sharp, _NUM_SHARPNESSES))
    fit = _search(_sigmoid, time, curves, [middles, sharpnesses], direction)
    middle, log_sharpness = fit.parameters.T
    return Fit(fit.residual_sum, np.stack([middle, np.exp(log_sharpness)], axis=1))


def sigmoid_values(time: FloatArray, curves: FloatArray, fit: Fit) -> FloatArray:
    """The fitted sigmoids of curves (N, P) at their times (P,), shape (N, P)."""
    middle, sharpness = fit.parameters[:, :1], fit.parameters[:, 1:]
    basis = _centred(_sigmoid(time, np.concatenate([middle, np.log(sharpness)], axis=1)))
    length = (basis**2).sum(axis=1, keepdims=True)
    share = (_centred(curves) * basis).sum(axis=1, keepdims=True) / np.where(length > 0, length, 1)
    return np.asarray(curves.mean(axis=1, keepdims=True) + share * basis)


def fit_parabola(time: FloatArray, curves: FloatArray) -> Fit:
    """A parabola with its lowest or highest point inside the range; else the constant.

    No parameters are returned.
    """
    design = np.stack([np.ones_like(time), time, time**2], axis=1)
    coefficients, *_ = np.linalg.lstsq(design, curves.T, rcond=None)
    residual_sum = ((curves.T - design @ coefficients) ** 2).sum(axis=0)
    _, slope, bend = coefficients
    with np.errstate(divide="ignore", invalid="ignore"):
        turn = -slope / (2 * bend)
    levels = np.unique(time)
    is_inside = (turn > levels[1]) & (turn < levels[-2])
    constant = fit_constant(curves).residual_sum
    return Fit(np.where(is_inside, residual_sum, constant), np.empty((len(curves), 0)))


def aicc(fit: Fit, num_points: int, num_parameters: int) -> FloatArray:
    """AICc of least-squares fits, shape (N,); the noise is one of the parameters."""
    variance = np.maximum(fit.residual_sum / num_points, MIN_NOISE**2)
    correction = num_parameters * (num_parameters + 1) / (num_points - num_parameters - 1)
    return np.asarray(num_points * np.log(variance) + 2 * (num_parameters + correction))


def _decay(time: FloatArray, parameters: FloatArray) -> FloatArray:
    return np.exp(-np.exp(parameters[..., :1]) * time)


def _sigmoid(time: FloatArray, parameters: FloatArray) -> FloatArray:
    middle, sharpness = parameters[..., :1], np.exp(parameters[..., 1:])
    return np.asarray(1 / (1 + np.exp(np.clip(sharpness * (time - middle), -50, 50))))


def _search(
    basis: Basis,
    time: FloatArray,
    curves: FloatArray,
    axes: Sequence[FloatArray],
    direction: Direction,
) -> Fit:
    """Search a grid, then three places per axis around each curve's best, ever closer."""
    grid = np.stack([axis.ravel() for axis in np.meshgrid(*axes)], axis=1)
    residual_sum, place = _best_of(basis(time, grid), curves, direction)
    fit = Fit(residual_sum, grid[place])
    lowest, highest = grid.min(axis=0), grid.max(axis=0)
    spacing = np.array([axis[1] - axis[0] for axis in axes])
    offsets = np.stack(np.meshgrid(*([[-1.0, 0.0, 1.0]] * len(axes))), axis=-1)
    directions = offsets.reshape(-1, len(axes))
    for level in range(1, _NUM_REFINEMENTS + 1):
        moves = directions * spacing / 2**level
        near = np.clip(fit.parameters[:, None, :] + moves, lowest, highest)
        residual_sum, place = _best_of(basis(time, near), curves, direction)
        fit = Fit(residual_sum, near[np.arange(len(near)), place])
    return fit


def _best_of(
    bases: FloatArray, curves: FloatArray, direction: Direction
) -> tuple[FloatArray, FloatArray]:
    """Lowest residual sum of squares over candidates, and which it was.

    Args:
        bases: Shape (M, P), or (N, M, P) when every curve has its own.
        curves: Shape (N, P).
        direction: Sign of the amplitude.

    Returns:
        Residual sums (N,) and indices (N,).
    """
    centred, candidates = _centred(curves), _centred(bases)
    length = np.sqrt((candidates**2).sum(axis=-1))
    candidates = candidates / np.where(length > 0, length, 1.0)[..., None]
    pattern = "np,mp->nm" if bases.ndim == 2 else "np,nmp->nm"
    projection = np.einsum(pattern, centred, candidates, optimize=True)
    fall = np.maximum(projection if direction == "down" else -projection, 0.0)
    place = fall.argmax(axis=1)
    explained = fall[np.arange(len(fall)), place] ** 2
    return np.maximum((centred**2).sum(axis=1) - explained, 0.0), place


def _centred(values: FloatArray) -> FloatArray:
    return np.asarray(values - values.mean(axis=-1, keepdims=True))
