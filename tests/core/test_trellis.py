"""Trellis codes against a plain decoder, the best tail-biting path, float64 products, and bad input."""

from __future__ import annotations

import numpy as np
import pytest

from bitween import _core

ISAS = _core.info()["isas"]
BITS = (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5)


@pytest.fixture(autouse=True)
def _restore():
    yield
    _core.set_isa(None)
    _core.set_num_threads(1)


def values_of(states, width):
    multiplier, addend = (0x83DCD12D, 0) if width == 16 else (34038481, 76625530)
    h = (states.astype(np.uint64) * multiplier + addend).astype(np.uint32)
    return sum((h >> shift & 255).astype(int) for shift in (0, 8, 16, 24)) - 510


def decode(codes, scales, rates, width, cols):
    """Bit by bit."""
    rows = len(scales)
    out = np.zeros((codes.shape[0] * 16, len(rates) * 16))
    for i, row in enumerate(codes):
        at = 0
        for j, rate in enumerate(map(int, rates)):
            bits = np.unpackbits(row[at : at + 32 * rate])
            at += 32 * rate
            ends = rate * (np.arange(256) + 1)
            window = bits[(ends[:, None] - width + np.arange(width)) % len(bits)]
            states = window.astype(int) @ (1 << np.arange(width - 1, -1, -1))
            out[16 * i : 16 * i + 16, 16 * j : 16 * j + 16] = values_of(states, width).reshape(16, 16).T
    return out[:rows, :cols] / 128 * scales.astype(float)[:, None]


def gaussian(rows, cols, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def dequantize(parts, width, cols):
    out = np.empty((len(parts[1]), cols), np.float32)
    _core.dequantize_trellis(*parts, width, cols, out)
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "cols", "width"), [(33, 70, 12), (1, 1, 10), (16, 129, 16)])
def test_decoding_and_products(isa, bits, rows, cols, width):
    weight, x = gaussian(rows, cols), gaussian(21, cols, 1)
    parts = _core.quantize_trellis(weight, None, bits, width)[0]
    _core.set_isa(isa)
    expected = decode(*parts, width, cols)
    np.testing.assert_array_equal(dequantize(parts, width, cols), expected)
    for n, mode, bound in ((1, 0, 1e-5), (5, 0, 1e-5), (6, 1, 0.03), (5, 2, 2e-4), (21, 0, 1e-5)):
        reference = x[:n].astype(float) @ expected.T
        found = {}
        for threads in (1, 2, 8):
            _core.set_num_threads(threads)
            out = np.empty((n, rows), np.float32)
            _core.matmul_trellis(x[:n], *parts, width, cols, None, out, mode)
            found[out.tobytes()] = out
        assert len(found) == 1
        scale = np.abs(x[:n]).max() * np.abs(expected).max() * np.sqrt(cols)
        assert np.abs(out - reference).max() <= bound * scale


def test_bytes_depend_on_neither_threads_nor_set():
    weight, inputs = gaussian(50, 75), gaussian(200, 75, 1)
    hessian = inputs.T @ inputs / 200
    found = set()
    for isa in ISAS:
        for threads in (1, 2, 8):
            _core.set_isa(isa)
            _core.set_num_threads(threads)
            found.add(b"".join(p.tobytes() for p in _core.quantize_trellis(weight, hessian, 2.5)[0]))
    assert len(found) == 1


@pytest.mark.parametrize("bits", [2, 3.5, 5])
def test_exact_products_have_the_same_bytes_on_every_set(bits):
    weight, x = gaussian(70, 150), gaussian(5, 150, 1)
    parts, found = _core.quantize_trellis(weight, None, bits, 10)[0], set()
    for isa in ISAS:
        _core.set_isa(isa)
        for threads in (1, 3):
            _core.set_num_threads(threads)
            out = np.empty((5, 70), np.float32)
            _core.matmul_trellis(x, *parts, 10, 150, gaussian(1, 70, 2)[0], out, 0)
            found.add(out.tobytes())
    assert len(found) == 1


