"""A packed matrix in tiles of unpacked rows, and products with them by torch: never is all of it unpacked at once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

from bitween.quantized_tensor import QuantizedTensor

__all__ = ["cpu_has_bf16", "product", "row_tiles"]

_TILE_WEIGHTS = (
    1 << 22
)  # 8 MiB in bfloat16: large enough for torch's product to be at its best, small beside a matrix that matters


@cache
def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware, as far as this torch can tell."""
    ask = getattr(torch.cpu, "get_capabilities", dict)  # torch versions before it existed say nothing
    return any(ask().get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def row_tiles(stored: QuantizedTensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, their weights (rows, cols) of `dtype`) over the whole matrix; all tiles are unpacked into one memory."""
    rows, cols = stored.shape
    step = max(1, min(rows, _TILE_WEIGHTS // max(1, cols)))
    together = stored.scheme.rows_together  # whole tiles of a trellis
    step = min(rows, -(-step // together) * together)
    tile = torch.empty(step, cols, dtype=dtype, device="cpu")
    for first in range(0, rows, step):
        last = min(first + step, rows)
        yield slice(first, last), stored.row_range(first, last).dequantize(out=tile[: last - first])


def product(x: torch.Tensor, stored: QuantizedTensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out = x WT + bias, without autograd.

    Parameters
    ----------
    x : bfloat16 or float32 (..., cols), contiguous
    stored : QuantizedTensor (rows, cols); its numbers are rounded to x's dtype, sums are float32
    bias : (rows,), optional
    out : of x's dtype (..., rows), contiguous
    """
    rows, cols = stored.shape
    flat, result = x.detach().view(-1, cols), out.view(-1, rows)
    for part, weight in row_tiles(stored, x.dtype):
        if bias is None:
            torch.mm(flat, weight.t(), out=result[:, part])
        else:
            torch.addmm(bias[part].to(x.dtype), flat, weight.t(), out=result[:, part])
