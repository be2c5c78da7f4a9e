"""GPTQ against the paper's own recipe in NumPy, refinement against the error it lowers, and bad input."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import bitween
from bitween import Hessian, Scheme, _core, gptq
from bitween.scheme import BITS, GROUP_SIZES
from tests.core.reference_gptq import damped, row_errors
from tests.core.reference_gptq import gptq as paper_gptq

ISAS = bitween.info()["isas"]


def problem(rows=70, cols=192, tokens=600, seed=0):
    """A weight and the Hessian of correlated inputs."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((cols, cols)) * np.exp(-np.arange(cols) / 30)[:, None]
    x = rng.standard_normal((tokens, cols)) @ mix + 0.3 * rng.standard_normal((tokens, cols))
    weight = (rng.standard_normal((rows, cols)) * np.exp(0.5 * rng.standard_normal((rows, 1)))).astype(np.float32)
    return weight, (x.T @ x / tokens).astype(np.float32)


@pytest.fixture
def isa(request):
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(None)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("cols", "group"), [(192, 64), (100, 16), (161, 128), (200, -1), (5, 32)])
def test_codes_equal_the_papers(isa, bits, symmetric, cols, group):
    weight, hessian = problem(20, cols, seed=cols)
    scheme = Scheme(bits, group, symmetric)
    q = gptq(weight, scheme, hessian, sweeps=0).quantized
    expected = paper_gptq(weight, hessian, q.scales, q.unpack_zeros(), scheme, 0.01)
    same = q.unpack_codes() == expected
    assert same.mean() >= 0.99  # one tie decided otherwise changes the rest of its row
    assert same.all(1).mean() >= 0.95


@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_each_step_lowers_the_error(bits, group, symmetric):
    weight, hessian = problem()
    scheme = Scheme(bits, group, symmetric)
    target = damped(hessian, 0.01)
    simple = [bitween.quantize(weight, scheme, method=m).dequantize() for m in ("rtn", "clip")]
    errors = [row_errors(weight, stored, target) for stored in simple]
    for sweeps in (0, 1, 2, 8):
        result = gptq(weight, scheme, hessian, sweeps=sweeps, tolerance=0)
        stored = result.quantized.dequantize()
        errors.append(row_errors(weight, stored, target))
        np.testing.assert_allclose(result.row_errors, row_errors(weight, stored, hessian), rtol=2e-3)
        if sweeps:
            assert (errors[-1] <= errors[-2] * (1 + 1e-4)).all()
    assert errors[2].sum() < 0.7 * min(errors[0].sum(), errors[1].sum())
    assert errors[-1].sum() < 0.97 * errors[2].sum()


def test_activation_order_is_a_permutation():
    """Activation order equals natural order on columns that were sorted beforehand."""
    weight, hessian = problem(10, 128)
    activity = np.diag(hessian).reshape(2, 64)
    groups = np.argsort(-activity.mean(1), kind="stable")
    order = np.concatenate([g * 64 + np.argsort(-activity[g], kind="stable") for g in groups])
    found = gptq(weight, Scheme(3), hessian, by_activation=True).quantized.dequantize()
    expected = gptq(weight[:, order], Scheme(3), hessian[np.ix_(order, order)]).quantized.dequantize()
    assert (np.abs(found[:, order] - expected) < 1e-6).mean() > 0.99


def test_same_bytes_for_any_number_of_threads_and_instruction_set():
    weight, hessian = problem(200, 130)
    found = set()
    for isa in ISAS:
        _core.set_isa(isa)
        for n in (1, 2, 3):
            _core.set_num_threads(n)
            codes, scales, zeros = _core.quantize_gptq(weight, hessian, Scheme(2).key, 0.01, 3)[0]
            found.add((codes.tobytes(), scales.tobytes(), zeros.tobytes()))
    _core.set_isa(None)
    bitween.get_num_threads()
    assert len(found) == 1


def test_quantize_takes_the_methods():
    weight, hessian = problem(10, 128)
    plain = bitween.quantize(weight, Scheme(3), method="gptq", hessian=hessian)
    refined = bitween.quantize(torch.from_numpy(weight), Scheme(3), method="gptq+refine", hessian=hessian)
    before, after = (row_errors(weight, q.dequantize(), hessian).sum() for q in (plain, refined))
    assert after < before
    with pytest.raises(ValueError, match="hessian: expected E"):
        bitween.quantize(weight, Scheme(3), method="gptq")
    with pytest.raises(ValueError, match="importance: expected None"):
        bitween.quantize(weight, Scheme(3), method="gptq", hessian=hessian, importance=np.ones(128, np.float32))