@pytest.mark.parametrize(("bits", "bound"), [(1, 0.281), (2, 0.0751), (3, 0.0196), (4, 0.0051), (5, 0.0014)])
def test_gaussian_error(bits, bound):
    weight = gaussian(64, 512)
    parts, errors, _, _ = _core.quantize_trellis(weight, None, bits)
    error = ((weight - dequantize(parts, 12, 512)) ** 2).mean()
    assert error < bound
    assert errors.sum() == pytest.approx(error * weight.size, rel=1e-3)


def best_ring(x, values, rate, width):
    """The least cost over all tail-biting paths: one search for each group that the seam may have, all at once."""
    groups = 1 << (width - rate)
    costs = np.where(np.eye(groups, dtype=bool), 0.0, np.inf)  # (seam, group)
    for weight in x:
        total = np.repeat(costs, 1 << rate, axis=1) + (weight - values) ** 2
        costs = total.reshape(groups, 1 << rate, groups).min(1)
    return np.diag(costs).min()


@pytest.mark.parametrize("rate", [2, 3, 4])
def test_paths_are_near_the_best(rate):
    width, found, best = 10, 0.0, 0.0
    for seed in range(6):
        tile = gaussian(16, 16, seed)
        parts = _core.quantize_trellis(tile, None, rate, width, refit=False)[0]
        step = parts[1].astype(float)[:, None] / 128
        ours = dequantize(parts, width, 16)
        found += (((tile - ours) / step) ** 2).sum()
        best += best_ring((tile / step).T.ravel(), values_of(np.arange(1 << width), width), rate, width)
    assert best * (1 - 1e-9) <= found <= 1.01 * best


def test_feedback_lowers_the_error():
    weight, inputs = gaussian(48, 96), gaussian(300, 96, 1) @ gaussian(96, 96, 2)
    hessian = inputs.T @ inputs / 300
    for bits in (2, 2.5, 4):
        with_it = _core.quantize_trellis(weight, hessian, bits)
        without = _core.quantize_trellis(weight, None, bits)
        cost = [
            np.einsum("ri,ij,rj->r", e, hessian, e)
            for e in (weight - dequantize(p[0], 12, 96) for p in (with_it, without))
        ]
        np.testing.assert_allclose(with_it[1], cost[0], rtol=5e-3)
        assert cost[0].sum() < 0.8 * cost[1].sum()


def test_extremes():
    for weight in (np.zeros((20, 40)), np.full((20, 40), 1e-30), np.eye(20, 40)):
        error = np.abs(dequantize(_core.quantize_trellis(weight.astype(np.float32), None, 3)[0], 12, 40) - weight)
        assert error.max() <= max(4 * 2.0**-24, np.abs(weight).max())
    with pytest.raises(ValueError, match="fp16"):
        _core.quantize_trellis(np.full((2, 20), 1e30, np.float32), None, 3)
    with pytest.raises(ValueError, match="finite"):
        _core.quantize_trellis(np.full((2, 20), np.nan, np.float32), None, 3)
    for bits, width in ((0.5, 12), (5.5, 12), (2.2, 12), (3, 9), (3, 17)):
        with pytest.raises(ValueError, match=r".+"):
            _core.quantize_trellis(gaussian(2, 20), None, bits, width)


def test_bad_storage():
    codes, scales, rates = _core.quantize_trellis(gaussian(20, 40), None, 3)[0]
    out = np.empty((20, 40), np.float32)
    for bad in (
        (codes[:1], scales, rates),
        (codes, scales, rates[:2]),
        (codes, scales, rates * 0),
        (codes, scales, rates + 3),
    ):
        with pytest.raises(ValueError, match=r".+"):
            _core.dequantize_trellis(*bad, 12, 40, out)
    for scale in (0, -1, np.inf, np.nan):
        wrong = scales.copy()
        wrong[7] = scale
        with pytest.raises(ValueError, match="scales"):
            _core.dequantize_trellis(codes, wrong, rates, 12, 40, out)
        with pytest.raises(ValueError, match="scales"):
            _core.matmul_trellis(np.ones((1, 40), np.float32), codes, wrong, rates, 12, 40, None, out[:1, :20].copy())


