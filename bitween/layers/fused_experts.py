"""Experts one below the other in a 2-D parameter, as DBRX keeps them: a stack that reads as that parameter.

Model code takes such a parameter apart in one of a few ways (a view of three dimensions, a chunk, a slice of rows);
what these give is not unpacked. Any other use gets the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from bitween.layers.experts import ExpertStack, unpacked

__all__ = ["FusedStack"]


class FusedStack(ExpertStack):
    """An ExpertStack in the place of a parameter (experts * a, b), whose slices (a, b) are the experts' matrices."""

    def apart(self) -> ExpertStack:
        """The same layers as a stack of three dimensions."""
        stack = ExpertStack((), self.transposed, self._like)
        stack._modules = self._modules  # the very dictionary: layers may be exchanged at any time
        return stack

    @property
    def shape(self) -> torch.Size:
        """That of the parameter that stood here."""
        experts, a, b = super().shape
        return torch.Size((experts * a, b))

    @property
    def ndim(self) -> int:
        """2."""
        return 2

    def dense(self) -> torch.Tensor:
        """All numbers at once, in the parameter's shape."""
        return self.apart().dense().flatten(0, 1)

    def view(self, *shape: Any) -> Any:
        """As of a tensor; with three dimensions, experts first, not unpacked."""
        sides = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        whole = self.apart().shape
        if isinstance(sides, (tuple, list)) and len(sides) == 3 and _fits(sides, whole):
            return self.apart()
        return self.dense().view(*shape)

    reshape = view

    def unflatten(self, dim: int, sizes: Any) -> Any:
        """As of a tensor; rows into experts and their rows, not unpacked."""
        if dim in (0, -2) and len(sizes) == 2 and _fits((*sizes, self.shape[1]), self.apart().shape):
            return self.apart()
        return self.dense().unflatten(dim, sizes)

    def chunk(self, chunks: int, dim: int = 0) -> Any:
        """As of a tensor; as many as there are experts are not unpacked."""
        if dim in (0, -2) and chunks == len(self):
            return tuple(self.apart()[e] for e in range(len(self)))
        return self.dense().chunk(chunks, dim)

    def split(self, split_size: Any, dim: int = 0) -> Any:
        """As of a tensor; into pieces of one expert each, not unpacked."""
        rows = self.shape[0] // len(self)
        sizes = [split_size] * len(self) if isinstance(split_size, int) else list(split_size)
        if dim in (0, -2) and sizes == [rows] * len(self):
            return self.chunk(len(self))
        return self.dense().split(split_size, dim)

    def __getitem__(self, index: Any) -> Any:
        rows = self.shape[0] // len(self)
        if isinstance(index, slice):
            first, last, step = index.indices(self.shape[0])
            if step == 1 and first % rows == 0 and last - first == rows:
                return self.apart()[first // rows]
        return self.dense()[index]

    def transpose(self, dim0: int, dim1: int) -> torch.Tensor:
        """As of a tensor."""
        return self.dense().transpose(dim0, dim1)

    def t(self) -> torch.Tensor:
        """As of a tensor."""
        return self.dense().t()

    T = mT = property(t)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """What takes the parameter apart is asked of the stack; all else gets the numbers."""
        kwargs = kwargs or {}
        if func in _APART and args and isinstance(args[0], FusedStack):
            return getattr(args[0], func.__name__)(*args[1:], **kwargs)
        return func(*unpacked(args), **{name: unpacked(value) for name, value in kwargs.items()})


_APART = (torch.chunk, torch.split, torch.reshape, torch.unflatten)


def _fits(sides: Any, whole: torch.Size) -> bool:
    """Whether `sides`, one of which may be -1, are those of `whole`."""
    known = [int(side) for side in sides]
    if known.count(-1) == 1:
        known[known.index(-1)] = whole.numel() // max(1, math.prod(side for side in known if side != -1))
    return tuple(known) == tuple(whole)
