"""GPTQ and its refinement, with the figures that planning needs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitween import _core
from bitween._threads import follow_torch
from bitween.quantized_tensor import QuantizedTensor, as_input
from bitween.rounding.hessian import Hessian
from bitween.scheme import Scheme

__all__ = ["GptqResult", "gptq"]

SWEEPS = 8
SHARE = 0.5
_ALIGNING = 0.1  # damping of the least squares that finds a target


@dataclass(frozen=True, eq=False)
class GptqResult:
    """What `gptq` found.

    Attributes
    ----------
    quantized : QuantizedTensor
    row_errors : float64 (rows,)
        (w - q) H (w - q)T of each row, the Hessian undamped; in squared units of the layer's output per token. With
        cross moments w is the moved target.
    damping : float
        What the factorisation took, as a part of the Hessian's mean diagonal.
    dead_columns : int
        Inputs that were never active; their weights are rounded to nearest.
    target : (rows, cols)
        What was rounded: the weight, or with cross moments the moved one, float32.
    """

    quantized: QuantizedTensor
    row_errors: np.ndarray
    damping: float
    dead_columns: int
    target: Any


def gptq(
    weight: Any,
    scheme: Scheme,
    hessian: Any,
    *,
    sweeps: int = SWEEPS,
    damping: float = 0.01,
    tolerance: float = 1e-3,
    by_activation: bool = False,
    share: float = SHARE,
) -> GptqResult:
    """Quantize a matrix so that its layer's outputs change least: GPTQ, then refinement on the same quadratic.

    Columns are rounded in order, each from its weight plus what the errors before it call for (arXiv 2210.17323).
    The range of a group is searched as its first column is reached, by rounding the group on every candidate.
    Refinement then rounds group after group anew with all others fixed, and never raises a row's error.

    Parameters
    ----------
    weight : (rows, cols) float32, float16 or bfloat16 on the CPU
    scheme : Scheme
    hessian : Hessian, or float32 (cols, cols): E[x xT] of the layer's inputs. With cross moments the outputs aimed at
        are those of the full-precision model's own inputs (GPTAQ, arXiv 2504.02692)
    sweeps : refinement sweeps over all groups, at most; 0 is GPTQ alone
    damping : added to the diagonal, as a part of its mean; grows by itself when the factorisation fails
    tolerance : rows stop being refined when a sweep gains less than this part of their error
    by_activation : most active groups, and columns within them, first
    share : 0 to 1, how far the target moves there when the Hessian has cross moments. All the way fits what is not
        predictable too: half does less damage

    Returns
    -------
    GptqResult

    Raises
    ------
    TypeError, ValueError
        naming the argument, what was expected and what came.

    Warns
    -----
    RuntimeWarning
        The Hessian saw fewer tokens than it has columns, or needed more damping than was asked for.
    """
    if not isinstance(scheme, Scheme):
        raise TypeError(f"scheme: expected a Scheme; got {scheme!r}")
    follow_torch()
    weight = as_input(weight)
    if isinstance(hessian, Hessian):
        weight, hessian = moved(weight, hessian, share)
    stored, row_errors, used, dead = _core.quantize_gptq(
        weight, as_input(hessian), scheme.key, damping, sweeps, tolerance, by_activation
    )
    if used > damping:
        warnings.warn(f"hessian: not positive with damping {damping:g}; took {used:g}", RuntimeWarning, stacklevel=2)
    return GptqResult(QuantizedTensor(*stored, scheme, tuple(weight.shape)), row_errors, used, dead, weight)


def moved(weight: Any, hessian: Hessian, share: float) -> tuple[Any, np.ndarray]:
    """The target, moved towards what the untouched model's inputs call for (GPTAQ), and the matrix of moments."""
    if hessian.tokens < hessian.columns:
        warnings.warn(
            f"hessian: {hessian.tokens} tokens for {hessian.columns} columns; damping decides the rest",
            RuntimeWarning,
            stacklevel=3,
        )
    matrix = hessian.matrix()
    if hessian.has_cross and share:
        weight, _ = _core.align(weight, matrix, hessian.cross(), share, _ALIGNING)
    return weight, matrix
