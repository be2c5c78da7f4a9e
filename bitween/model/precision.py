"""A model in float32 for a while: what it computes is told from what half-precision rounds off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bitween.layers.packed import Packed

__all__ = ["in_float32"]


@contextmanager
def in_float32(model: nn.Module, one_by_one: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Hold half-precision weights in float32; the scales of packed layers keep their 16 bits, which are exact.

    Parameters
    ----------
    one_by_one : modules whose weights are so only while they run, blocks for instance: never is all of them there

    On exit the very tensors from before are back.
    """
    parts = list(one_by_one)
    inside = {id(tensor) for part in parts for tensor in _held(part)}
    at_once = [tensor for tensor in _held(model) if id(tensor) not in inside]
    kept = _to_float32(at_once)
    running: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def before(module: nn.Module, *_: object) -> None:
        running[module] = _to_float32(_held(module))

    def after(module: nn.Module, *_: object) -> None:
        _back(running.pop(module, []))

    handles = []
    try:
        for part in parts:
            handles.append(part.register_forward_pre_hook(before))
            handles.append(part.register_forward_hook(after, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for tensors in running.values():
            _back(tensors)
        _back(kept)


def _held(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers of a module and what is inside it, but for the scales of packed layers."""
    held = [*module.parameters()]
    for part in module.modules():
        named = part.named_buffers(recurse=False)
        held += [b for name, b in named if not (isinstance(part, Packed) and name == "scales")]
    return held


def _to_float32(tensors: Iterable[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tensor, its numbers from before) of those that were in half precision."""
    kept = [(t, t.data) for t in tensors if t.dtype in (torch.float16, torch.bfloat16)]
    for tensor, data in kept:
        tensor.data = data.float()
    return kept


def _back(kept: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for tensor, data in kept:
        tensor.data = data
