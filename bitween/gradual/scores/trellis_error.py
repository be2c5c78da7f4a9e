"""The squared error that trellis codes leave, predicted from a table that is measured once a process.

A row's weights, divided by their deviation, are near normal, and a path through the trellis leaves each of them an
error that depends on the rate and on how far out the weight lies: near the middle values are dense, beyond the largest
one there are none. The table holds the mean squared error by that distance, from the core's own search on normal
numbers, so that it can't differ from what the search does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

import bitween
from bitween import _core
from bitween.scheme import TILE, Scheme

__all__ = ["ErrorTable", "error_table", "trellis_errors"]

_ROWS, _COLS, _SEED = 64, 1024, 20261129  # of the normal numbers: enough for a percent
_EDGES = np.arange(0, 3.25, 0.25)  # of the distances from 0, in deviations of the row; the last bin is open
_LARGEST = 510 / 128  # value of a state, in steps of the scale


@dataclass(frozen=True, eq=False)
class ErrorTable:
    """Mean squared error of a weight by its distance from 0, both for rows of deviation 1.

    Attributes
    ----------
    distances, errors : float64 (bins,), means over each bin
    reach : the largest value that the row's scale can express
    mean : over all weights
    """

    distances: np.ndarray
    errors: np.ndarray
    reach: float
    mean: float

    def __call__(self, distances: np.ndarray) -> np.ndarray:
        """Squared errors expected at these distances (>= 0), same shape."""
        return np.interp(distances, self.distances, self.errors) + np.maximum(distances - self.reach, 0) ** 2


@lru_cache(maxsize=32)
def error_table(rate: int, width: int) -> ErrorTable:
    """The table of codes of `rate` bits and states of `width` bits; a tenth of a second at 12 bits."""
    normal = np.random.default_rng(_SEED).standard_normal((_ROWS, _COLS)).astype(np.float32)
    stored = bitween.quantize(normal, Scheme.trellis(rate, width), method="trellis")
    errors = (normal.astype(np.float64) - stored.dequantize()) ** 2
    far = np.abs(normal.astype(np.float64))
    bins = np.digitize(far, _EDGES) - 1
    n = np.bincount(bins.ravel(), minlength=len(_EDGES))
    by_bin = [np.bincount(bins.ravel(), values.ravel(), len(_EDGES)) / n for values in (far, errors)]
    reach = _LARGEST * float(np.asarray(stored.scales, np.float64).mean())
    return ErrorTable(*by_bin, reach, float(errors.mean()))


def trellis_errors(weight: np.ndarray, schemes: Sequence[Scheme], columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """sum_o rows_o sum_j columns_j E_oj^2 for each trellis scheme, float64 (schemes,).

    Parameters
    ----------
    weight : float (rows, cols)
    schemes : made by `Scheme.trellis`
    columns : float (cols,), or (rows, cols) for costs of single weights
    rows : float (rows,)
    """
    weight = np.asarray(weight, np.float64)
    deviation = np.sqrt((weight**2).mean(1, keepdims=True))
    far = np.abs(weight) / np.where(deviation > 0, deviation, 1)
    costs = np.broadcast_to(columns, weight.shape) * (rows[:, None] * deviation**2)
    starts = np.arange(0, weight.shape[1], TILE)
    needs = np.add.reduceat(np.atleast_2d(columns).sum(0, dtype=np.float64), starts)

    @cache
    def by_tile(rate: int, width: int) -> np.ndarray:
        return np.add.reduceat((costs * error_table(rate, width)(far)).sum(0), starts)

    found = []
    for scheme in schemes:
        rates = _core.trellis_rates(needs, float(scheme.bits), scheme.turned)
        found.append(sum(float(by_tile(rate, scheme.width)[rates == rate].sum()) for rate in set(rates.tolist())))
    return np.array(found)
