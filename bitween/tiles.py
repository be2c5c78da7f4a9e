"""Products of many bfloat16 rows with a packed matrix: tiles of it are unpacked and go through torch's own product."""

from __future__ import annotations

from functools import cache

import torch

from .quantized_tensor import QuantizedTensor

__all__ = ["cpu_has_bf16", "product"]

_TILE_WEIGHTS = 1 << 22  # 8 MiB: large enough for torch's product to be at its best, small beside a matrix that matters


@cache
def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware, as far as this torch can tell."""
    ask = getattr(torch.cpu, "get_capabilities", dict)  # torch versions before it existed say nothing
    return any(ask().get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def product(x: torch.Tensor, stored: QuantizedTensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out = x WT + bias, without autograd.

    Parameters
    ----------
    x : bfloat16 (..., cols), contiguous
    stored : QuantizedTensor (rows, cols); its numbers are rounded to bfloat16, sums are float32
    bias : (rows,), optional
    out : bfloat16 (..., rows), contiguous
    """
    rows, cols = stored.shape
    step = max(1, min(rows, _TILE_WEIGHTS // cols))
    flat, result = x.detach().view(-1, cols), out.view(-1, rows)
    tile = x.new_empty(step, cols)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        weight = stored.row_range(first, last).dequantize(out=tile[: last - first])
        if bias is None:
            torch.mm(flat, weight.t(), out=result[:, first:last])
        else:
            torch.addmm(bias[first:last].to(x.dtype), flat, weight.t(), out=result[:, first:last])
