"""What a table of words is asked for in a pass, as leaves of a graph: the rows themselves, before anything is done to
them (a scale, a norm, a projection to the width of the blocks, several streams)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["Lookups"]


class Lookups(TorchFunctionMode):
    """Inside ``with``, every lookup in the very tensor `weight` becomes a leaf that records gradients, in `found`."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.found: list[torch.Tensor] = []

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is nn.functional.embedding and (args[1] if len(args) > 1 else kwargs.get("weight")) is self.weight:
            self.found.append(out.detach().requires_grad_(True))
            return self.found[-1].clone()  # models may change it in place, which no leaf bears
        return out
