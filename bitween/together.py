"""Layers that read the same input, multiplied in one call while a model generates.

Attention asks for q, k and v of the same hidden states, one module after the other. The first that is asked computes
all of them: activations are rounded once and threads are woken once. The others hand out what is already there.
"""

from __future__ import annotations

from threading import get_ident
from typing import Any

import torch
from torch import nn

from . import _core
from ._threads import follow_torch
from .layers import QuantizedLinear

__all__ = ["multiply_together"]

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))
_FEW_ROWS = 16


class Together:
    """Up to four layers with as many input features. A layer that turns out to read something else leaves."""

    def __init__(self, layers: list[QuantizedLinear]) -> None:
        self.layers = layers
        self._waiting: dict[int, tuple[torch.Tensor, int, dict[QuantizedLinear, torch.Tensor]]] = {}  # by thread

    def multiply(self, layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor | None:
        """The layer's product with x, the same bits as `layer.multiply`; None when x is not for this way."""
        waiting = self._waiting.get(get_ident())
        if waiting is not None:
            source, version, ready = waiting
            if source is x and version == x._version and layer in ready:
                out = ready.pop(layer)
                if not ready:
                    del self._waiting[get_ident()]
                return out
            self._dismiss(ready)
        if len(self.layers) < 2 or x.numel() > _FEW_ROWS * layer.in_features or x.is_neg() or not x.is_contiguous():
            return None
        if x.is_inference() or any(other._mode_number != layer._mode_number for other in self.layers):
            return None
        return self._multiply_all(layer, x)

    def _multiply_all(self, layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
        follow_torch()
        layers = list(self.layers)
        outs = [x.new_empty((*x.shape[:-1], other.out_features)) for other in layers]
        biases = [other._parameters["bias"] for other in layers]
        stored = tuple(
            (*other._packed(), other.scheme.key, other.in_features, None if bias is None else bias.detach())
            for other, bias in zip(layers, biases, strict=True)
        )
        _core.matmul_together(x, stored, tuple(outs), layer._mode_number)
        ready = dict(zip(layers, outs, strict=True))
        out = ready.pop(layer)
        self._waiting[get_ident()] = (x, x._version, ready)
        return out

    def _dismiss(self, ready: dict[QuantizedLinear, Any]) -> None:
        """What nobody asked for was computed in vain: its layers go their own way from now on."""
        self._waiting.pop(get_ident(), None)
        for layer in ready:
            layer._together = None
        self.layers = [layer for layer in self.layers if layer not in ready]


def multiply_together(model: nn.Module) -> int:
    """Let q, k and v, and gate and up, of every block be multiplied in one call; how many such groups there are.

    Results keep all their bits. Copies of the model are without it, and gradients, long inputs and other devices
    go the layers' own way.
    """
    n = 0
    for module in model.modules():
        for names in _SIBLINGS:
            layers = [child for name in names if type(child := module._modules.get(name)) is QuantizedLinear]
            if len(set(map(id, layers))) < 2 or len({layer.in_features for layer in layers}) != 1:
                continue
            group = Together(layers)
            for layer in layers:
                layer._together = group
            n += 1
    return n
