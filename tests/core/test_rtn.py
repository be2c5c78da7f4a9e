"""quantize_rtn, encode, dequantize, pack and unpack against the NumPy oracles, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bitween
from bitween import Scheme, _core
from bitween.scheme import BITS, GROUP_SIZES
from tests import reference

ISAS = bitween.info()["isas"]
SCHEMES = [Scheme(b, g, s) for b in BITS for g in GROUP_SIZES for s in (False, True)]


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(None)


def random_weight(rows, cols, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, cols)) * np.exp(rng.standard_normal((rows, 1)))).astype(np.float32)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("cols", [1, 15, 16, 17, 33, 65, 130, 576])
def test_rtn_equals_numpy(scheme, cols):
    w = random_weight(5, cols, cols)
    scales, zeros = reference.rtn_grid(w, scheme)
    q = bitween.quantize(w, scheme)
    if scheme.symmetric and scheme.levels == 2:  # sums of |w| differ in their order
        np.testing.assert_allclose(q.scales, scales, rtol=2e-3)
        scales = q.scales
    codes = reference.encode(w, scales, zeros, scheme)
    np.testing.assert_array_equal(q.scales, scales)
    np.testing.assert_array_equal(q.unpack_codes(), codes)
    np.testing.assert_array_equal(q.codes, reference.pack(codes, scheme.levels))
    np.testing.assert_array_equal(q.unpack_zeros(), zeros)
    if not scheme.symmetric:
        np.testing.assert_array_equal(q.zeros, reference.pack_zeros(zeros, scheme.levels))
    np.testing.assert_array_equal(q.dequantize(), reference.decode(codes, scales, zeros, scheme))
    assert q.nbytes == scheme.nbytes(5, cols)
    np.testing.assert_array_equal(_core.encode(w, q.scales, q.zeros, scheme.key), q.codes)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 9),
    cols=st.integers(0, 300),
    scheme=st.sampled_from(SCHEMES),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    transposed=st.booleans(),
    seed=st.integers(0, 999),
)
def test_rtn_error_is_half_a_step(isa, rows, cols, scheme, dtype, transposed, seed):
    w = torch.from_numpy(random_weight(rows, cols, seed)).to(dtype)
    if transposed:
        w = w.T.contiguous().T
    q = bitween.quantize(w, scheme)
    back = q.dequantize(torch.float32)
    if scheme.levels == 2 and scheme.symmetric:
        return
    for g, part in enumerate(reference.groups(cols, scheme.group_size)):
        step = torch.from_numpy(q.scales[:, g : g + 1].astype(np.float32))
        assert ((back - w.float())[:, part].abs() <= step * 0.5001).all()


@pytest.mark.parametrize("levels", [2, 3, 4, 8, 16, 32, 64, 256])
def test_pack_round_trip(levels):
    rng = np.random.default_rng(levels)
    for cols in [*range(1, 70), 127, 128, 129, 1000]:
        codes = rng.integers(0, levels, (3, cols), np.uint8)
        packed = _core.pack(codes, levels)
        np.testing.assert_array_equal(packed, reference.pack(codes, levels))
        np.testing.assert_array_equal(_core.unpack(packed, cols, levels), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_row_42_dequantize_dtypes(dtype):
    q = bitween.quantize(random_weight(7, 200), Scheme(5, 32))
    expected = torch.from_numpy(q.dequantize()).to(dtype)
    assert torch.equal(q.dequantize(dtype), expected)


def test_row_39_special_groups():
    w = np.zeros((3, 64), np.float32)
    w[1] = 1e-30
    w[2] = -3.5
    for scheme in SCHEMES:
        back = bitween.quantize(w, scheme).dequantize()
        if not (scheme.levels == 2 and scheme.symmetric):
            assert (back[0] == 0).all()
        assert np.isfinite(back).all()
        assert np.abs(back[2] + 3.5).max() < 1e-2


def test_same_bytes_for_any_number_of_threads():
    w = random_weight(700, 300)
    expected = None
    for n in (1, 2, 3, 8):
        _core.set_num_threads(n)
        codes, scales, zeros = _core.quantize_rtn(w, Scheme(3, 64).key)
        found = (codes.tobytes(), scales.tobytes(), zeros.tobytes())
        expected = expected or found
        assert found == expected
    bitween.get_num_threads()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_is_refused(bad):
    w = random_weight(4, 100)
    w[2, 77] = bad
    with pytest.raises(ValueError, match="weight: expected finite"):
        bitween.quantize(w, Scheme(4))


def test_range_beyond_fp16_is_refused():
    with pytest.raises(ValueError, match="65504"):
        bitween.quantize(np.full((2, 32), 1e30, np.float32), Scheme(4))
