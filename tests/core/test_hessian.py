"""Hessian sums against NumPy, for every dtype, layout, weight and number of threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bitween
from bitween import Hessian, _core


def inputs(tokens, n, dtype=torch.float32, seed=0):
    return torch.randn(tokens, n, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "n"), [(1, 1), (7, 33), (1025, 65), (300, 400)])
@pytest.mark.parametrize("weighted", [False, True])
def test_matrix_equals_numpy(dtype, tokens, n, weighted):
    x = inputs(tokens, n, dtype)
    weights = torch.rand(tokens) if weighted else None
    h = Hessian(n)
    h.add(x[: tokens // 2], weights=None if weights is None else weights[: tokens // 2])
    h.add(x[tokens // 2 :], weights=None if weights is None else weights[tokens // 2 :])
    wide = x.double().numpy()
    expected = (wide.T * (1 if weights is None else weights.numpy())) @ wide / tokens
    assert h.tokens == tokens
    np.testing.assert_allclose(h.matrix(), expected, rtol=1e-4, atol=1e-5 * expected.diagonal().max())
    np.testing.assert_array_equal(h.matrix(), h.matrix().T)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "broadcast", "leading"])
def test_any_layout(layout):
    x = inputs(200, 96)
    shown = {
        "transposed": lambda: x.T.contiguous().T,
        "sliced": lambda: torch.cat([x, x], 1)[:, :96],
        "broadcast": lambda: x[:1].expand(200, 96),
        "leading": lambda: x.reshape(4, 50, 96),
    }[layout]()
    h = Hessian(96)
    h.add(shown)
    wide = shown.reshape(-1, 96).double().numpy()
    np.testing.assert_allclose(h.matrix(), wide.T @ wide / 200, rtol=1e-4, atol=1e-5)


def test_cross_moments():
    x, y, weights = inputs(1500, 200), inputs(1500, 200, torch.bfloat16, 1), torch.rand(1500)
    h = Hessian(200, cross=True)
    h.add(x, weights=weights, reference=y)
    expected = (x.double().numpy().T * weights.numpy()) @ y.double().numpy() / 1500
    np.testing.assert_allclose(h.cross(), expected, rtol=1e-3, atol=1e-5)


def test_same_bytes_for_any_number_of_threads_and_instruction_set():
    x, weights = inputs(1100, 450, torch.bfloat16), torch.rand(1100)
    found = set()
    for isa in bitween.info()["isas"]:
        _core.set_isa(isa)
        for n in (1, 2, 5):
            _core.set_num_threads(n)
            total = np.zeros((450, 450), np.float32)
            _core.hessian_add(x, total, None, weights)
            found.add(total.tobytes())
    _core.set_isa(None)
    bitween.get_num_threads()
    assert len(found) == 1


@pytest.mark.parametrize("cross", [False, True])
def test_a_settled_one_holds_the_same_means_where_the_sums_were(cross):
    x, y = inputs(70, 50), inputs(70, 50, seed=1)
    one, other = Hessian(50, cross=cross), Hessian(50, cross=cross)
    for h in (one, other):
        h.add(x, reference=y if cross else None)
    assert other.settle() is other.settle()
    assert np.array_equal(one.matrix(), other.matrix())
    assert other.matrix() is other.matrix()
    assert one.matrix() is not one.matrix()
    if cross:
        assert np.array_equal(one.cross(), other.cross())
        assert other.cross() is other.cross()
    with pytest.raises(RuntimeError, match="settled"):
        other.add(x, reference=y if cross else None)
    assert not Hessian(3).settle().matrix().any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_sums_must_be_finite(bad):
    x = inputs(20, 40)
    x[3, 7] = bad
    with pytest.raises(ValueError, match="x: expected finite"):
        Hessian(40).add(x)


def test_bad_arguments():
    h = Hessian(40)
    with pytest.raises(ValueError, match=r"hessian: expected shape \(30, 30\); got \(40, 40\)"):
        h.add(inputs(5, 30))
    with pytest.raises(ValueError, match="weights: value not accepted"):
        h.add(inputs(5, 40), weights=torch.tensor([1.0, -1, 1, 1, 1]))
    with pytest.raises(ValueError, match=r"weights: expected shape \(5,\)"):
        h.add(inputs(5, 40), weights=torch.ones(4))
    with pytest.raises(ValueError, match="reference"):
        h.add(inputs(5, 40), reference=inputs(5, 40))
    with pytest.raises(ValueError, match="cross"):
        h.cross()
    h.add(inputs(0, 40))
    assert h.tokens == 0
    assert not h.matrix().any()
