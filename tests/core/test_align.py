"""Targets moved towards what a layer should have been fed, against NumPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitween import _core


def moments(cols, tokens, seed, apart=0.3):
    generator = np.random.default_rng(seed)
    mix = generator.standard_normal((cols, cols))
    y = generator.standard_normal((tokens, cols)) @ mix
    x = y + apart * generator.standard_normal((tokens, cols)) @ mix
    return (x.T @ x / tokens).astype(np.float32), (x.T @ y / tokens).astype(np.float32), x, y


def expected(weight, hessian, cross, share, damping):
    weight, hessian, cross = (a.astype(np.float64) for a in (weight, hessian, cross))
    damped = hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))
    return weight + share * np.linalg.solve(damped, (weight @ (cross - hessian).T).T).T


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 150),
    cols=st.integers(1, 80),
    seed=st.integers(0, 99),
    share=st.floats(0, 1),
    damping=st.sampled_from([0.01, 0.1, 1.0]),
)
def test_against_least_squares(rows, cols, seed, share, damping):
    hessian, cross, _, _ = moments(cols, 4 * cols, seed)
    weight = np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)
    found, used = _core.align(weight, hessian, cross, share, damping)
    assert used == damping
    right = expected(weight, hessian, cross, share, damping)
    assert np.abs(found - right).max() <= 1e-3 * np.abs(right).max()


def test_outputs_come_nearer():
    hessian, cross, x, y = moments(64, 4096, 1)
    weight = np.random.default_rng(2).standard_normal((32, 64)).astype(np.float32)
    found, _ = _core.align(weight, hessian, cross, 1.0, 1e-4)
    wanted = y @ weight.T
    assert np.square(x @ found.T - wanted).sum() < 0.95 * np.square(x @ weight.T - wanted).sum()


def test_same_inputs_leave_the_weight_as_it_is():
    hessian, _, _, _ = moments(40, 200, 3)
    weight = np.random.default_rng(4).standard_normal((7, 40)).astype(np.float32)
    assert np.array_equal(_core.align(weight, hessian, hessian)[0], weight)
    hessian, cross, _, _ = moments(40, 200, 3)
    assert np.array_equal(_core.align(weight, hessian, cross, 0.0)[0], weight)


def test_columns_never_active_keep_their_weights():
    hessian, cross, _, _ = moments(24, 400, 5)
    for matrix in (hessian, cross):
        matrix[3], matrix[:, 3] = 0, 0
    weight = np.random.default_rng(6).standard_normal((5, 24)).astype(np.float32)
    assert np.array_equal(_core.align(weight, hessian, cross)[0][:, 3], weight[:, 3])


def test_few_tokens_are_damped_more_when_needed():
    hessian, cross, _, _ = moments(60, 3, 7)
    found, used = _core.align(np.ones((4, 60), np.float32), hessian, cross, 1.0, 0.0)
    assert used > 0
    assert np.isfinite(found).all()


def test_any_number_of_threads_gives_the_same_bytes():
    hessian, cross, _, _ = moments(96, 300, 8)
    weight = np.random.default_rng(9).standard_normal((500, 96)).astype(np.float32)
    before = _core.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 8):
            _core.set_num_threads(threads)
            found.append(_core.align(weight, hessian, cross)[0].tobytes())
    finally:
        _core.set_num_threads(before)
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"share": 1.5}, ValueError, "share: expected"),
        ({"damping": -1.0}, ValueError, "damping: expected"),
        ({"hessian": np.triu(np.ones((8, 8), np.float32)) * 5}, ValueError, "hessian"),
        ({"cross": np.full((8, 8), np.nan, np.float32)}, ValueError, "cross"),
        ({"cross": np.ones((8, 7), np.float32)}, ValueError, "cross: expected shape"),
        ({"weight": np.full((2, 8), np.inf, np.float32)}, ValueError, "."),
    ],
)
def test_bad_input(change, error, message):
    hessian, cross, _, _ = moments(8, 40, 10)
    given = {"weight": np.ones((2, 8), np.float32), "hessian": hessian, "cross": cross, **change}
    with pytest.raises(error, match=message):
        _core.align(**given)
