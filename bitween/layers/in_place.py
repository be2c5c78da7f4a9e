"""A module that keeps its own arithmetic while its weight becomes packed bytes.

Position tables that count from an offset, grouped linear layers and the like compute more than a product or a lookup.
Such a module stays what it is, an object of a class derived from its own, except that its `weight` is read from the
codes: looked up row by row where the module looks up, unpacked where it does anything else.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import nn

from bitween.layers.packed import Packed, empty_stored
from bitween.quantized_tensor import QuantizedTensor
from bitween.scheme import Scheme

__all__ = ["PackedInPlace", "can_be_packed"]


def can_be_packed(module: nn.Module) -> bool:
    """Whether a module's weight is a matrix that it does not compute from others."""
    weight = module._parameters.get("weight")
    return isinstance(module, (nn.Linear, nn.Embedding)) and weight is not None and weight.ndim == 2


class PackedInPlace(Packed):
    """What is put before a module's own class; objects come from `of` and `empty_like`.

    The weight is a matrix (rows, cols); parameters other than `weight` stay parameters, the very objects.
    """

    @staticmethod
    def of(module: nn.Module, stored: QuantizedTensor, dtype: torch.dtype) -> PackedInPlace:
        """A copy of `module` whose weight is `stored`; the module itself is left alone.

        Raises ValueError where the weight's shape is another.
        """
        if tuple(module.weight.shape) != tuple(stored.shape):
            raise ValueError(f"stored: expected the weight's shape {tuple(module.weight.shape)}; got {stored.shape}")
        new = copy.copy(module)  # nn.Module's copy has dictionaries of its own with the same tensors in them
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            setattr(new, name, copy.copy(getattr(module, name)))
        del new._parameters["weight"]
        new.__class__ = _derived(type(module))
        new._keep(stored, dtype)
        return new

    @classmethod
    def empty_like(cls, module: nn.Module, scheme: Scheme) -> PackedInPlace | None:
        """An empty one for a module with a matrix as its weight; None for any other module."""
        if not can_be_packed(module):
            return None
        weight = module.weight
        return cls.of(module, empty_stored(*weight.shape, scheme, weight.device), weight.dtype)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Pickled by the class it was derived from, since the derived one has no name to be found by."""
        return _blank, (type(self).__bases__[1],), self.__dict__


@cache
def _derived(kind: type) -> type:
    return type(f"Packed{kind.__name__}", (PackedInPlace, kind), {"__module__": kind.__module__})


def _blank(kind: type) -> PackedInPlace:
    return _derived(kind).__new__(_derived(kind))
