"""Trellis codes of a matrix between two Hadamard transforms, as EXL3 stores them.

W = diag(scales * signs) H V H diag(signs) / 128, with V the values of the codes in steps of 1/128 and H the Hadamard
matrix of each 128 rows or columns. Errors E of V cost tr(E A ET) with A = H S moments S H / 128, so the search is that
of any trellis, on other numbers: a weight far from its neighbours is spread over its block first, and its error too.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from bitween import _core
from bitween.quantized_tensor import QuantizedTensor
from bitween.rounding.gptq import GptqResult
from bitween.scheme import TURN, Scheme

__all__ = ["hadamard", "signs", "turned"]

_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # of float16 scales


@cache
def hadamard() -> np.ndarray:
    """The orthogonal Hadamard matrix of Sylvester's order, float32 (128, 128), its own inverse."""
    matrix = np.ones((1, 1))
    while len(matrix) < TURN:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / np.sqrt(TURN)).astype(np.float32)


@cache
def signs() -> np.ndarray:
    """Signs of each 128 rows or columns, float32 (128,), those of csrc/core/codec/trellis.h."""
    i = np.arange(TURN)
    odd = sum((i & i >> 1 & 0x15) >> bit & 1 for bit in range(7)) % 2
    return (1 - 2 * odd).astype(np.float32)


def turned(
    weight: Any, scheme: Scheme, moments: Any, importance: np.ndarray | None, damping: float, thorough: bool
) -> GptqResult:
    """Code a matrix whose rows and columns are multiples of 128; arguments as in `bitween.rounding.trellis.trellis`.

    Rows are brought to one deviation, turned, and coded with one scale for all; at the end each row gets the scale that
    fits it best under `moments`.

    Raises
    ------
    ValueError
        a shape that has no whole blocks, a weight that is not finite, or one that needs a scale beyond float16.
    """
    scheme.layout(*weight.shape)  # refuses shapes without whole blocks
    plain = _as_float32(weight)
    if not np.isfinite(plain).all():
        raise ValueError("weight: expected finite numbers; got NaN or infinity")
    costs = None if moments is None else np.asarray(moments, np.float32)
    deviation = np.sqrt((plain.astype(np.float64) ** 2).mean(1, keepdims=True))
    even = (plain / np.where(deviation > 0, deviation, 1)).astype(np.float32)
    target = _right(_right(even * np.tile(signs(), plain.shape[1] // TURN)).T * np.tile(signs(), len(plain) // TURN)).T
    size = float(np.sqrt((target.astype(np.float64) ** 2).mean()))
    target = np.ascontiguousarray(target / (size or 1), np.float32)
    if costs is None and importance is not None:
        costs = np.diag(importance)
    square = None
    if costs is not None:
        turn = np.tile(signs(), len(costs) // TURN)
        square = np.ascontiguousarray(_right(_right(costs * turn * turn[:, None]).T))
    (codes, _, rates), _, used, dead = _core.quantize_trellis(
        target, square, float(scheme.bits), scheme.width, None, damping, True, False, thorough, True
    )
    scales = np.ones((len(plain), 1), np.float16)
    levels = QuantizedTensor(codes, scales, rates, scheme, plain.shape).dequantize()
    pull = levels if costs is None else levels @ costs
    curve = (pull.astype(np.float64) * levels).sum(1)
    best = (pull.astype(np.float64) * plain).sum(1) / np.where(curve > 0, curve, 1)
    best = np.where(best > 0, best, deviation[:, 0] * size)  # a row that errors have turned round
    if best.max(initial=0) > _LARGEST:
        raise ValueError(f"weight: expected rows that need scales up to {_LARGEST:g}; got {best.max():g}")
    scales = np.maximum(best, _SMALLEST).astype(np.float16)[:, None]
    left = plain - levels * scales.astype(np.float32)
    errors = (left.astype(np.float64) * (left if costs is None else left @ costs)).sum(1)
    stored = QuantizedTensor(codes, scales, rates, scheme, plain.shape)
    return GptqResult(stored, np.maximum(errors, 0), used, dead, weight)


def _as_float32(weight: Any) -> np.ndarray:
    return np.asarray(weight.float() if hasattr(weight, "float") else weight, np.float32)


def _right(matrix: np.ndarray) -> np.ndarray:
    """The matrix times H in each 128 columns."""
    rows, cols = matrix.shape
    return (matrix.reshape(-1, TURN) @ hadamard()).reshape(rows, cols)
