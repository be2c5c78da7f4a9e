"""The map from summed to whole damage: rising, invertible, true to what was measured."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitween.gradual.plan.damage_model import DamageModel, learned, recalibrate

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


# (sum, whole) of plans that benchmarks/allocation.py (SmolLM2-135M, 5 to 3 bits) and runs of the tests' model measured
MEASURED = {
    "SmolLM2": [(0.0173, 0.0299), (0.0477, 0.0757), (0.133, 0.208), (0.262, 0.391)],
    "tiny": [(0.000235, 0.000443), (0.01199, 0.01084), (0.1660, 0.1380), (0.2047, 0.1700)],
}


@pytest.mark.parametrize("model", MEASURED)
def test_stages_tell_the_next_one_within_15_percent(model):
    pairs = MEASURED[model]
    for known in range(2, len(pairs)):
        sums, whole = pairs[known]
        assert learned(pairs[:known]).total(sums) == pytest.approx(whole, rel=0.15)


def test_one_plan_of_tiny_damage_tells_a_floor_not_a_ratio():
    assert learned([(1e-4, 0.0025)]).total(0.02) < 1.5 * 0.02 + 0.0025
    assert learned([(0.02, 0.6)]).total(0.04) == pytest.approx(1.2, rel=0.02)  # too much for a floor


def test_what_can_not_be_counted_is_left_out():
    assert learned([(0.1, np.inf), (0.0, 0.1), (0.1, np.nan)]) == DamageModel()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(damages, damages), max_size=8), st.lists(damages, min_size=2, max_size=20))
def test_a_floor_keeps_it_rising(pairs, asked):
    model = learned(pairs)
    assert model.floor < min((total for _, total in pairs), default=1)
    totals = model.total(np.unique(asked))
    assert (totals > model.floor).all()
    assert (np.diff(totals) >= 0).all()
    assert model.inverse(model.floor / 2) == 0 if model.floor else True


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
