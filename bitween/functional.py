"""Functions on arrays: thin names over the C core. Weights may be torch tensors or NumPy arrays, on the CPU."""

from __future__ import annotations

from typing import Any

from . import _core
from ._threads import follow_torch, get_num_threads
from .quantized_tensor import QuantizedTensor, as_input
from .scheme import Scheme

__all__ = ["METHODS", "info", "quantize"]


def _rtn(weight: Any, scheme: Scheme, importance: Any, hessian: Any) -> tuple:
    return _core.quantize_rtn(weight, scheme.key)


def _clip(weight: Any, scheme: Scheme, importance: Any, hessian: Any) -> tuple:
    return _core.quantize_clip(weight, scheme.key, importance)


METHODS = {"rtn": _rtn, "clip": _clip}


def quantize(
    weight: Any, scheme: Scheme, *, method: str = "rtn", importance: Any = None, hessian: Any = None
) -> QuantizedTensor:
    """Quantize one matrix.

    Parameters
    ----------
    weight : (rows, cols) float32, float16 or bfloat16, anything with __dlpack__ on the CPU
    scheme : Scheme
    method : one of `METHODS`; "rtn" rounds to nearest on each group's range, "clip" on the range of least error
    importance : float32, float16 or bfloat16, weight's shape or (cols,), >= 0: weight of each squared error;
        where a group has none above 0, its errors count equally
    hessian : float32 (cols, cols), E[x xT] of the layer's inputs

    Returns
    -------
    QuantizedTensor

    Raises
    ------
    TypeError, ValueError
        naming the argument, what was expected and what came.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {method!r}")
    if not isinstance(scheme, Scheme):
        raise TypeError(f"scheme: expected a Scheme; got {scheme!r}")
    follow_torch()
    weight, importance, hessian = (None if t is None else as_input(t) for t in (weight, importance, hessian))
    codes, scales, zeros = METHODS[method](weight, scheme, importance, hessian)
    return QuantizedTensor(codes, scales, zeros, scheme, tuple(weight.shape))


def info() -> dict[str, Any]:
    """What bitween runs on: version, isa (in use), isas (that this CPU has), threads, blas, blas_core."""
    return {**_core.info(), "threads": get_num_threads()}
