"""Trellis-coded rounding under a layer's Hessian (QTIP, arXiv 2406.11235; block LDLQ of QuIP#, arXiv 2402.04396)."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitween import _core
from bitween._threads import follow_torch
from bitween.quantized_tensor import QuantizedTensor, as_input
from bitween.rounding.gptq import SHARE, GptqResult, moved
from bitween.rounding.hessian import Hessian
from bitween.rounding.turned import turned
from bitween.scheme import TRELLIS_WIDTHS, Scheme

__all__ = ["trellis"]


def trellis(
    weight: Any,
    scheme: Scheme,
    hessian: Any = None,
    *,
    importance: Any = None,
    damping: float = 0.01,
    share: float = SHARE,
    thorough: bool | None = None,
) -> GptqResult:
    """Code a matrix in tiles of 16 x 16 weights, each the best path through a trellis.

    Blocks of 16 columns are coded in the order of their activation. Inside a block errors weigh by the diagonal of
    the conditional Hessian; the columns still to come then take up what the block has left. At the end each row's
    scale is fitted by least squares under the Hessian.

    Parameters
    ----------
    weight : (rows, cols) float32, float16 or bfloat16 on the CPU
    scheme : Scheme.trellis(...); a turned one is coded between Hadamard transforms (bitween/rounding/turned.py)
    hessian : Hessian, or float32 (cols, cols): E[x xT] of the layer's inputs; None for a matrix without inputs
    importance : float32 (cols,), weights of the squared errors, only without a Hessian
    damping, share : as in `bitween.gptq`
    thorough : whether the search for a tile's seam goes all around it, which takes a third longer and lowers the
        squared error by about 1 % where states have 16 bits; None: there only

    Returns
    -------
    GptqResult

    Raises
    ------
    TypeError, ValueError
        naming the argument, what was expected and what came.
    """
    if not isinstance(scheme, Scheme) or scheme.coding != "trellis":
        raise ValueError(f"scheme: expected Scheme.trellis(...); got {scheme!r}")
    follow_torch()
    weight = as_input(weight)
    if isinstance(hessian, Hessian):
        weight, hessian = moved(weight, hessian, share)
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
    matrix = None if hessian is None else as_input(hessian)
    if thorough is None:
        thorough = scheme.width == TRELLIS_WIDTHS[-1]
    if scheme.turned:
        return turned(weight, scheme, matrix, importance, damping, thorough)
    (codes, scales, rates), errors, used, dead = _core.quantize_trellis(
        weight, matrix, float(scheme.bits), scheme.width, importance, damping, thorough=thorough
    )
    stored = QuantizedTensor(codes, scales.reshape(-1, 1), rates, scheme, tuple(weight.shape))
    return GptqResult(stored, errors, used, dead, weight)
