"""Bounds beside the mean: against plain arithmetic, and their error rate by simulation."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from bitween.gradual.proof.tails import changed_choices, lost_control, tails, worst_tokens


def losses(rng, windows=40, tokens=200):
    return rng.standard_t(4, (windows, tokens)) * 0.3


def test_estimates_are_plain_arithmetic():
    rng = np.random.default_rng(0)
    gain, changed = losses(rng), rng.random((40, 200)) < 0.1
    worst, choices = worst_tokens(gain, None), changed_choices(changed, None)
    assert worst.estimate == pytest.approx(np.quantile(gain, 0.99, method="lower"))
    assert worst.bound in gain
    assert choices.estimate == pytest.approx(changed.mean())
    assert worst.estimate < worst.bound < gain.max()
    assert choices.estimate < choices.bound < 0.15


def test_bounds_are_below_the_truth_no_more_often_than_promised():
    rng, runs, wrong = np.random.default_rng(1), 200, np.zeros(2)
    truth = 0.3 * 3.74695  # the 99 % quantile of Student's t with 4 degrees of freedom
    for _ in range(runs):
        wrong[0] += worst_tokens(losses(rng), None).bound < truth
        wrong[1] += changed_choices(rng.random((40, 200)) < 0.05, None).bound < 0.05
    assert (wrong <= binom.ppf(0.999, runs, 0.05)).all()


def test_lost_control_counts_what_is_lost_and_not_what_is_gained_elsewhere():
    before = np.full((20, 50), 0.001)
    before[:, 10], after = 0.8, np.full((20, 50), 0.01)
    after[:, 10] = 0.2  # gains .009 in 49 places, loses .6 in one
    found = lost_control("end of turn", before, after, None)
    assert found.estimate == pytest.approx(0.6 / (0.8 + 49 * 0.001))
    assert found.bound == pytest.approx(found.estimate)  # all windows are alike
    assert lost_control("end of turn", before, before, None).bound == 0.0
    assert lost_control("end of turn", np.full((20, 50), 1e-7), after, None) is None


def test_what_can_not_be_bounded_has_no_bound():
    rng = np.random.default_rng(2)
    few = losses(rng, 4)
    assert tails(few, np.zeros_like(few), {}, None) == ()
    broken = losses(rng)
    broken[3, 5] = math.inf
    assert tails(broken, np.zeros_like(broken), {}, None) == ()
    heavy = losses(rng, 8, 20)
    heavy[0] = 9.0  # one window of eight suffers throughout: no value seen leaves 1 % above it for certain
    assert worst_tokens(heavy, None).to_dict()["bound"] is None or worst_tokens(heavy, None).bound >= 9.0
