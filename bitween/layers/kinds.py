"""The kinds of packed layers: which of them stands in for a module of the model."""

from __future__ import annotations

from torch import nn

from bitween.layers.conv import QuantizedConv
from bitween.layers.embedding import QuantizedEmbedding
from bitween.layers.in_place import PackedInPlace
from bitween.layers.linear import QuantizedLinear
from bitween.layers.packed import Packed
from bitween.scheme import Scheme

__all__ = ["KINDS", "empty_like"]

# A new kind is one file, and its name here; the last takes what has arithmetic of its own.
KINDS: tuple[type[Packed], ...] = (QuantizedLinear, QuantizedEmbedding, QuantizedConv, PackedInPlace)


def empty_like(module: nn.Module, scheme: Scheme) -> Packed | None:
    """An empty packed layer of the module's shape and device, to be filled from a file; None where no kind fits."""
    return next((made for kind in KINDS if (made := kind.empty_like(module, scheme)) is not None), None)
