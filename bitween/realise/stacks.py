"""Layers of one scheme, method and Hessian rounded as one stack of rows, so that the Hessian is factored once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bitween.functional import quantize
from bitween.model.layout import Layer
from bitween.quantized_tensor import QuantizedTensor
from bitween.rounding.gptq import SHARE, SWEEPS, gptq
from bitween.rounding.hessian import Hessian
from bitween.rounding.trellis import trellis
from bitween.scheme import Scheme

__all__ = ["method_below_8_bits", "round_stack", "take_rows"]


def method_below_8_bits(scheme: Scheme, method: str) -> str:
    """The method that a scheme is rounded with where `method` is asked for.

    Refinement and training, the slow parts, are left to the widths below 5 bits, which do most of the damage; at 8 bits
    rounding to nearest does all there is to do.
    """
    if scheme.coding == "trellis":
        return "trellis"
    if scheme.bits >= 8:
        return "rtn"
    return "gptq" if scheme.bits >= 5 and method in ("gptq+refine", "signround") else method


def round_stack(
    stack: Sequence[Layer],
    scheme: Scheme,
    method: str,
    hessian: Hessian | None,
    *,
    sweeps: int = SWEEPS,
    damping: float = 0.01,
    share: float = SHARE,
) -> list[tuple[QuantizedTensor, str, float | None, torch.Tensor | None]]:
    """(QuantizedTensor, method used, error or None, target of training or None) of each layer."""
    if method == "rtn":
        return [(quantize(layer.weight, scheme), method, None, None) for layer in stack]
    if hessian is None or not hessian.tokens:
        without = method if method == "trellis" else "clip"
        return [(quantize(layer.weight, scheme, method=without), without, None, None) for layer in stack]
    if method == "clip":
        importance = np.ascontiguousarray(np.diagonal(hessian.matrix()))
        clipped = (quantize(x.weight, scheme, method=method, importance=importance) for x in stack)
        return [(tensor, method, None, None) for tensor in clipped]
    if method == "trellis":
        coded = (trellis(x.weight, scheme, hessian, damping=damping, share=share) for x in stack)
        return [(found.quantized, method, float(found.row_errors.sum()), None) for found in coded]
    weight = stack[0].weight if len(stack) == 1 else torch.cat([layer.weight for layer in stack])
    sweeps = 0 if method == "gptq" else sweeps
    found = gptq(weight, scheme, hessian, sweeps=sweeps, damping=damping, share=share)
    done, first = [], 0
    for layer in stack:
        rows = slice(first, first := first + layer.shape[0])
        target = torch.as_tensor(found.target[rows]) if method == "signround" else None
        done.append((take_rows(found.quantized, rows), method, float(found.row_errors[rows].sum()), target))
    return done


def take_rows(tensor: QuantizedTensor, rows: slice) -> QuantizedTensor:
    """Rows of a stored matrix, on memory of their own."""
    zeros = None if tensor.zeros is None else tensor.zeros[rows].copy()
    shape = (rows.stop - rows.start, tensor.shape[1])
    return QuantizedTensor(tensor.codes[rows].copy(), tensor.scales[rows].copy(), zeros, tensor.scheme, shape)
