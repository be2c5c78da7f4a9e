"""search: the same errors as quantizing with each scheme and measuring."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bitween
from bitween import Scheme, _core
from bitween.scheme import BITS, GROUP_SIZES
from tests import reference

ISAS = bitween.info()["isas"]
SCHEMES = [Scheme(b, g, s) for b in BITS for g in GROUP_SIZES for s in (False, True)]


def random_weight(rows, cols, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, cols)) * np.exp(2 * rng.standard_normal((rows, 1)))).astype(np.float32)


def expected_errors(w, schemes, method="rtn", importance=None, row_importance=None):
    counts = np.ones(w.shape) if importance is None else np.broadcast_to(np.asarray(importance, np.float64), w.shape)
    rows = np.ones(len(w)) if row_importance is None else row_importance
    errors = []
    for scheme in schemes:
        back = bitween.quantize(w, scheme, method=method, importance=importance).dequantize()
        errors.append((reference.weighted_error(w, back, counts) * rows).sum())
    return np.array(errors)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(0, 7),
    cols=st.integers(0, 330),
    first=st.integers(0, len(SCHEMES) - 1),
    kind=st.sampled_from(["none", "columns", "matrix"]),
    by_row=st.booleans(),
    isa=st.sampled_from(ISAS),
    ranges=st.sampled_from(["minmax", "minmax", "clip"]),
    seed=st.integers(0, 999),
)
def test_equals_quantize_and_measure(rows, cols, first, kind, by_row, isa, ranges, seed):
    w = random_weight(rows, cols, seed)
    rng = np.random.default_rng(seed)
    importance = {"none": None, "columns": rng.random(cols, np.float32), "matrix": rng.random((rows, cols), np.float32)}
    row_importance = rng.random(rows) if by_row else None
    step = 7 if ranges == "minmax" else 23
    schemes = SCHEMES[first::step] + SCHEMES[: first or None : step]
    _core.set_isa(isa)
    found = bitween.search(w, schemes, importance[kind], row_importance=row_importance, ranges=ranges)
    expected = expected_errors(w, schemes, {"minmax": "rtn"}.get(ranges, ranges), importance[kind], row_importance)
    _core.set_isa(None)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize("isa", ISAS)
def test_every_scheme_and_scale(isa):
    """Ranges from 1e-9, below fp16's normal numbers, to 1e4: scales round up as quantize rounds them."""
    w = random_weight(64, 200) * np.logspace(-9, 2, 64, dtype=np.float32)[:, None]
    _core.set_isa(isa)
    for row in (w[:1], w[5:6], w[20:21], w[63:], w):
        found = bitween.search(row, SCHEMES)
        np.testing.assert_allclose(found, expected_errors(row, SCHEMES), rtol=2e-5)
    _core.set_isa(None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_strides(dtype):
    w = torch.randn(50, 96).to(dtype)
    expected = bitween.search(w.float(), SCHEMES[:20], torch.ones(96))
    for view in (w, w.T.contiguous().T, torch.stack([w, w], 2)[:, :, 1]):
        np.testing.assert_array_equal(bitween.search(view, SCHEMES[:20], torch.ones(50, 96).to(dtype)), expected)


def test_same_bytes_for_any_number_of_threads():
    w, importance = random_weight(700, 300), np.random.default_rng(1).random(300, np.float32)
    keys = tuple(s.key for s in SCHEMES[::9])
    found = set()
    for n in (1, 2, 3, 8):
        _core.set_num_threads(n)
        found.add(_core.search(w, keys, importance, None, False).tobytes())
    bitween.get_num_threads()
    assert len(found) == 1


def test_clip_is_never_worse():
    w = random_weight(30, 320)
    assert (bitween.search(w, SCHEMES, ranges="clip") <= bitween.search(w, SCHEMES) * (1 + 1e-4)).all()


def test_no_schemes():
    assert bitween.search(random_weight(3, 20), []).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"importance": np.full(20, -1, np.float32)}, "importance: expected finite values >= 0"),
        ({"importance": np.ones((2, 20), np.float32)}, r"importance: expected shape \(3, 20\)"),
        ({"row_importance": [1, -1, 1]}, "importance: expected finite values >= 0"),
        ({"row_importance": [1, np.nan, 1]}, "importance: expected finite values >= 0"),
        ({"row_importance": [1, 1]}, r"row_importance: expected shape \(3,\); got \(2,\)"),
        ({"ranges": "best"}, "ranges: expected 'minmax' or 'clip'; got 'best'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        bitween.search(random_weight(3, 20), [Scheme(4)], **arguments)


def test_bad_weights():
    w = random_weight(3, 40)
    w[1, 33] = np.inf
    for ranges in ("minmax", "clip"):
        with pytest.raises(ValueError, match="weight: expected finite"):
            bitween.search(w, [Scheme(4)], ranges=ranges)
    with pytest.raises(ValueError, match="65504"):
        bitween.search(np.full((2, 32), 1e30, np.float32), [Scheme(4, 16)])
    with pytest.raises(TypeError, match="schemes: expected Schemes"):
        bitween.search(random_weight(3, 40), ["4b g64 sym"])


def test_the_largest_importance_with_a_row_of_none():
    weight = np.random.default_rng(3).normal(size=(2, 64)).astype(np.float32)
    importance = np.full((2, 64), 3e38, np.float32)
    found = bitween.search(weight, [Scheme(4, 32)], importance, row_importance=np.array([0, 1e-38], np.float32))
    expected = bitween.search(weight[1:], [Scheme(4, 32)])
    np.testing.assert_allclose(found, expected * 3.0, rtol=1e-5)
