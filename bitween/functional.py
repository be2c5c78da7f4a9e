"""Functions on arrays: thin names over the C core. Weights may be torch tensors or NumPy arrays, on the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from bitween import _core
from bitween._threads import follow_torch, get_num_threads
from bitween.quantized_tensor import QuantizedTensor, as_input
from bitween.rounding.methods import METHODS
from bitween.scheme import Scheme

__all__ = ["METHODS", "cross_entropy", "info", "kl_divergence", "mean", "quantize", "search"]


def quantize(
    weight: Any, scheme: Scheme, *, method: str = "rtn", importance: Any = None, hessian: Any = None
) -> QuantizedTensor:
    """Quantize one matrix.

    Parameters
    ----------
    weight : (rows, cols) float32, float16 or bfloat16, anything with __dlpack__ on the CPU
    scheme : Scheme
    method : one of `METHODS`; "rtn" rounds to nearest on each group's range, "clip" on the range of least error;
        "gptq" rounds columns in order, each making up for the errors before it; "gptq+refine" goes on until the
        error under the hessian stops falling; "signround" then trains rounding and ranges on that error;
        "trellis" codes tiles by their best path, for schemes made by `Scheme.trellis`
    importance : float32, float16 or bfloat16, weight's shape or (cols,), >= 0: weight of each squared error;
        where a group has none above 0, its errors count equally
    hessian : Hessian, or float32 (cols, cols): E[x xT] of the layer's inputs

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
    if (method == "trellis") != (scheme.coding == "trellis"):
        raise ValueError(
            f"method: expected 'trellis' for Scheme.trellis(...), and for no other; got {method!r}, {scheme}"
        )
    follow_torch()
    weight, importance = (None if t is None else as_input(t) for t in (weight, importance))
    codes, scales, zeros = METHODS[method].round(weight, scheme, importance, hessian)
    return QuantizedTensor(codes, scales, zeros, scheme, tuple(weight.shape))


def search(
    weight: Any,
    schemes: Iterable[Scheme],
    importance: Any = None,
    *,
    row_importance: Any = None,
    ranges: str = "minmax",
) -> np.ndarray:
    """Squared error of a matrix under many schemes, in one pass over it.

    Parameters
    ----------
    weight : (rows, cols) float32, float16 or bfloat16, anything with __dlpack__ on the CPU
    schemes : the candidates
    importance : float32, float16 or bfloat16, weight's shape or (cols,), >= 0: weight of each squared error
    row_importance : numbers (rows,), >= 0: multiplies the errors of each row
    ranges : "minmax" (those of method "rtn") or "clip" (those of method "clip")

    Returns
    -------
    float64 (len(schemes),)
        sum of row_importance * importance * (weight - dequantized)^2 of each scheme;
        the same for any number of threads

    Raises
    ------
    TypeError, ValueError
        naming the argument, what was expected and what came.
    """
    if ranges not in ("minmax", "clip"):
        raise ValueError(f"ranges: expected 'minmax' or 'clip'; got {ranges!r}")
    schemes = tuple(schemes)
    for scheme in schemes:
        if not isinstance(scheme, Scheme):
            raise TypeError(f"schemes: expected Schemes; got {scheme!r}")
    follow_torch()
    weight, importance, rows = (None if t is None else as_input(t) for t in (weight, importance, row_importance))
    if rows is not None:
        rows = np.ascontiguousarray(rows, np.float64)
    return _core.search(weight, tuple(s.key for s in schemes), importance, rows, ranges == "clip")


def _matrices(x: Any) -> list[Any]:
    """The matrices that leading dimensions hold, as views."""
    if x.ndim < 2:
        return [x.reshape(1, -1)]
    return [x] if x.ndim == 2 else [matrix for part in x for matrix in _matrices(part)]


def cross_entropy(logits: Any, targets: Any) -> np.ndarray:
    """Negative log-likelihood of each token.

    Parameters
    ----------
    logits : (..., vocabulary) float32, float16 or bfloat16
    targets : (...) integers, 0 .. vocabulary - 1

    Returns
    -------
    float32 (tokens,), nats
        leading dimensions flattened; the same for any number of threads. A row with NaN gives NaN for its token only.

    Raises
    ------
    TypeError, ValueError, IndexError
        naming the argument, what was expected and what came.
    """
    follow_torch()
    targets = np.asarray(targets)
    if targets.dtype.kind not in "iu":
        raise TypeError(f"targets: expected integers; got {targets.dtype}")
    if targets.shape != tuple(logits.shape[:-1]):
        raise ValueError(f"targets: expected shape {tuple(logits.shape[:-1])}; got {targets.shape}")
    targets = np.ascontiguousarray(targets.reshape(-1), np.int64)
    losses, first = [np.empty(0, np.float32)], 0
    for matrix in _matrices(as_input(logits)):
        losses.append(_core.cross_entropy(matrix, targets[first : first + matrix.shape[0]]))
        first += matrix.shape[0]
    return np.concatenate(losses)


def kl_divergence(reference: Any, logits: Any) -> np.ndarray:
    """KL(softmax(reference) || softmax(logits)) of each token.

    Parameters
    ----------
    reference, logits : (..., vocabulary) float32, float16 or bfloat16, of one shape

    Returns
    -------
    float32 (tokens,), nats
        leading dimensions flattened; the same for any number of threads. What has no probability in the reference
        counts 0; what has some there and none in `logits` gives infinity; NaN stays with its token.

    Raises
    ------
    TypeError, ValueError
        naming the argument, what was expected and what came.
    """
    follow_torch()
    if tuple(reference.shape) != tuple(logits.shape):
        raise ValueError(f"logits: expected shape {tuple(reference.shape)}; got {tuple(logits.shape)}")
    pairs = zip(_matrices(as_input(reference)), _matrices(as_input(logits)), strict=True)
    return np.concatenate([np.empty(0, np.float32), *(_core.kl_divergence(a, b) for a, b in pairs)])


def mean(x: Any) -> float:
    """Mean of a float32, float16 or bfloat16 tensor in float64, always added in the same order.

    torch's own sums over a whole tensor depend on its number of threads.
    """
    n = math.prod(x.shape)
    if not n:
        raise ValueError(f"x: expected at least one number; got shape {tuple(x.shape)}")
    return sum(_core.total(matrix) for matrix in _matrices(as_input(x))) / n


def info() -> dict[str, Any]:
    """What bitween runs on: version, isa (in use), isas (that this CPU has), threads, blas, blas_core."""
    return {**_core.info(), "threads": get_num_threads()}
