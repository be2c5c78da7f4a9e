"""The map from summed to whole damage: rising, invertible, true to what was measured."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitween.gradual.plan.damage_model import DamageModel, recalibrate

damages = st.floats(1e-6, 50)


def test_without_measurements_sums_stand():
    assert DamageModel().total(0.25) == 0.25
    assert recalibrate([], []) == DamageModel()
    assert DamageModel().inverse(0.25) == 0.25


def test_one_measurement_is_a_ratio():
    model = recalibrate(0.5, 0.75)
    np.testing.assert_allclose(model.total(np.array([0.0, 0.01, 0.5, 4.0])), [0.0, 0.015, 0.75, 6.0])
    assert model.inverse(0.15) == pytest.approx(0.1)


def test_goes_through_distinct_measurements():
    sums, totals = [0.02, 0.6, 2.7], [0.019, 0.6, 4.05]
    model = recalibrate(sums, totals)
    np.testing.assert_allclose(model.total(np.array(sums)), totals)
    assert model.total(0.001) == pytest.approx(0.00095)
    assert 0.6 < model.total(1.2) < 4.05


def test_learns_that_damage_compounds_before_it_is_large():
    def true(total):  # adds up when small, 1.5 times the sum near 2.7
        return total * (1 + 0.5 * total / 2.7)

    sums = np.array([0.1, 0.4, 0.8, 1.3])
    model = recalibrate(sums, true(sums))
    error = abs(model.total(2.0) / true(2.0) - 1)
    assert error < 0.05
    assert error < 0.4 * abs(recalibrate(sums[-1], true(sums[-1])).total(2.0) / true(2.0) - 1)
    assert error < 0.2 * abs(DamageModel().total(2.0) / true(2.0) - 1)


def test_follows_saturation():
    sums = np.array([1.0, 3.0, 8.0, 20.0])
    totals = 10 * (1 - np.exp(-sums / 8))
    model = recalibrate(sums, totals)
    np.testing.assert_allclose(model.total(sums), totals)
    assert model.total(40.0) < 40.0 * totals[-1] / sums[-1]


def test_repeated_measurements_are_averaged():
    model = recalibrate([1.0, 1.0, 1.02], [1.0, 1.21, 1.1])
    assert len(model.sums) == 1
    assert model.total(1.0) == pytest.approx(1.1, rel=0.02)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(damages, damages), max_size=8), st.lists(damages, min_size=2, max_size=20))
def test_rises_and_inverts_whatever_was_measured(pairs, asked):
    model = recalibrate([p for p, _ in pairs], [r for _, r in pairs])
    asked = np.unique(asked)
    totals = model.total(asked)
    assert (np.diff(totals) > 0).all() or (np.diff(np.log(asked)) < 1e-12).any()
    np.testing.assert_allclose(model.inverse(totals), asked, rtol=1e-9)


@pytest.mark.parametrize(
    ("predicted", "real", "message"),
    [
        ([1.0], [1.0, 2.0], "real: expected as many"),
        ([1.0], [float("nan")], "real: expected finite"),
        ([1.0], [float("inf")], "real: expected finite"),
        ([0.0], [1.0], "predicted: expected finite"),
    ],
)
def test_bad_measurements_are_refused(predicted, real, message):
    with pytest.raises(ValueError, match=message):
        recalibrate(predicted, real)


def test_bad_questions_are_refused():
    with pytest.raises(ValueError, match="at least 0"):
        DamageModel().total(-1.0)
