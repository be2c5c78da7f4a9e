"""Layers that read the same input, multiplied in one call: q, k and v, or gate and up, in an attention of your own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bitween import _core
from bitween._threads import follow_torch
from bitween.layers import QuantizedLinear
from bitween.layers.packed import by_torch_alone

__all__ = ["multiply_together"]


def multiply_together(layers: Sequence[QuantizedLinear], x: torch.Tensor) -> list[torch.Tensor]:
    """[layer(x) for layer in layers], the same bits; with few rows activations are rounded once and threads woken once.

    Parameters
    ----------
    layers : QuantizedLinear with as many input features each
    x : (..., in_features) float32, float16 or bfloat16

    Returns
    -------
    list of (..., out_features) tensors of x's dtype

    Each layer is called by itself where one call would change something: more than 16 rows, gradients, autocast,
    torch.compile, another device, layers of different modes, more than four layers.
    """
    features = {layer.in_features for layer in layers}
    if len(features) > 1:
        raise ValueError(f"layers: expected as many input features each; got {sorted(features)}")
    if not _in_one_call(layers, x):
        return [layer(x) for layer in layers]
    follow_torch()
    x = x.detach()
    outs = tuple(x.new_empty((*x.shape[:-1], layer.out_features)) for layer in layers)
    stored = tuple(
        (*layer._packed(), layer.scheme.key, layer.in_features, None if layer.bias is None else layer.bias.detach())
        for layer in layers
    )
    _core.matmul_together(x, stored, outs, layers[0]._mode_number)
    return list(outs)


def _in_one_call(layers: Sequence[QuantizedLinear], x: torch.Tensor) -> bool:
    if not 1 < len(layers) <= _core.MOST_TOGETHER or x.numel() > _core.FEW_TOKENS * layers[0].in_features:
        return False
    if by_torch_alone(x) or torch.is_autocast_enabled("cpu"):
        return False
    if any(layer.scheme.coding == "trellis" for layer in layers):
        return False
    wanted = [x, *(layer.bias for layer in layers if layer.bias is not None)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in wanted):
        return False
    return x.is_contiguous() and not x.is_neg() and len({layer.mode for layer in layers}) == 1
