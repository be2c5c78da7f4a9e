"""GPTQ as its paper writes it (arXiv 2210.17323), one column at a time on the inverse Hessian, in float64."""

from __future__ import annotations

import numpy as np

from tests import reference


def damped(hessian: np.ndarray, damping: float) -> np.ndarray:
    """The Hessian with `damping` times the mean of its live diagonal added; dead columns stand alone."""
    h = hessian.astype(np.float64)
    diagonal = np.diag(h)
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if (~dead).any() else 1.0
    return h + np.diag(np.where(dead, mean, damping * mean))


def gptq(weight: np.ndarray, hessian: np.ndarray, scales: np.ndarray, zeros: np.ndarray, scheme, damping: float):
    """Codes (rows, cols) on grids that are given."""
    w = weight.astype(np.float64).copy()
    inverse = np.linalg.inv(damped(hessian, damping))
    factor = np.linalg.cholesky(inverse).T
    codes = np.empty(w.shape, np.uint8)
    for g, part in enumerate(reference.groups(w.shape[1], scheme.group_size)):
        scale, zero = scales[:, g].astype(np.float64), zeros[:, g].astype(np.float64)
        for k in range(part.start, part.stop):
            q = np.clip(np.rint(w[:, k] / scale + zero), 0, scheme.levels - 1)
            codes[:, k] = q
            error = (w[:, k] - (q - zero) * scale) / factor[k, k]
            w[:, k + 1 :] -= np.outer(error, factor[k, k + 1 :])
    return codes


def row_errors(weight: np.ndarray, stored: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """(w - q) H (w - q)T of each row."""
    e = weight.astype(np.float64) - stored.astype(np.float64)
    return ((e @ hessian.astype(np.float64)) * e).sum(1)
