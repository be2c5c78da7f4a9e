"""A model in float32 for a while: what it computes is told from what half-precision rounds off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bitween.layers.packed import Packed

__all__ = ["in_float32"]


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Hold half-precision weights in float32; the scales of packed layers keep their 16 bits, which are exact.

    On exit the very tensors from before are back.
    """
    held = [*model.parameters()]
    for module in model.modules():
        named = module.named_buffers(recurse=False)
        held += [b for name, b in named if not (isinstance(module, Packed) and name == "scales")]
    kept = [(t, t.data) for t in held if t.dtype in (torch.float16, torch.bfloat16)]
    try:
        for tensor, data in kept:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data
