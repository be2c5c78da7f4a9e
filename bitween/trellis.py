"""Stored trellis tiles as numbers and in products: thin names over the C core.

`codes` is uint8 (ceil(rows / 16), bytes of 16 rows), `scales` float16 (rows, 1), `rates` uint8 (ceil(cols / 16),): the
bits a weight of each 16 columns.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bitween import _core
from bitween.scheme import TILE

__all__ = ["gather_rows", "multiply", "row_range", "unpack"]


def unpack(codes: Any, scales: Any, rates: Any, width: int, cols: int, out: Any) -> None:
    """Fill `out` (rows, cols) with the weights."""
    _core.dequantize_trellis(codes, scales.reshape(-1), rates, width, cols, out)


def gather_rows(codes: Any, scales: Any, rates: Any, width: int, cols: int, rows: Any, out: Any) -> None:
    """Fill `out` (n, cols) with the rows of these numbers; whole tiles are unpacked, each once."""
    rows = np.asarray(rows)
    if rows.size and not (rows.min() >= 0 and rows.max() < scales.shape[0]):
        raise IndexError(f"rows: expected 0 to {scales.shape[0] - 1}; got {rows.min()} to {rows.max()}")
    tiles, place = np.unique(rows // TILE, return_inverse=True)
    room = np.empty((TILE * len(tiles), cols), np.float32)
    for k, tile in enumerate(tiles):
        part = scales[TILE * tile : TILE * (tile + 1)].reshape(-1)
        into = room[TILE * k : TILE * k + part.shape[0]]
        _core.dequantize_trellis(codes[tile : tile + 1], part, rates, width, cols, into)
    found = room[TILE * place + rows % TILE]
    if isinstance(out, np.ndarray):
        out[:] = found
    else:
        out.copy_(out.new_tensor(found))


def row_range(codes: Any, scales: Any, first: int, last: int) -> tuple[Any, Any]:
    """Codes and scales of rows first .. last-1 on the same memory; `first` stands at the edge of a tile."""
    if first % TILE or (last % TILE and last != scales.shape[0]):
        raise ValueError(f"rows: expected edges of tiles of {TILE} rows; got {first} to {last}")
    return codes[first // TILE : -(-last // TILE)], scales[first:last]


def multiply(x: Any, codes: Any, scales: Any, rates: Any, width: int, bias: Any, out: Any, mode: int) -> None:
    """out = x WT + bias; x (..., cols)."""
    cols, rows = x.shape[-1], scales.shape[0]
    n = math.prod(x.shape[:-1])
    _core.matmul_trellis(
        x.reshape(n, cols), codes, scales.reshape(-1), rates, width, cols, bias, out.reshape(n, rows), mode
    )
