"""The table of docs/numbers.md, for every instruction set."""

import warnings

import numpy as np
import pytest

import bitween
from bitween import Scheme, _core

SCHEMES = [Scheme(bits, group, s) for bits in (1, 1.58, 2, 3, 4, 5, 6, 8) for group, s in [(32, True), (-1, True)]]
SCHEMES += [Scheme(bits, group) for bits in (1, 1.58, 2, 3, 4, 5, 6, 8) for group in (16, -1)]
METHODS = ("rtn", "clip", "gptq", "gptq+refine")
TINY = np.float32(2.0**-24)


@pytest.fixture(autouse=True, params=_core.info()["isas"])
def isa(request):
    before = _core.info()["isa"]
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)


def quantized(weight, scheme, method="rtn"):
    options = {}
    if "gptq" in method:
        options["hessian"] = np.eye(weight.shape[1], dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        stored = bitween.quantize(weight, scheme, method=method, **options)
    values = stored.dequantize()
    assert values.shape == weight.shape
    assert np.isfinite(values).all()
    assert np.isfinite(np.asarray(stored.scales)).all()
    return values


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-42, -1e-42, 1e-30, 1e-9])
def test_row_39_what_is_too_small_becomes_zero(method, value):
    for scheme in SCHEMES:
        found = quantized(np.full((3, 64), value, np.float32), scheme, method)
        assert np.abs(found).max() <= (TINY / 2 if scheme.levels == 2 and scheme.symmetric else 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.3, -0.3, 1e-3, 700.0, -700.0])
def test_row_41_a_constant_group_keeps_its_value(method, value):
    for scheme in SCHEMES:
        found = quantized(np.full((3, 64), value, np.float32), scheme, method)
        assert np.abs(found - value).max() <= 2**-10 * abs(value) + 128 * TINY


@pytest.mark.parametrize("value", [5.0, -5.0])
def test_row_41_one_outlier_among_zeros(value):
    weight = np.zeros((2, 64), np.float32)
    weight[1, 7] = value
    for scheme in SCHEMES:
        found = quantized(weight, scheme)
        if scheme.levels == 2 and scheme.symmetric:
            continue  # it has no zero: its two levels lie at the mean size
        assert abs(found[1, 7] - value) <= 2**-10 * abs(value)
        found[1, 7] = 0
        assert not found.any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [1e30, -1e30, 3e38])
def test_row_40_steps_beyond_fp16_are_refused(method, value):
    for scheme in SCHEMES:
        with pytest.raises(ValueError, match=r"^weight: expected groups whose step between levels is at most 65504"):
            quantized(np.full((2, 64), value, np.float32), scheme, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (1, 63), (2, 17)])
def test_what_is_not_finite_is_refused(method, value, place):
    weight = np.ones((3, 64), np.float32)
    weight[place] = value
    for scheme in SCHEMES[::5]:
        with pytest.raises(ValueError, match=r"^weight: expected finite values"):
            quantized(weight, scheme, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0), (5, 1), (2, 5), (3, 65), (1, 17)])
def test_row_16_empty_and_ragged_shapes(method, shape):
    weight = np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    for scheme in SCHEMES:
        found = quantized(weight, scheme, method)
        if scheme.bits == 8 and weight.size:
            assert np.abs(found - weight).max() <= 2.5 / 127


@pytest.mark.slow
def test_ten_million_rows():
    weight = np.ones((10_000_000, 2), np.float32)
    weight[-1] = -1, 0.5
    stored = bitween.quantize(weight, Scheme(4, 16))
    assert np.allclose(stored.dequantize(rows=np.array([0, 9_999_999])), [[1, 1], [-1, 0.5]], atol=0.05)


