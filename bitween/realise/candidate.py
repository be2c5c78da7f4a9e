"""A copy of a model whose layers can be exchanged one by one, sharing all memory that is not exchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bitween.model import blocks
from bitween.model.experts import fold_untouched, shared_copy, unfolded
from bitween.quantized_tensor import QuantizedTensor

__all__ = ["Candidate", "shared_copy"]


class Candidate:
    """A model under change: layers hold either the original weight or a quantized one, as plain numbers.

    Full-size numbers keep every product at full speed during the search; `install` puts the packed
    layers in at the end. Restoring a layer gives back the original tensor itself, so rollback is exact.

    Attributes
    ----------
    model : shares every unchanged tensor with the original
    layout : of `model`
    stored : {layer name: QuantizedTensor} of the layers quantized now
    """

    def __init__(self, original: Any, layout: blocks.ModelLayout):
        self.original = layout
        self.model = shared_copy(unfolded(original))
        self.stored: dict[str, QuantizedTensor] = {}
        self._gains: dict[str, torch.nn.Parameter] = {}  # of norms that hold others now: what they held
        self._modules = {name: self.model.get_submodule(name) for x in layout.layers for name in (x.name, *x.shared)}

    def put(self, layer: blocks.Layer, tensor: QuantizedTensor) -> None:
        """Let the layer compute with a stored matrix; layers that share the weight follow."""
        values = tensor.dequantize(layer.module.weight.dtype)
        parameter = torch.nn.Parameter(layer.as_weight(values), requires_grad=False)
        for name in (layer.name, *layer.shared):
            self._modules[name].weight = parameter
        self.stored[layer.name] = tensor

    def restore(self, layer: blocks.Layer) -> None:
        """Give the layer its original weight back, the same tensor."""
        for name in (layer.name, *layer.shared):
            self._modules[name].weight = layer.module.weight
        self.stored.pop(layer.name, None)

    def put_gains(self, gains: Mapping[str, torch.Tensor]) -> None:
        """Let norms, by name, compute with other gains."""
        for name, gain in gains.items():
            module = self.model.get_submodule(name)
            self._gains.setdefault(name, module.weight)
            module.weight = torch.nn.Parameter(gain.to(module.weight.dtype), requires_grad=False)

    def restore_all(self) -> None:
        """Give every layer and every norm its original weight back."""
        for name, weight in self._gains.items():
            self.model.get_submodule(name).weight = weight
        self._gains.clear()
        for layer in self.original.layers:
            if layer.name in self.stored:
                self.restore(layer)

    def install(self, dtype: torch.dtype) -> Any:
        """Replace the quantized layers by packed ones and cast what is left to `dtype`; returns the model."""
        from bitween.layers import QuantizedEmbedding, QuantizedLinear

        for layer in self.original.layers:
            tensor = self.stored.get(layer.name)
            if tensor is None:
                continue
            module = self._modules[layer.name]
            if layer.kind == "embedding":
                packed = QuantizedEmbedding.from_quantized(tensor, dtype=dtype, padding_idx=module.padding_idx)
                self.model.set_submodule(layer.name, packed)
                for name in layer.shared:
                    self.model.set_submodule(name, QuantizedLinear.tied_to(packed))
                continue
            bias = None if module.bias is None else module.bias.detach().to(dtype)
            for name in (layer.name, *layer.shared):
                self.model.set_submodule(name, QuantizedLinear.from_quantized(tensor, bias=bias))
        fold_untouched(self.model)
        for module in self.model.modules():  # not .to(dtype): packed buffers and rotary tables keep their own types
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_floating_point() and parameter.dtype != dtype:
                    setattr(module, name, torch.nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad))
        self.model.config.dtype = dtype
        return self.model
