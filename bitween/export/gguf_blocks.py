"""A quantized matrix as GGUF blocks: the same numbers where a block type holds them, else re-rounded on its own grid.

Block types of 32 weights take one fp16 scale (and a minimum), so any of bitween's groups of 32, 64, 128 or a whole row
fits by repeating its scale. The K types hold 256 weights whose scales are small integers times one fp16: smaller, but
the scales are rounded, so the codes are chosen again. Layouts as `gguf.quants` decodes them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gguf import GGMLQuantizationType as Type

from bitween.quantized_tensor import QuantizedTensor
from bitween.scheme import Scheme

__all__ = ["block_type", "encode", "is_rounded"]

_BLOCK, _SUPER = 32, 256
_TRIES = 16  # candidates for the scale of scales


def block_type(scheme: Scheme, shape: tuple[int, int], exact: bool = False) -> Type | str:
    """The smallest block type that carries a (rows, cols) matrix under a scheme, or why there is none.

    Parameters
    ----------
    exact : only types that hold the same numbers (the minimum of Q4_1 and Q5_1 is rounded to fp16 all the same)
    """
    cols = shape[1]
    if cols % _BLOCK:
        return f"{cols} columns; GGUF's blocks hold {_BLOCK}"
    if not exact and cols % _SUPER == 0 and scheme.group_size in (-1, 16, 32, 64, 128):
        kind = _K_TYPES.get((scheme.levels, scheme.symmetric))
        if kind is not None and (scheme.group_size != 16 or kind in (Type.Q2_K, Type.Q3_K, Type.Q6_K)):
            return kind
    if scheme.group_size == 16:
        return f"groups of 16 in {cols} columns; GGUF's blocks there share one scale among {_BLOCK}"
    if scheme.symmetric:
        return Type.Q4_0 if scheme.levels <= 16 else Type.Q5_0 if scheme.levels == 32 else Type.Q8_0
    if scheme.levels == 256:
        return "asymmetric 8 bits; no block type of GGUF holds them" if exact else Type.Q8_0
    return Type.Q4_1 if scheme.levels <= 16 else Type.Q5_1 if scheme.levels == 32 else Type.Q8_0


def encode(tensor: QuantizedTensor, kind: Type) -> np.ndarray:
    """The matrix as blocks of a type that `block_type` gave, uint8 (rows, bytes of a row)."""
    return _ENCODERS[kind](tensor)


def is_rounded(scheme: Scheme, kind: Type) -> bool:
    """Whether `encode` chooses codes anew, so that numbers change."""
    return kind.name.endswith("_K") or (scheme.levels == 256 and not scheme.symmetric)


_K_TYPES = {
    **{(levels, symmetric): Type.Q2_K for levels in (2, 3, 4) for symmetric in (False, True)},
    (8, True): Type.Q3_K,
    (8, False): Type.Q4_K,
    (16, False): Type.Q4_K,
    (32, False): Type.Q5_K,
    (64, True): Type.Q6_K,
}


# ---- blocks of 32 ---------------------------------------------------------------------------------


def _parts(tensor: QuantizedTensor, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes int16 (rows, blocks, width); scales and zeros float32 (rows, blocks), repeated for each block."""
    rows, cols = tensor.shape
    codes = np.asarray(tensor.unpack_codes()).astype(np.int16).reshape(rows, cols // width, width)
    size = cols if tensor.scheme.group_size == -1 else tensor.scheme.group_size
    group = np.arange(cols // width) * width // size
    return codes, np.asarray(tensor.scales).astype(np.float32)[:, group], tensor.unpack_zeros()[:, group]


def _half(values: np.ndarray) -> np.ndarray:
    """fp16 as bytes, on a last axis of its own."""
    return np.ascontiguousarray(values.astype(np.float16))[..., None].view(np.uint8)


def _join(*parts: np.ndarray) -> np.ndarray:
    blocks = np.concatenate(parts, axis=-1)
    return blocks.reshape(blocks.shape[0], -1)


def _signed(tensor: QuantizedTensor) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers around zero and the scale they are multiplied with."""
    codes, scales, zeros = _parts(tensor, _BLOCK)
    if tensor.scheme.levels == 2 and tensor.scheme.symmetric:  # -1/2 and 1/2 of the scale
        return 2 * codes - 1, scales / 2
    return codes - zeros[..., None].astype(np.int16), scales


def _nibbles(codes: np.ndarray) -> np.ndarray:
    low = (codes & 15).astype(np.uint8)
    return low[..., :16] | low[..., 16:] << 4


def _fifth_bits(codes: np.ndarray) -> np.ndarray:
    return np.packbits((codes >> 4 & 1).astype(np.uint8), axis=-1, bitorder="little")


def _q4_0(tensor: QuantizedTensor) -> np.ndarray:
    numbers, scales = _signed(tensor)
    return _join(_half(scales), _nibbles(numbers + 8))


def _q5_0(tensor: QuantizedTensor) -> np.ndarray:
    numbers, scales = _signed(tensor)
    return _join(_half(scales), _fifth_bits(numbers + 16), _nibbles(numbers + 16))


def _q8_0(tensor: QuantizedTensor) -> np.ndarray:
    numbers, scales = _signed(tensor)
    if numbers.size and (numbers.max() > 127 or numbers.min() < -128):  # asymmetric 8 bits: round again, per block
        values = numbers * scales[..., None]
        scales = np.abs(values).max(axis=-1) / 127
        numbers = np.rint(_divide(values, scales.astype(np.float16).astype(np.float32)[..., None])).clip(-127, 127)
    return _join(_half(scales), numbers.astype(np.int8).view(np.uint8))


def _q4_1(tensor: QuantizedTensor) -> np.ndarray:
    codes, scales, zeros = _parts(tensor, _BLOCK)
    return _join(_half(scales), _half(-scales * zeros), _nibbles(codes))


def _q5_1(tensor: QuantizedTensor) -> np.ndarray:
    codes, scales, zeros = _parts(tensor, _BLOCK)
    return _join(_half(scales), _half(-scales * zeros), _fifth_bits(codes), _nibbles(codes))


# ---- blocks of 256 --------------------------------------------------------------------------------


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape), np.float32), where=b != 0)


def _whole(values: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative values as whole numbers 0..top times one fp16 of their superblock.

    Tries dividing the largest value by several whole numbers and keeps the least squared error.

    Parameters
    ----------
    values : float32 (rows, supers, parts)

    Returns
    -------
    numbers float32 of the same shape, and the fp16-valued step float32 (rows, supers, 1).
    """
    largest = values.max(axis=-1, keepdims=True)
    best = np.full(largest.shape, np.inf, np.float32)
    numbers, step = np.zeros_like(values), np.zeros_like(largest)
    for k in range(max(1, top - _TRIES + 1), top + 1):
        trial = (largest / k).astype(np.float16).astype(np.float32)
        rounded = np.rint(_divide(values, trial)).clip(0, top)
        error = ((rounded * trial - values) ** 2).sum(axis=-1, keepdims=True)
        better = error < best
        best = np.where(better, error, best)
        numbers, step = np.where(better, rounded, numbers), np.where(better, trial, step)
    return numbers, step


def _supers(tensor: QuantizedTensor, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values float32 (rows, supers, parts, width); steps, and minima as amounts below zero, float32 (rows, supers,
    parts)."""
    codes, scales, zeros = _parts(tensor, width)
    rows = len(codes)
    shape = (rows, -1, _SUPER // width)
    scales, zeros = scales.reshape(shape), zeros.reshape(shape)
    values = (codes.reshape(*shape, width) - zeros[..., None]) * scales[..., None]
    return values, scales, scales * zeros


def _with_minima(tensor: QuantizedTensor, width: int, top: int, levels: int) -> tuple[np.ndarray, ...]:
    """Codes again, on a grid whose scales and minima are whole numbers 0..top times an fp16 of each superblock."""
    values, scales, minima = _supers(tensor, width)
    s, d = _whole(scales, top)
    m, dmin = _whole(minima, top)
    codes = np.rint(_divide(values + (m * dmin)[..., None], (s * d)[..., None])).clip(0, levels - 1)
    return codes.astype(np.uint8), s.astype(np.uint8), m.astype(np.uint8), _half(d[..., 0]), _half(dmin[..., 0])


def _symmetric(tensor: QuantizedTensor, top: int, levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values, scales, _ = _supers(tensor, 16)
    s, d = _whole(scales, top)
    codes = (np.rint(_divide(values, (s * d)[..., None])) + levels // 2).clip(0, levels - 1)
    return codes.astype(np.uint8), s.astype(np.uint8), _half(d[..., 0])


def _quarters(codes: np.ndarray) -> np.ndarray:
    """Two low bits of 256 codes in 64 bytes: 32 codes in each pair of bits, four runs in 32 bytes."""
    runs = (codes & 3).reshape(*codes.shape[:2], 2, 4, 32)
    return (
        (runs << np.array([0, 2, 4, 6], np.uint8)[:, None]).sum(axis=-2, dtype=np.uint8).reshape(*codes.shape[:2], 64)
    )


def _six_bits(s: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Eight scales and eight minima of six bits in 12 bytes, as Q4_K and Q5_K keep them."""
    low = s[..., :4] | (s[..., 4:] >> 4) << 6
    middle = m[..., :4] | (m[..., 4:] >> 4) << 6
    return np.concatenate([low, middle, (s[..., 4:] & 15) | (m[..., 4:] & 15) << 4], axis=-1)


def _halves(codes: np.ndarray) -> np.ndarray:
    """Four low bits of 256 codes in 128 bytes: runs of 32 in low and high nibbles by turns."""
    runs = (codes & 15).reshape(*codes.shape[:2], 4, 2, 32)
    return (runs[..., 0, :] | runs[..., 1, :] << 4).reshape(*codes.shape[:2], 128)


def _q2_k(tensor: QuantizedTensor) -> np.ndarray:
    codes, s, m, d, dmin = _with_minima(tensor, 16, 15, 4)
    return _join(s | m << 4, _quarters(codes), d, dmin)


def _q3_k(tensor: QuantizedTensor) -> np.ndarray:
    codes, s, d = _symmetric(tensor, 31, 8)
    s = s + 32  # stored with an offset
    high = (codes >> 2).reshape(*codes.shape[:2], 8, 32) << np.arange(8, dtype=np.uint8)[:, None]
    nibbles = (s & 15)[..., :8] | (s & 15)[..., 8:] << 4
    tops = ((s >> 4).reshape(*s.shape[:2], 4, 4) << np.array([0, 2, 4, 6], np.uint8)[:, None]).sum(-2, dtype=np.uint8)
    return _join(high.sum(axis=-2, dtype=np.uint8), _quarters(codes), nibbles, tops, d)


def _q4_k(tensor: QuantizedTensor) -> np.ndarray:
    codes, s, m, d, dmin = _with_minima(tensor, 32, 63, 16)
    return _join(d, dmin, _six_bits(s, m), _halves(codes))


def _q5_k(tensor: QuantizedTensor) -> np.ndarray:
    codes, s, m, d, dmin = _with_minima(tensor, 32, 63, 32)
    fifth = codes.reshape(*codes.shape[:2], 8, 32) >> 4 << np.arange(8, dtype=np.uint8)[:, None]
    return _join(d, dmin, _six_bits(s, m), fifth.sum(axis=-2, dtype=np.uint8), _halves(codes))


def _q6_k(tensor: QuantizedTensor) -> np.ndarray:
    codes, s, d = _symmetric(tensor, 127, 64)
    runs = codes.reshape(*codes.shape[:2], 2, 4, 32)
    low = (runs[..., :2, :] & 15) | (runs[..., 2:, :] & 15) << 4
    high = ((runs >> 4) << np.array([0, 2, 4, 6], np.uint8)[:, None]).sum(axis=-2, dtype=np.uint8)
    return _join(low.reshape(*codes.shape[:2], 128), high.reshape(*codes.shape[:2], 64), s, d)


_ENCODERS: dict[Type, Callable[[QuantizedTensor], np.ndarray]] = {
    Type.Q4_0: _q4_0,
    Type.Q4_1: _q4_1,
    Type.Q5_0: _q5_0,
    Type.Q5_1: _q5_1,
    Type.Q8_0: _q8_0,
    Type.Q2_K: _q2_k,
    Type.Q3_K: _q3_k,
    Type.Q4_K: _q4_k,
    Type.Q5_K: _q5_k,
    Type.Q6_K: _q6_k,
}
