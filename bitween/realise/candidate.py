"""A copy of a model whose layers can be exchanged one by one, sharing all memory that is not exchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bitween.decode import attach
from bitween.model import blocks
from bitween.model.experts import fold_untouched, shared_copy, unfolded
from bitween.quantized_tensor import QuantizedTensor
from bitween.realise import delivery

__all__ = ["Candidate"]


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

    def install(self, dtype: torch.dtype, ids: torch.Tensor | None = None) -> Any:
        """Replace the quantized layers by packed ones and cast what is left to `dtype`; returns the model.

        Parameters
        ----------
        ids : token ids (1, length) on which the model before and after are compared; default random ones

        Raises
        ------
        RuntimeError
            The model computes something else than the candidate did; see `bitween.realise.delivery`.
        """
        ids = delivery.default_window(self.original.embedding.shape[0]) if ids is None else ids
        expected = delivery.logits_in_float32(self.model, ids)
        for layer in self.original.layers:
            if layer.name in self.stored:
                self._install(layer, self.stored[layer.name], dtype)
        fold_untouched(self.model)
        for module in self.model.modules():  # not .to(dtype): packed buffers and rotary tables keep their own types
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_floating_point() and parameter.dtype != dtype:
                    setattr(module, name, torch.nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad))
        self._tie_again()
        self.model.config.dtype = dtype
        delivery.write_tied_flag(self.model, self.original.tied)
        delivery.check_delivered(expected, delivery.logits_in_float32(self.model, ids), dtype)
        return attach(self.model)

    def _install(self, layer: blocks.Layer, tensor: QuantizedTensor, dtype: torch.dtype) -> None:
        """One packed layer with its bias and mode; modules that share the weight share the codes, each with its own."""
        from bitween.layers import QuantizedEmbedding, QuantizedLinear
        from bitween.layers.embedding import lookup_scale

        table = None
        if layer.kind == "embedding":
            module = self._modules[layer.name]
            marks = {"padding_idx": module.padding_idx, "scale": lookup_scale(module)}
            table = QuantizedEmbedding.from_quantized(tensor, dtype=dtype, **marks)
        for name in (layer.name, *layer.shared):
            old = self._modules[name]
            bias = getattr(old, "bias", None)
            bias = None if bias is None else bias.detach().to(dtype)
            if blocks.kind_of(old) == "embedding" and table is not None:
                packed = table
            elif table is not None:
                packed = QuantizedLinear.tied_to(table, bias)
            else:
                packed = QuantizedLinear.from_quantized(tensor, bias=bias, dtype=dtype)
            self.model.set_submodule(name, packed.train(old.training))

    def _tie_again(self) -> None:
        """Weights that were one parameter before the cast are one after it."""
        for layer in self.original.layers:
            if layer.name not in self.stored:
                weight = self._modules[layer.name].weight
                for name in layer.shared:
                    self._modules[name].weight = weight
