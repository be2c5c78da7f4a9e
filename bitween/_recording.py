"""Gradients on demand, whatever mode the caller is in."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

__all__ = ["outside_inference_mode"]


def outside_inference_mode(function: Callable) -> Callable:
    """Run a function as if its caller were not inside `torch.inference_mode()`.

    Importance comes from gradients, and tensors made in inference mode can record none; what is made here is made
    outside of it. The caller's mode is back afterwards, in its own thread alone.
    """

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        import torch

        with torch.inference_mode(False):
            return function(*args, **kwargs)

    return wrapped