def test_dead_columns_are_rounded_to_nearest():
    weight, hessian = problem(8, 128)
    hessian[[3, 77]] = hessian[:, [3, 77]] = 0
    for sweeps in (0, 4):
        result = gptq(weight, Scheme(4), hessian, sweeps=sweeps)
        q = result.quantized
        step = q.scales.astype(np.float32)
        zeros = q.unpack_zeros()
        assert result.dead_columns == 2
        for column in (3, 77):
            g = column // 64
            nearest = np.clip(np.rint(weight[:, column] / step[:, g] + zeros[:, g]), 0, 15)
            np.testing.assert_array_equal(q.unpack_codes()[:, column], nearest)


def test_row_21_zero_hessian_rounds_to_nearest():
    weight, _ = problem(8, 128)
    result = gptq(weight, Scheme(4), np.zeros((128, 128), np.float32))
    assert result.dead_columns == 128
    assert result.row_errors.max() < 1e-5
    clipped = bitween.quantize(weight, Scheme(4), method="clip").dequantize()
    got = ((result.quantized.dequantize() - weight) ** 2).sum()
    assert got <= 1.001 * ((clipped - weight) ** 2).sum()


def test_row_21_fewer_tokens_than_columns():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((30, 256)).astype(np.float32)
    h = Hessian(256)
    h.add(rng.standard_normal((20, 256)).astype(np.float32))
    with pytest.warns(RuntimeWarning, match="20 tokens for 256 columns"):
        result = gptq(weight, Scheme(3), h)
    rtn = bitween.quantize(weight, Scheme(3)).dequantize()
    assert result.row_errors.sum() < 0.2 * row_errors(weight, rtn, h.matrix()).sum()
    with pytest.warns(RuntimeWarning, match="not positive with damping 0; took"):
        result = gptq(weight, Scheme(3), h.matrix(), damping=0)
    assert np.isfinite(result.quantized.dequantize()).all()


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e30])
def test_scale_of_the_hessian_does_not_matter(size):
    weight, hessian = problem(10, 128)
    expected = gptq(weight, Scheme(3), hessian)
    got = gptq(weight, Scheme(3), (hessian.astype(np.float64) * size).astype(np.float32))
    assert (got.quantized.unpack_codes() == expected.quantized.unpack_codes()).mean() > 0.99
    np.testing.assert_allclose(got.row_errors, expected.row_errors * size, rtol=0.05)


@pytest.mark.parametrize("bits", [1, 1.58, 2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_special_weights(bits, symmetric):
    _, hessian = problem(1, 128)
    weight = np.zeros((4, 128), np.float32)
    weight[1], weight[2], weight[3] = 1e-30, 0.75, np.linspace(-1, 1, 128)
    for sweeps in (0, 4):
        result = gptq(weight, Scheme(bits, 64, symmetric), hessian, sweeps=sweeps)
        back = result.quantized.dequantize()
        assert np.isfinite(back).all()
        assert np.isfinite(result.row_errors).all()
        assert np.abs(back[:2]).max() < 1e-6
    with pytest.raises(ValueError, match="65504"):
        gptq(np.full((2, 128), 1e30, np.float32), Scheme(bits, 64, symmetric), hessian)
    weight[0, 5] = np.nan
    with pytest.raises(ValueError, match="weight: expected finite"):
        gptq(weight, Scheme(bits, 64, symmetric), hessian)


def broken_hessians():
    _, good = problem(1, 96)
    lopsided, negative, nan = good.copy(), good.copy(), good.copy()
    lopsided[3, 4] += 1
    negative[5, 5] = -1
    nan[7, 8] = nan[8, 7] = np.nan
    return {"lopsided": lopsided, "negative": negative, "nan": nan}


@pytest.mark.parametrize("kind", ["lopsided", "negative", "nan"])
def test_broken_hessians_are_refused(kind):
    with pytest.raises(ValueError, match="hessian: expected a finite, symmetric"):
        gptq(np.ones((3, 96), np.float32), Scheme(4), broken_hessians()[kind])


def test_bad_arguments():
    weight, hessian = problem(4, 96)
    with pytest.raises(ValueError, match=r"hessian: expected shape \(96, 96\)"):
        gptq(weight, Scheme(4), hessian[:50, :50].copy())
    with pytest.raises(TypeError, match="hessian: expected dtype float32"):
        gptq(weight, Scheme(4), hessian.astype(np.float64))
    with pytest.raises(ValueError, match="damping: expected"):
        gptq(weight, Scheme(4), hessian, damping=-1)
    with pytest.raises(TypeError, match="scheme"):
        gptq(weight, 4, hessian)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gptq(weight[:0], Scheme(4), hessian).quantized.shape == (0, 96)
