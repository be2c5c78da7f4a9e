"""Hessian: second moments of a layer's inputs, gathered batch by batch."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitween import _core
from bitween._threads import follow_torch
from bitween.quantized_tensor import as_input

__all__ = ["Hessian"]


class Hessian:
    """Mean of w_t x_t x_tT over the tokens seen; what GPTQ and refinement measure their error with.

    Layers that read the same input share one. With `cross`, the mean of w_t x_t y_tT is kept beside it, where
    y_t is what the full-precision model feeds the layer at the same token.

    Parameters
    ----------
    n : input features
    cross : also gather cross moments
    """

    def __init__(self, n: int, *, cross: bool = False) -> None:
        self._sum = np.zeros((n, n), np.float32)
        self._cross = np.zeros((n, n), np.float32) if cross else None
        self.tokens = 0
        self._settled = False

    def add(self, x: Any, *, weights: Any = None, reference: Any = None) -> None:
        """Add tokens.

        Parameters
        ----------
        x : (..., n) float32, float16 or bfloat16 on the CPU; leading dimensions are tokens
        weights : float32 (tokens,), >= 0; ones when None
        reference : y, of x's shape; needed exactly when `cross` was asked for

        Raises
        ------
        TypeError, ValueError
            naming the argument, what was expected and what came. After an error about values that are not finite
            the sums are lost.
        RuntimeError
            After `settle`.
        """
        if self._settled:
            raise RuntimeError("add: expected a Hessian that still gathers; got one that was settled")
        if (reference is None) != (self._cross is None):
            raise ValueError("reference: expected a tensor exactly when cross moments are gathered")
        follow_torch()
        x = as_input(x).reshape(-1, x.shape[-1])
        weights = None if weights is None else as_input(weights).reshape(-1)
        _core.hessian_add(x, self._sum, None, weights)
        if reference is not None:
            _core.hessian_add(x, self._cross, as_input(reference).reshape(-1, reference.shape[-1]), weights)
        self.tokens += x.shape[0]

    def settle(self) -> Hessian:
        """No token comes any more: sums become means where they lie, and `matrix` and `cross` return these arrays.

        A layer of n inputs is rounded beside several (n, n) matrices; this saves two of them. Returns itself.
        """
        if not self._settled:
            _core.mirror_upper(self._sum)
            for total in (self._sum, self._cross):
                if total is not None:
                    total /= np.float32(max(1, self.tokens))
            self._settled = True
        return self

    @property
    def has_cross(self) -> bool:
        """Whether cross moments are gathered."""
        return self._cross is not None

    @property
    def columns(self) -> int:
        """Input features."""
        return self._sum.shape[0]

    def matrix(self) -> np.ndarray:
        """The mean over tokens, float32 (n, n), both halves."""
        if self._settled:
            return self._sum
        _core.mirror_upper(self._sum)
        return self._sum / np.float32(max(1, self.tokens))

    def cross(self) -> np.ndarray:
        """Mean of w_t x_t y_tT over tokens, float32 (n, n)."""
        if self._cross is None:
            raise ValueError("cross: expected a Hessian made with cross=True")
        return self._cross if self._settled else self._cross / np.float32(max(1, self.tokens))