def turned_parts(rows, cols, rate, seed=0):
    """Random codes: every one is legal."""
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, 256, (rows // 16, cols // 16 * 32 * rate), np.uint8)
    scales = draw.uniform(0.5, 2, rows).astype(np.float16)
    return codes, scales, np.full(cols // 16, rate, np.uint8)


def decode_turned(codes, scales, rates):
    rows, cols = len(scales), 16 * len(rates)
    ones = np.full(rows, 128, np.float16)
    sequence = decode(codes, ones, rates, 16, cols).reshape(rows // 16, 16, cols // 16, 16).transpose(0, 2, 3, 1)
    values = np.zeros((rows // 16, cols // 16, 16, 16))  # tile, tile, row, column
    for i in range(256):
        lane, k = i // 8, i % 8
        column, row = lane % 4 * 2 + k % 2 + (8 if k & 2 else 0), lane // 4 + (8 if k & 4 else 0)
        values[:, :, row, column] = sequence.reshape(rows // 16, cols // 16, 256)[:, :, i]
    i = np.arange(128)
    parity = np.array([bin(n).count("1") % 2 for n in range(128)])
    turn, signs = 1 - 2 * parity[i[:, None] & i], 1 - 2 * parity[i & i >> 1 & 0x15]
    blocks = values.transpose(0, 2, 1, 3).reshape(rows // 128, 128, cols // 128, 128)
    plain = np.einsum("ij,ajbk,kl->aibl", turn, blocks, turn) * signs[:, None, None] * signs
    return plain.reshape(rows, cols) * scales.astype(float)[:, None] / 128**2


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rate", [1, 2, 3, 4, 5])
def test_turned_decoding_and_products(isa, rate):
    parts, x, bias = turned_parts(256, 384, rate), gaussian(21, 384, 1), gaussian(1, 256, 2)[0]
    _core.set_isa(isa)
    expected, found = decode_turned(*parts), set()
    for threads in (1, 3):
        _core.set_num_threads(threads)
        out = np.empty((256, 384), np.float32)
        _core.dequantize_trellis(*parts, 16, 384, out, turned=True)
        np.testing.assert_array_equal(out, expected.astype(np.float32))
        part = np.empty((40, 384), np.float32)
        _core.dequantize_trellis(*parts, 16, 384, part, 100, True)
        np.testing.assert_array_equal(part, out[100:140])
        for n in (1, 5, 21):
            product = np.empty((n, 256), np.float32)
            _core.matmul_trellis(x[:n], *parts, 16, 384, bias, product, 0, True)
            assert np.abs(product - (x[:n].astype(float) @ expected.T + bias)).max() < 1e-4 * np.abs(product).max()
        found.add(product.tobytes())
    assert len(found) == 1


def test_turned_bad_input():
    parts = turned_parts(128, 128, 2)
    out = np.empty((128, 128), np.float32)
    with pytest.raises(ValueError, match="codes: "):
        _core.dequantize_trellis(*parts, 12, 128, out, turned=True)
    mixed = (np.zeros((8, 8 * 32 * 2), np.uint8), parts[1], np.array([1, 3] * 4, np.uint8))
    with pytest.raises(ValueError, match="codes: "):
        _core.dequantize_trellis(*mixed, 16, 128, out, turned=True)
    ragged = turned_parts(128, 144, 2)
    with pytest.raises(ValueError, match="codes: "):
        _core.dequantize_trellis(*ragged, 16, 144, np.empty((128, 144), np.float32), turned=True)
    for shape, bits, width in (((128, 144), 2, 16), ((128, 128), 2.5, 16), ((128, 128), 2, 12)):
        with pytest.raises(ValueError, match="weight: "):
            _core.quantize_trellis(gaussian(*shape), None, bits, width, turned=True)
    wrong = (parts[0], np.zeros(128, np.float16), parts[2])
    with pytest.raises(ValueError, match="scale"):
        _core.matmul_trellis(gaussian(1, 128), *wrong, 16, 128, None, np.empty((1, 128), np.float32), 0, True)


def test_a_thorough_search_leaves_less():
    weight, errors = gaussian(32, 128), []
    for thorough in (False, True):
        parts = _core.quantize_trellis(weight, None, 3, 13, thorough=thorough, refit=False)[0]
        errors.append(((weight - dequantize(parts, 13, 128)) ** 2).mean())
    assert errors[0] > errors[1]
