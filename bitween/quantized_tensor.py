"""QuantizedTensor: codes, scales and zeros of one matrix, and its Scheme."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitween import _core, trellis
from bitween._threads import follow_torch
from bitween.scheme import Scheme

__all__ = ["QuantizedTensor"]

MODES = {"exact": 0, "int8": 1, "int16": 2}  # as the core numbers them
_NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16}


def as_input(tensor: Any) -> Any:
    """A tensor that the core may borrow: without its autograd history, lazy bits resolved."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach()
        if tensor.is_neg() or tensor.is_conj():
            tensor = tensor.resolve_neg().resolve_conj()
    return tensor


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A stored (rows, cols) matrix; docs/format.md draws the bytes.

    Attributes
    ----------
    codes : uint8 (rows, row_bytes), packed
    scales : float16 (rows, n_groups), the step between levels
    zeros : uint8 (rows, row_zero_bytes), packed, or None when symmetric
    scheme : Scheme
    shape : (rows, cols)

    The arrays may be NumPy's or torch's; the value of a code q is (q - zero) * scale.

    Of a trellis scheme `codes` is (ceil(rows / 16), bytes of 16 rows), `scales` (rows, 1), and `zeros` holds the rates,
    bits a weight of each 16 columns, (ceil(cols / 16),); see `bitween.trellis`.
    """

    codes: Any
    scales: Any
    zeros: Any
    scheme: Scheme
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros: what memory reports count."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)

    @property
    def bits_per_weight(self) -> float:
        """8 * nbytes / number of weights."""
        return 8 * self.nbytes / max(1, self.shape[0] * self.shape[1])

    def unpack_codes(self) -> np.ndarray:
        """Codes one a byte, uint8 (rows, cols); a grid's only."""
        return _core.unpack(self.codes, self.shape[1], self.scheme.levels)

    def unpack_zeros(self) -> np.ndarray:
        """Zero points as numbers, float32 (rows, n_groups)."""
        rows, groups = self.scales.shape
        if self.zeros is None:
            return np.full((rows, groups), self.scheme.zero, np.float32)
        bits = (self.scheme.levels - 1).bit_length()
        stream = np.unpackbits(np.asarray(self.zeros), axis=1, bitorder="little")[:, : groups * bits]
        return (stream.reshape(rows, groups, bits) @ (1 << np.arange(bits))).astype(np.float32)

    def row_range(self, first: int, last: int) -> QuantizedTensor:
        """Rows first .. last-1 on the same memory; edges lie at multiples of `scheme.rows_together`."""
        if self.scheme.coding == "trellis":
            codes, scales = trellis.row_range(self.codes, self.scales, first, last, self.scheme.rows_together)
            return QuantizedTensor(codes, scales, self.zeros, self.scheme, (last - first, self.shape[1]))
        zeros = None if self.zeros is None else self.zeros[first:last]
        shape = (last - first, self.shape[1])
        return QuantizedTensor(self.codes[first:last], self.scales[first:last], zeros, self.scheme, shape)

    def dequantize(self, dtype: Any = None, out: Any = None, rows: Any = None) -> Any:
        """The matrix as numbers.

        Parameters
        ----------
        dtype : "float32" (default), "float16" as NumPy arrays, or a torch dtype (then a torch tensor; bfloat16 too)
        out : contiguous tensor of the result's shape to fill instead
        rows : int64 (n,), contiguous: only these rows, in this order

        Returns
        -------
        (rows, cols) or (n, cols) array, or `out`.
        """
        follow_torch()
        if out is None:
            out = _empty(self.shape if rows is None else (len(rows), self.shape[1]), dtype)
        if self.scheme.coding == "trellis":
            parts = self.codes, self.scales, self.zeros, self.scheme, self.shape[1]
            trellis.unpack(*parts, out) if rows is None else trellis.gather_rows(*parts, rows, out)
        else:
            _core.dequantize(self.codes, self.scales, self.zeros, self.scheme.key, self.shape[1], out, rows)
        return out

    def matmul(self, x: Any, bias: Any = None, out: Any = None, mode: str = "exact") -> Any:
        """x times the transposed matrix, plus bias; sums are fp32.

        Parameters
        ----------
        x : (..., cols) float32, float16 or bfloat16 on the CPU; NumPy or torch
        bias : (rows,), optional
        out : contiguous (..., rows) tensor to fill instead of a new one of x's dtype
        mode : "exact" takes activations as they are; "int16" and "int8" round them on the fly, where x has at most
            16 rows, to whole numbers with a scale for each 16 columns

        Returns
        -------
        (..., rows) array, or `out`.
        """
        follow_torch()
        x, bias = as_input(x), as_input(bias)
        if out is None:
            shape = (*x.shape[:-1], self.shape[0])
            out = x.new_empty(shape) if hasattr(x, "new_empty") else np.empty(shape, x.dtype)
        if self.scheme.coding == "trellis":
            trellis.multiply(x, self.codes, self.scales, self.zeros, self.scheme, bias, out, mode_number(mode))
            return out
        if x.ndim > 2:  # folds leading dimensions, with a copy where their strides do not allow a view
            x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        stored = (self.codes, self.scales, self.zeros, self.scheme.key, self.shape[1])
        _core.matmul(x, *stored, bias, out, mode_number(mode))
        return out

    def __repr__(self) -> str:
        return f"QuantizedTensor(shape={self.shape}, scheme='{self.scheme}', nbytes={self.nbytes:,})"


def mode_number(mode: str) -> int:
    """The number under which the core knows a mode."""
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}; got {mode!r}")
    return MODES[mode]


def _empty(shape: tuple[int, int], dtype: Any) -> Any:
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if str(dtype).startswith("torch."):
        import torch

        return torch.empty(shape, dtype=dtype)
    if name not in _NUMPY_DTYPES:
        name = np.dtype(dtype).name
    if name not in _NUMPY_DTYPES:
        raise TypeError(f"dtype: expected float32, float16 or a torch float type; got {dtype!r}")
    return np.empty(shape, _NUMPY_DTYPES[name])
