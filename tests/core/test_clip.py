"""quantize_clip: near the brute-force optimum, never behind round to nearest, the same bytes everywhere."""

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


def random_weight(rows, cols, seed=0, tails=3.0):
    rng = np.random.default_rng(seed)
    return (rng.standard_t(tails, (rows, cols)) + rng.standard_normal((rows, 1))).astype(np.float32)


def random_importance(rows, cols, seed=0):
    return np.exp(1.5 * np.random.default_rng(seed + 1).standard_normal((rows, cols))).astype(np.float32)


def clip(w, scheme, importance=None):
    return bitween.quantize(w, scheme, method="clip", importance=importance)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("bits", "cols"), [(1, 16), (1.58, 32), (2, 16), (2, 64), (3, 32), (4, 16), (4, 64)])
def test_near_brute_force(bits, cols, weighted, symmetric):
    scheme = Scheme(bits, -1, symmetric)
    rows = 24 if bits * cols < 128 else 8
    w = random_weight(rows, cols, seed=cols, tails=4 + 10 * (cols % 3))
    importance = random_importance(rows, cols, cols) if weighted else np.ones((rows, cols), np.float32)
    errors = reference.weighted_error(w, clip(w, scheme, importance).dequantize(), importance)
    ratio = errors / reference.brute_force_clip(w, importance, scheme)
    assert (ratio < 1.01).mean() >= 0.95, ratio
    assert ratio.mean() < 1.01


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    cols=st.integers(0, 200),
    scheme=st.sampled_from(SCHEMES),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    kind=st.sampled_from(["none", "columns", "matrix", "sparse"]),
    transposed=st.booleans(),
    isa=st.sampled_from(ISAS),
    seed=st.integers(0, 999),
)
def test_never_worse_than_rtn(rows, cols, scheme, dtype, kind, transposed, isa, seed):
    w = torch.from_numpy(random_weight(rows, cols, seed)).to(dtype)
    counts = torch.from_numpy(random_importance(rows, cols, seed)).to(dtype)
    if kind == "sparse":
        counts *= torch.from_numpy(np.random.default_rng(seed).random((rows, cols)) < 0.3)
    elif kind == "columns":
        counts = counts[:1].expand(rows, cols) if rows else counts
    elif kind == "none":
        counts = torch.ones_like(counts)
    given_counts = {"none": None, "columns": counts[0] if rows else torch.ones(cols)}.get(kind, counts)
    if transposed:
        w = w.T.contiguous().T
    _core.set_isa(isa)
    best, plain = clip(w, scheme, given_counts).dequantize(), bitween.quantize(w, scheme).dequantize()
    _core.set_isa(None)
    for part in reference.groups(cols, scheme.group_size):
        group, importance = w[:, part].float().numpy(), counts[:, part].float().numpy()
        ours, theirs = (reference.weighted_error(group, x[:, part], importance) for x in (best, plain))
        assert (ours <= theirs * (1 + 1e-4) + 1e-12).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_bytes_do_not_depend_on_isa_or_threads(bits, symmetric):
    w, importance = random_weight(40, 333), random_importance(40, 333)
    w *= np.exp(4 * np.random.default_rng(2).standard_normal((40, 1))).astype(np.float32)
    found = set()
    for i, isa in enumerate(ISAS):
        _core.set_isa(isa)
        _core.set_num_threads((1, 2, 3, 8)[i])
        for counts in (importance, None):
            parts = _core.quantize_clip(w, Scheme(bits, 64, symmetric).key, counts)
            found.add((counts is None, *(None if p is None else p.tobytes() for p in parts)))
    _core.set_isa(None)
    bitween.get_num_threads()
    assert len(found) == 2


@pytest.mark.parametrize("scheme", [Scheme(2, 32), Scheme(4, 64, True), Scheme(1, -1)], ids=str)
def test_only_the_ratios_of_importance_count(scheme):
    w, importance = random_weight(6, 100), random_importance(1, 100)[0]
    expected = clip(w, scheme, importance)
    for same in (np.tile(importance, (6, 1)), importance * 2.0**-140, importance * 2.0**100):
        np.testing.assert_array_equal(clip(w, scheme, same).codes, expected.codes)
    np.testing.assert_array_equal(clip(w, scheme, np.zeros(100, np.float32)).codes, clip(w, scheme).codes)


def test_an_outlier_without_importance_is_ignored():
    w, importance = random_weight(8, 64, tails=30), np.ones((8, 64), np.float32)
    w[:, 5], importance[:, 5] = 1e4, 0
    errors = reference.weighted_error(w, clip(w, Scheme(4, 64), importance).dequantize(), importance)
    alone = reference.weighted_error(w, bitween.quantize(w * importance, Scheme(4, 64)).dequantize(), importance)
    assert (errors <= alone * 1.0001).all()


@pytest.mark.parametrize("scheme", SCHEMES[::3], ids=str)
def test_special_groups(scheme):
    w = np.zeros((4, 64), np.float32)
    w[1], w[2], w[3] = 1e-30, -3.5, 3e4
    for importance in (None, random_importance(4, 64)):
        back = clip(w, scheme, importance).dequantize()
        assert np.isfinite(back).all()
        assert (back[0] == 0).all() or (scheme.symmetric and scheme.levels == 2)
        np.testing.assert_allclose(back[2:], w[2:], rtol=2e-3)


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (np.full((4, 100), -1, np.float32), "importance: expected finite values >= 0"),
        (np.full((4, 100), np.nan, np.float32), "importance: expected finite values >= 0"),
        (np.full(100, np.inf, np.float32), "importance: expected finite values >= 0"),
        (np.ones((4, 99), np.float32), r"importance: expected shape \(4, 100\); got \(4, 99\)"),
        (np.ones(101, np.float32), r"importance: expected shape \(4, 100\); got \(4, 101\)"),
        (np.ones((1, 4, 100), np.float32), "importance: expected 2 dimensions"),
    ],
)
def test_bad_importance(importance, message):
    with pytest.raises(ValueError, match=message):
        clip(random_weight(4, 100), Scheme(4), importance)


def test_bad_dtypes_and_weights():
    w = random_weight(4, 100)
    with pytest.raises(TypeError, match="importance: expected dtype float32"):
        clip(w, Scheme(4), np.ones(100, np.int32))
    w[2, 77] = np.nan
    with pytest.raises(ValueError, match="weight: expected finite"):
        clip(w, Scheme(4))
    with pytest.raises(ValueError, match="65504"):
        clip(np.full((2, 32), 1e30, np.float32), Scheme(4))
