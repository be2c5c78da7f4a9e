"""How the damage of a whole plan follows from the sum of its items' damages.

Single damages add up while they are small. Below about 3.5 bits they compound, and near the entropy of the text
they saturate. What was measured so far decides: the model is a floor, which any change causes, and a line through
what the measured (sum, total) pairs have above it, on logarithmic scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

__all__ = ["DamageModel", "learned", "recalibrate"]

_NEAR = 0.1  # sums within this relative distance are one point, whose total is their geometric mean
_LEAST_SLOPE = 0.1  # between points: keeps the model invertible where noise turns the order of two totals
_SLOPE_BEYOND = (0.5, 1.5)  # past the last point: a trend is followed, but not far
_INTERACTION = 1.25  # damage of the whole over the sum of single ones: 0.8 (the tests' model) to 1.7 (SmolLM2-135M)
_NOISE = 0.005  # nats: twice what rounding inside the products of SmolLM2-135M was seen to cause
_APART = 1.5  # sums in this ratio tell a floor from a ratio


@dataclass(frozen=True)
class DamageModel:
    """Rising map from the sum of single damages to the damage of the whole, both in nats per token.

    Attributes
    ----------
    sums, totals : tuple of float
        Points of the map, both strictly rising; straight lines on logarithmic scales join them. Below the first
        point the ratio stays, above the last the trend goes on. No points: the identity; one: a ratio.
    floor : float
        Stands on top of the totals: any change, however small, makes rounding inside the products fall differently.
    """

    sums: tuple[float, ...] = ()
    totals: tuple[float, ...] = ()
    floor: float = 0.0

    def total(self, sums: float | np.ndarray) -> float | np.ndarray:
        """Damage expected of a plan whose single damages add up to `sums` (>= 0)."""
        return self.floor + self._map(_checked(sums), self.sums, self.totals, self._slope_beyond())

    def inverse(self, totals: float | np.ndarray) -> float | np.ndarray:
        """Sum of single damages at which a plan's damage is expected to be `totals` (>= 0)."""
        above = np.maximum(_checked(totals) - self.floor, 0)
        return self._map(above, self.totals, self.sums, 1 / self._slope_beyond())

    def _slope_beyond(self) -> float:
        if len(self.sums) < 2:
            return 1.0
        rise, run = np.log(self.totals[-1] / self.totals[-2]), np.log(self.sums[-1] / self.sums[-2])
        return float(np.clip(rise / run, *_SLOPE_BEYOND))

    @staticmethod
    def _map(x: np.ndarray, source: tuple[float, ...], target: tuple[float, ...], beyond: float) -> float | np.ndarray:
        if not source:
            return x if x.ndim else float(x)
        with np.errstate(divide="ignore"):
            log = np.log(x)
        first, last = np.log(source[0]), np.log(source[-1])
        y = np.interp(log, np.log(source), np.log(target))
        y = y + np.minimum(log - first, 0) + beyond * np.maximum(log - last, 0)
        return np.exp(y) if x.ndim else float(np.exp(y))


def _checked(values: float | np.ndarray) -> np.ndarray:
    x = np.asarray(values, np.float64)
    if np.isnan(x).any() or (x < 0).any():
        raise ValueError(f"damage: expected numbers of at least 0; got {values}")
    return x


def recalibrate(predicted: float | Sequence[float], real: float | Sequence[float]) -> DamageModel:
    """Fit the model to what was measured so far.

    Parameters
    ----------
    predicted : float or sequence of float
        Sums of single damages of the plans measured, nats per token.
    real : float or sequence of float
        Damage measured for each of them as a whole.

    Raises
    ------
    ValueError
        Different lengths, or a value that is not finite and above 0.

    Notes
    -----
    Neighbouring sums are averaged, then the totals are made to rise by isotonic regression (pool adjacent
    violators; Ayer et al. 1955) on logarithmic scales.
    """
    sums, totals = np.atleast_1d(np.asarray(predicted, float)), np.atleast_1d(np.asarray(real, float))
    if sums.shape != totals.shape or sums.ndim != 1:
        raise ValueError(f"real: expected as many values as predicted, {len(sums)}; got {len(totals)}")
    for name, values in (("predicted", sums), ("real", totals)):
        bad = values[~(np.isfinite(values) & (values > 0))]
        if len(bad):
            raise ValueError(f"{name}: expected finite damages above 0; got {bad[0]}")
    if not len(sums):
        return DamageModel()
    order = np.lexsort((totals, sums))
    x, y, weight = _averaged(np.log(sums[order]), np.log(totals[order]))
    y = _isotonic(y - _LEAST_SLOPE * x, weight) + _LEAST_SLOPE * x
    return DamageModel(tuple(np.exp(x).tolist()), tuple(np.exp(y).tolist()))


def learned(pairs: Sequence[tuple[float, float]]) -> DamageModel:
    """The model that measured plans give, floor and line.

    Parameters
    ----------
    pairs : (sum of single damages, measured damage of the whole), nats per token; what is not finite and above 0 is
        left out
    """
    known = sorted((sums, total) for sums, total in pairs if 0 < sums < np.inf and 0 < total < np.inf)
    if not known:
        return DamageModel()
    floor = _floor(known)
    return replace(recalibrate([sums for sums, _ in known], [total - floor for _, total in known]), floor=floor)


def _floor(pairs: Sequence[tuple[float, float]]) -> float:
    """Where the straight line through the two smallest sums meets 0; at least 0, and below every total.

    Of sums too near each other, or one alone: what a middling interaction of layers leaves unexplained, as far as noise
    can be that large.
    """
    sums, total = pairs[0]
    further = next((pair for pair in pairs if pair[0] >= _APART * sums), None)
    if further is None:
        floor = min(total - _INTERACTION * sums, _NOISE)
    else:
        slope = (further[1] - total) / (further[0] - sums)
        floor = total - max(slope, _SLOPE_BEYOND[0]) * sums
    least = min((found for _, found in pairs[1:]), default=np.inf)  # noise can turn the order of two totals
    return max(0.0, min(floor, 0.9 * least))


def _averaged(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean point of every run of rising x that starts within `_NEAR` of its first member, and the runs' sizes."""
    runs: list[list[int]] = []
    for place, value in enumerate(x):
        if runs and value - x[runs[-1][0]] <= np.log1p(_NEAR):
            runs[-1].append(place)
        else:
            runs.append([place])
    return (
        np.array([x[run].mean() for run in runs]),
        np.array([y[run].mean() for run in runs]),
        np.array([len(run) for run in runs], float),
    )


def _isotonic(y: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Nearest non-decreasing sequence in weighted least squares."""
    pools: list[tuple[float, float, int]] = []
    for value, mass in zip(y.tolist(), weight.tolist(), strict=True):
        pools.append((value, mass, 1))
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            (a, m, i), (b, n, j) = pools[-2:]
            pools[-2:] = [((a * m + b * n) / (m + n), m + n, i + j)]
    return np.repeat([value for value, _, _ in pools], [count for _, _, count in pools])
