"""Oracles in NumPy: the only second implementation of what the core computes, written for clarity."""

from __future__ import annotations

import numpy as np


def level_bits(levels: int) -> int:
    return (levels - 1).bit_length()


def groups(cols: int, group_size: int) -> list[slice]:
    size = cols if group_size == -1 else group_size
    return [slice(i, min(i + size, cols)) for i in range(0, cols, size)] if cols else []


def fp16_up(x: np.ndarray) -> np.ndarray:
    """The smallest fp16 number not below x."""
    half = x.astype(np.float16)
    low = half.astype(np.float32) < x
    return np.where(low, np.nextafter(half, np.float16(np.inf)), half).astype(np.float16)


def rtn_grid(w: np.ndarray, scheme) -> tuple[np.ndarray, np.ndarray]:
    """(scales fp16, zeros float32), each (rows, n_groups), of min-max ranges."""
    w = w.astype(np.float32)
    top = np.float32(scheme.levels - 1)
    scales, zeros = [], []
    for part in groups(w.shape[1], scheme.group_size):
        g = w[:, part]
        low, high = np.minimum(g.min(1), 0), np.maximum(g.max(1), 0)
        if not scheme.symmetric:
            step = high / top - low / top
        elif scheme.levels == 2:
            step = 2 * np.abs(g.astype(np.float64)).mean(1).astype(np.float32)
        else:
            step = np.maximum(high / (top - np.float32(scheme.zero)), -low / np.float32(scheme.zero))
        scale = fp16_up(step)
        scale[scale == 0] = np.float16(2.0**-24)
        inverse = np.float32(1) / scale.astype(np.float32)
        zero = np.full_like(step, scheme.zero) if scheme.symmetric else np.minimum(np.rint(-low * inverse), top)
        scales.append(scale)
        zeros.append(zero)
    return np.stack(scales, 1), np.stack(zeros, 1)


def encode(w: np.ndarray, scales: np.ndarray, zeros: np.ndarray, scheme) -> np.ndarray:
    """Codes (rows, cols), one a byte: clamp(rint(w * (1/scale) + zero))."""
    codes = np.empty(w.shape, np.uint8)
    for g, part in enumerate(groups(w.shape[1], scheme.group_size)):
        inverse = np.float32(1) / scales[:, g : g + 1].astype(np.float32)
        q = np.rint(w[:, part].astype(np.float32) * inverse + zeros[:, g : g + 1])
        codes[:, part] = np.clip(q, 0, scheme.levels - 1)
    return codes


def decode(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, scheme) -> np.ndarray:
    out = np.empty(codes.shape, np.float32)
    for g, part in enumerate(groups(codes.shape[1], scheme.group_size)):
        out[:, part] = (codes[:, part] - zeros[:, g : g + 1]) * scales[:, g : g + 1].astype(np.float32)
    return out


def pack(codes: np.ndarray, levels: int) -> np.ndarray:
    """Packed rows, uint8 (rows, row_bytes), padded to 4 bytes."""
    rows, cols = codes.shape
    if levels == 3:
        padded = np.pad(codes, ((0, 0), (0, -cols % 5))).reshape(rows, -1, 5).astype(np.int64)
        packed = (padded @ 3 ** np.arange(5)).astype(np.uint8)
    else:
        bits = level_bits(levels)
        stream = (codes[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
        packed = np.packbits(stream.reshape(rows, -1).astype(np.uint8), axis=1, bitorder="little")
    return np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))


def pack_zeros(zeros: np.ndarray, levels: int) -> np.ndarray:
    bits = level_bits(levels)
    stream = (zeros.astype(np.uint8)[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(stream.reshape(len(zeros), -1).astype(np.uint8), axis=1, bitorder="little")


def weighted_error(w: np.ndarray, back: np.ndarray, importance: np.ndarray | float = 1.0) -> np.ndarray:
    """sum of importance * (w - back)^2 of each row, float64 (rows,)."""
    return (importance * (w.astype(np.float64) - back) ** 2).sum(1)


def brute_force_clip(w: np.ndarray, importance: np.ndarray, scheme) -> np.ndarray:
    """Least weighted error of each row as one group, over every fp16 scale that may serve and every zero; (rows,)."""
    top = scheme.levels - 1
    zeros = [scheme.zero] if scheme.symmetric else range(scheme.levels)
    best = np.full(len(w), np.inf)
    for row, (values, counts) in enumerate(zip(w.astype(np.float32), importance.astype(np.float64), strict=True)):
        widest = 2 * np.abs(values).max() / (1 if scheme.symmetric and top > 2 else top)
        first, last = np.float16([widest * 0.02, widest * 1.2]).view(np.uint16)
        scales = np.arange(max(first, 1), last, dtype=np.uint16).view(np.float16).astype(np.float32)[:, None]
        for zero in zeros:
            q = np.clip(np.rint(values * (1 / scales) + np.float32(zero)), 0, top)
            errors = (counts * (values - (q - zero) * scales.astype(np.float64)) ** 2).sum(1)
            best[row] = min(best[row], errors.min())
    return best