def test_row_42_half_precision_is_widened_without_loss():
    torch = pytest.importorskip("torch")
    for dtype in (torch.float16, torch.bfloat16):
        largest = 60000.0 if dtype is torch.float16 else 1e5
        weight = torch.tensor([[largest, -largest, 6e-5, 0.0] * 8], dtype=dtype)
        for scheme in (Scheme(8, 16), Scheme(4, -1)):
            ours, wide = bitween.quantize(weight, scheme), bitween.quantize(weight.float(), scheme)
            assert np.array_equal(ours.codes, wide.codes)
            assert np.array_equal(ours.scales, wide.scales)


def test_row_21_dead_columns_are_rounded_to_nearest_and_counted():
    weight = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    x = np.random.default_rng(1).standard_normal((500, 64)).astype(np.float32)
    x[:, 5] = 0
    from bitween import gptq

    found = gptq(weight, Scheme(4, 64), (x.T @ x / 500).astype(np.float32))
    assert found.dead_columns == 1
    values = found.quantized.dequantize()
    steps = np.asarray(found.quantized.scales).astype(np.float32)
    inside = np.abs(weight[:, 5]) < 5 * steps[:, 0]
    assert (np.abs(values - weight)[:, 5] <= 0.51 * steps[:, 0])[inside].all()


@pytest.mark.parametrize("spoil", ["asymmetric", "negative", "nan", "inf"])
def test_row_21_illegal_hessians_are_refused(spoil):
    hessian = np.eye(64, dtype=np.float32)
    if spoil == "asymmetric":
        hessian[0, 1] = 0.5
    else:
        hessian[3, 3] = {"negative": -1, "nan": np.nan, "inf": np.inf}[spoil]
    with pytest.raises(ValueError, match=r"^hessian: "):
        bitween.quantize(np.ones((2, 64), np.float32), Scheme(4, 64), method="gptq", hessian=hessian)


def test_logits_of_minus_infinity():
    never = -np.inf
    reference = np.array([[0.0, 1.0, never], [0.0, 1.0, 2.0], [0.0, 1.0, never]], np.float32)
    candidate = np.array([[0.0, 1.0, never], [0.0, 1.0, never], [0.0, 1.0, 2.0]], np.float32)
    found = bitween.kl_divergence(reference, candidate)
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert found[1] == np.inf
    p, q = np.exp(reference[2]), np.exp(candidate[2])
    assert found[2] == pytest.approx((p / p.sum() * np.log((p / p.sum() + 1e-30) / (q / q.sum()))).sum(), rel=1e-5)
    assert bitween.cross_entropy(candidate, np.array([1, 2, 0]))[1] == np.inf


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_spoiled_row_of_logits_is_nan_alone(value):
    logits = np.random.default_rng(0).standard_normal((4, 100)).astype(np.float32)
    clean = bitween.cross_entropy(logits, np.arange(4))
    spoiled = logits.copy()
    spoiled[2, 50] = value
    found = bitween.cross_entropy(spoiled, np.arange(4))
    assert np.isnan(found[2])
    assert np.array_equal(np.delete(found, 2), np.delete(clean, 2))
    assert np.isnan(bitween.kl_divergence(logits, spoiled)[2])
    assert np.isfinite(np.delete(bitween.kl_divergence(logits, spoiled), 2)).all()


def test_logits_far_apart():
    logits = np.array([[0.0, 5000.0, -5000.0]], np.float32)
    assert bitween.cross_entropy(logits, np.array([1]))[0] == 0
    assert bitween.cross_entropy(logits, np.array([2]))[0] == 10000
    assert bitween.kl_divergence(logits, logits)[0] == 0


@pytest.mark.parametrize("mode", ["exact", "int16", "int8"])
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_spoiled_activations_reach_their_own_row_only(mode, tokens, value):
    generator = np.random.default_rng(0)
    stored = bitween.quantize(generator.standard_normal((24, 64)).astype(np.float32), Scheme(4, 32))
    x = generator.standard_normal((tokens, 64)).astype(np.float32)
    clean = stored.matmul(x, mode=mode)
    x[1, 9] = value
    found = stored.matmul(x, mode=mode)
    assert not np.isfinite(found[1]).any()
    assert np.array_equal(np.delete(found, 1, 0), np.delete(clean, 1, 0))
