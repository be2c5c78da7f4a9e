"""matmul and row-wise dequantize against products in float64, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bitween
from bitween import Scheme, _core
from bitween.scheme import BITS, GROUP_SIZES

ISAS = bitween.info()["isas"]
MODES = ("exact", "int8", "int16")
SCHEMES = [Scheme(b, g, s) for b in BITS for g in GROUP_SIZES for s in (False, True)]


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(None)


def stored(rows, cols, scheme, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return bitween.quantize(torch.randn(rows, cols, generator=generator), scheme)


def activations(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def numbers(t):
    """As float64 in NumPy, whose small products need no threads."""
    return t.to(torch.float64).numpy()


def rounding_of_activations(x, q, mode):
    """What rounding each cell of x to whole numbers may change: half a step times the magnitude of the weights."""
    if mode == "exact" or x.shape[0] > 16:
        return 0
    cell = 64 if q.scheme.group_size == -1 else min(q.scheme.group_size, 64)
    step = np.abs(x).copy()
    for i in range(0, x.shape[1], cell):
        step[:, i : i + cell] = step[:, i : i + cell].max(1, keepdims=True) / (127 if mode == "int8" else 32512)
    return step / 2 @ np.abs(numbers(q.dequantize(torch.float32))).T * 1.001


def assert_near(y, x, q, bias=None, mode="exact", roundings=16):
    """Each sum of products is right to `roundings` roundings of fp32, relative to the sum of magnitudes; the result
    is rounded once more to its own dtype. Rounded activations: zeros are subtracted late, so that the magnitudes are
    those of the codes."""
    weight, activation = numbers(q.dequantize(torch.float32)), numbers(x).reshape(-1, x.shape[-1])
    want, magnitude = activation @ weight.T, np.abs(weight)
    if mode != "exact":
        size = q.shape[1] if q.scheme.group_size == -1 else q.scheme.group_size
        magnitude = q.scheme.levels * np.repeat(q.scales.astype(np.float64), size, axis=1)[:, : q.shape[1]]
    scale = np.abs(activation) @ magnitude.T
    if bias is not None:
        want, scale = want + numbers(bias), scale + np.abs(numbers(bias))
    bound = scale * roundings * 2**-24 + np.abs(want) * torch.finfo(y.dtype).eps
    bound += rounding_of_activations(activation, q, mode)
    error = np.abs(numbers(y).reshape(want.shape) - want)
    assert (error <= bound).all(), f"{(error / bound).max():.2f} times the bound"


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_product_equals_float64(scheme):
    for m, rows, cols in [(1, 7, 65), (3, 66, 130), (5, 5, 700), (2, 1, 17), (17, 9, 333)]:
        q, bias = stored(rows, cols, scheme), activations(rows, seed=2)
        x = activations(m, cols)
        for mode in MODES:
            assert_near(q.matmul(x, mode=mode), x, q, mode=mode)
            assert_near(q.matmul(x, bias, mode=mode), x, q, bias, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", BITS)
def test_every_number_of_columns(bits, mode):
    for cols in [*range(1, 40), 63, 64, 65, 127, 128, 129, 319, 320, 321, 640]:
        q, x = stored(3, cols, Scheme(bits, 32)), activations(1, cols)
        assert_near(q.matmul(x, mode=mode), x, q, mode=mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 2, 17, 600])
def test_dtypes_and_leading_shapes(dtype, m):
    q, bias = stored(70, 96, Scheme(4, 32)), activations(70, dtype=dtype, seed=2)
    x = activations(m, 2, 96, dtype=dtype)
    y = q.matmul(x, bias)
    assert y.dtype == dtype
    assert y.shape == (m, 2, 70)
    assert_near(y, x, q, bias)
    if dtype == torch.float32:
        np.testing.assert_array_equal(q.matmul(x.numpy(), bias.numpy()), y.numpy())


def test_strides():
    q, wide = stored(20, 64, Scheme(3, 64)), activations(10, 128)
    for x in [wide[:, 32:96], wide[::2, :64], wide[:, ::2], wide[:1, 64:].expand(5, 64), wide.T.contiguous().T[:, :64]]:
        torch.testing.assert_close(q.matmul(x), q.matmul(x.contiguous()), rtol=1e-6, atol=1e-6)
    out = torch.full((10, 20), 7.0)
    assert q.matmul(wide[:, :64], out=out) is out
    assert_near(out, wide[:, :64], q)


@pytest.mark.parametrize(("m", "rows", "cols"), [(0, 5, 64), (3, 0, 64), (3, 5, 0), (0, 0, 0)])
def test_empty(m, rows, cols):
    q, bias = stored(rows, cols, Scheme(4, 64)), activations(rows, seed=2)
    y = q.matmul(activations(m, cols), bias)
    assert torch.equal(y, bias.expand(m, rows))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("m", [6, 20])
def test_what_is_not_finite_stays_in_its_row(m, mode):
    q = stored(50, 200, Scheme(4, 64))
    x = activations(m, 200)
    clean = q.matmul(x, mode=mode)
    for bad in (float("nan"), float("inf")):
        x[3, 150] = bad
        y = q.matmul(x, mode=mode)
        assert not y[3].isfinite().any()
        keep = torch.arange(m) != 3
        assert torch.equal(y[keep], clean[keep])


@pytest.mark.parametrize("mode", MODES)
def test_activations_of_any_size(mode):
    q = stored(20, 200, Scheme(4, 32))
    for size in (1e-42, 1e-34, 1e-20, 1e20, 1e30):
        x = activations(2, 200) * size
        want = numbers(x) @ numbers(q.dequantize(torch.float32)).T
        assert np.abs(numbers(q.matmul(x, mode=mode)) - want).max() <= np.abs(want).max() * 0.02 + 1e-28


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("m", [1, 5, 40])
def test_same_bytes_for_any_number_of_threads(m, mode):
    q, x = stored(700, 300, Scheme(5, 64)), activations(m, 300)
    found = []
    for n in range(1, 9):
        out = torch.empty(m, 700)
        _core.set_num_threads(n)
        _core.matmul(x, q.codes, q.scales, q.zeros, q.scheme.key, 300, None, out, MODES.index(mode))
        found.append(out)
    bitween.get_num_threads()
    assert all(torch.equal(found[0], y) for y in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chosen_rows(dtype):
    q = stored(30, 77, Scheme("ternary", 16))
    ids = torch.tensor([29, 0, 0, 13])
    assert torch.equal(q.dequantize(dtype, rows=ids), q.dequantize(dtype)[ids])
    assert q.dequantize(dtype, rows=ids[:0]).shape == (0, 77)
    for bad in (-1, 30):
        with pytest.raises(IndexError, match="rows: expected"):
            q.dequantize(dtype, rows=torch.tensor([0, bad]))


def test_bad_input_is_refused():
    q = stored(30, 64, Scheme(4, 64))
    with pytest.raises(ValueError, match=r"x: expected shape \(2, 64\); got \(2, 63\)"):
        q.matmul(activations(2, 63))
    with pytest.raises(ValueError, match=r"bias: expected shape"):
        q.matmul(activations(2, 64), activations(29))
    with pytest.raises(ValueError, match=r"out: expected shape"):
        q.matmul(activations(2, 64), out=torch.empty(2, 31))
    with pytest.raises(TypeError, match="x: expected dtype"):
        q.matmul(activations(2, 64).double(), out=torch.empty(2, 30))
    x, out = activations(4, 6, 64)[:, :3], torch.empty(4, 3, 30)
    with pytest.raises(ValueError, match="x: expected leading dimensions that fold"):
        _core.matmul(x, q.codes, q.scales, q.zeros, q.scheme.key, 64, None, out, 0)
    ternary = stored(3, 64, Scheme("ternary", 64))
    ternary.codes[1, 3] = 255
    with pytest.raises(ValueError, match="codes: expected codes within the scheme"):
        ternary.dequantize()
    assert ternary.matmul(activations(2, 64)).isfinite().all()
    with pytest.raises(ValueError, match="mode: expected one of exact, int8, int16; got 'fast'"):
        q.matmul(activations(2, 64), mode="fast")
    assert np.isfinite(stored(3, 64, Scheme("ternary", 64)).matmul(np.ones((2, 64), np.float32))).all()
