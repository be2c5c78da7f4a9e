"""Looking several times at growing data without raising the error rate of the whole (group-sequential tests)."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.special import ndtr, ndtri

__all__ = ["SPENDING", "error_levels"]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)
_FAR = 9.0  # standard deviations beyond which a normal density is nothing


def _late(fraction: float, alpha: float) -> float:
    """Spend almost nothing early, so that the last look is nearly as sharp as a single test (O'Brien-Fleming)."""
    return 2 * float(ndtr(ndtri(alpha / 2) / math.sqrt(fraction)))


def _even(fraction: float, alpha: float) -> float:
    """Spend about as much at every look, for early answers at the price of the last one (Pocock)."""
    return alpha * math.log(1 + (math.e - 1) * fraction)


SPENDING = {"late": _late, "even": _even}


@lru_cache(maxsize=256)
def error_levels(fractions: tuple[float, ...], alpha: float, spending: str = "late") -> tuple[float, ...]:
    """One-sided level of the test at each look, so that all looks together err with probability `alpha`.

    Parameters
    ----------
    fractions : tuple of float
        Share of all the data at each look: rising, above 0, the last at most 1.
    alpha : float
        Error probability of the whole, between 0 and 0.5.
    spending : str
        How much may be spent by each share: "late" or "even".

    Notes
    -----
    Lan and DeMets 1983. The sum of the data behaves as Brownian motion in the share seen. Its density over the
    paths not yet stopped is carried from look to look by quadrature (Armitage, McPherson and Rowe 1969); each
    look's threshold is the one that newly stopped paths of the null hypothesis reach with the probability that
    may be spent.
    """
    if spending not in SPENDING:
        raise ValueError(f"spending: expected one of {', '.join(SPENDING)}; got {spending!r}")
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha: expected a probability between 0 and 0.5; got {alpha}")
    if not fractions or fractions[0] <= 0 or fractions[-1] > 1 or np.any(np.diff(fractions) <= 0):
        raise ValueError(f"fractions: expected shares rising from above 0 to at most 1; got {fractions}")
    levels, spent = [], 0.0
    points, mass = np.zeros(1), np.ones(1)  # the paths start at 0 together
    before = 0.0
    for fraction in fractions:
        deviation = math.sqrt(fraction - before)
        budget = max(SPENDING[spending](fraction, alpha) - spent, 0.0)
        threshold = _threshold(points, mass, deviation, budget, _FAR * math.sqrt(fraction))
        levels.append(float(ndtr(-threshold / math.sqrt(fraction))))
        points, mass = _survivors(points, mass, deviation, threshold, _FAR * math.sqrt(fraction))
        spent, before = spent + budget, fraction
    return tuple(levels)


def _threshold(points: np.ndarray, mass: np.ndarray, deviation: float, budget: float, far: float) -> float:
    """Value that the next look exceeds with probability `budget`, by bisection."""
    low, high = -far, far
    for _ in range(80):
        middle = (low + high) / 2
        if float(mass @ ndtr((points - middle) / deviation)) > budget:
            low = middle
        else:
            high = middle
    return high


def _survivors(
    points: np.ndarray, mass: np.ndarray, deviation: float, threshold: float, far: float
) -> tuple[np.ndarray, np.ndarray]:
    """Quadrature points below the threshold, and the probability mass that each stands for."""
    half = (threshold + far) / 2
    place = half * (_NODES + 1) - far
    z = (place[:, None] - points) / deviation
    density = np.exp(-0.5 * z * z) @ mass / (deviation * math.sqrt(2 * math.pi))
    return place, density * _WEIGHTS * half
