"""Stored trellis tiles as numbers and in products: thin names over the C core.

`codes` is uint8 (ceil(rows / 16), bytes of 16 rows), `scales` float16 (rows, 1), `rates` uint8 (ceil(cols / 16),): the
bits a weight of each 16 columns. Of a turned scheme rows come in blocks of 128.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bitween import _core
from bitween.scheme import TILE, Scheme

__all__ = ["gather_rows", "multiply", "row_range", "unpack"]


def unpack(codes: Any, scales: Any, rates: Any, scheme: Scheme, cols: int, out: Any) -> None:
    """Fill `out` (rows, cols) with the weights."""
    _core.dequantize_trellis(codes, scales.reshape(-1), rates, scheme.width, cols, out, turned=scheme.turned)


def gather_rows(codes: Any, scales: Any, rates: Any, scheme: Scheme, cols: int, rows: Any, out: Any) -> None:
    """Fill `out` (n, cols) with the rows of these numbers; whole tiles are unpacked, each once."""
    rows, side = np.asarray(rows), scheme.rows_together
    if rows.size and not (rows.min() >= 0 and rows.max() < scales.shape[0]):
        raise IndexError(f"rows: expected 0 to {scales.shape[0] - 1}; got {rows.min()} to {rows.max()}")
    tiles, place = np.unique(rows // side, return_inverse=True)
    room = np.empty((side * len(tiles), cols), np.float32)
    for k, tile in enumerate(tiles):
        part, held = row_range(codes, scales, side * tile, min(side * (tile + 1), len(scales)), side)
        unpack(part, held, rates, scheme, cols, room[side * k : side * k + held.shape[0]])
    found = room[side * place + rows % side]
    if isinstance(out, np.ndarray):
        out[:] = found
    else:
        out.copy_(out.new_tensor(found))


def row_range(codes: Any, scales: Any, first: int, last: int, side: int = TILE) -> tuple[Any, Any]:
    """Codes and scales of rows first .. last-1 on the same memory; `first` stands at the edge of `side` rows."""
    if first % side or (last % side and last != scales.shape[0]):
        raise ValueError(f"rows: expected edges of tiles of {side} rows; got {first} to {last}")
    return codes[first // TILE : -(-last // TILE)], scales[first:last]


def multiply(x: Any, codes: Any, scales: Any, rates: Any, scheme: Scheme, bias: Any, out: Any, mode: int) -> None:
    """out = x WT + bias; x (..., cols)."""
    cols, rows = x.shape[-1], scales.shape[0]
    n = math.prod(x.shape[:-1])
    stored = codes, scales.reshape(-1), rates, scheme.width, cols
    _core.matmul_trellis(x.reshape(n, cols), *stored, bias, out.reshape(n, rows), mode, scheme.turned)
