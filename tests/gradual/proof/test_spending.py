"""Error levels of repeated looks: published thresholds, and the error rate itself by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, norm

from bitween.gradual.proof.spending import error_levels

THIRDS = (1 / 3, 2 / 3, 1.0)


@pytest.mark.parametrize(
    ("fractions", "spending", "thresholds"),
    [
        # Lan-DeMets thresholds at one-sided 0.025, as tabulated by Jennison and Turnbull and common software
        ((0.5, 1.0), "late", [2.9626, 1.9686]),
        (THIRDS, "late", [3.7103, 2.5114, 1.9930]),
        ((0.5, 1.0), "even", [2.1570, 2.2010]),
        (THIRDS, "even", [2.2794, 2.2949, 2.2959]),
    ],
)
def test_published_thresholds(fractions, spending, thresholds):
    levels = error_levels(fractions, 0.025, spending)
    np.testing.assert_allclose(norm.isf(levels), thresholds, atol=6e-4)


def test_one_look_is_a_plain_test():
    for spending in ("late", "even"):
        assert error_levels((1.0,), 0.05, spending) == pytest.approx((0.05,))


@pytest.mark.parametrize("spending", ["late", "even"])
def test_all_looks_together_err_as_often_as_allowed(spending):
    fractions, alpha, runs = (0.15, 0.4, 0.75, 1.0), 0.05, 200_000
    steps = np.diff(fractions, prepend=0) ** 0.5
    paths = np.cumsum(np.random.default_rng(5).standard_normal((runs, 4)) * steps, axis=1)
    stopped = (paths / np.sqrt(fractions) > norm.isf(error_levels(fractions, alpha, spending))).any(axis=1).sum()
    low, high = binom.interval(0.9999, runs, alpha)
    assert low <= stopped <= high


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1.0,), 0.05, "never"), "spending: expected one of late, even"),
        (((1.0,), 0.7), "alpha"),
        (((0.5, 0.5), 0.05), "fractions"),
        (((), 0.05), "fractions"),
        (((0.5, 1.2), 0.05), "fractions"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        error_levels(*arguments)
