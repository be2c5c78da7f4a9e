"""A copy of a model whose layers can be exchanged one by one, sharing all memory that is not exchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bitween.decode import attach
from bitween.model import blocks
from bitween.model.experts import fold_untouched, shared_copy, unfolded
from bitween.model.spill import Spill, end_rest
from bitween.model.ties import write_tied_flag
from bitween.quantized_tensor import QuantizedTensor
from bitween.realise import delivery

__all__ = ["Candidate"]


class Candidate:
    """A model under change: layers hold either the original weight or a quantized one, as plain numbers.

    Full-size numbers, in the files of `spill`, keep every product at full speed during the search; `install` puts the
    packed layers in at the end. Restoring a layer gives back the original tensor itself, so rollback is exact.

    Parameters
    ----------
    original, layout : the model and its `inspect` result
    spill : keeps the numbers of quantized layers; default in memory

    Attributes
    ----------
    model : shares every unchanged tensor with the original
    original : layout of the original
    stored : {layer name: QuantizedTensor} of the layers quantized now
    """

    def __init__(self, original: Any, layout: blocks.ModelLayout, spill: Spill | None = None):
        self.original = layout
        self._spill = spill or Spill(least=None)
        self.model = shared_copy(unfolded(original))
        self.stored: dict[str, QuantizedTensor] = {}
        self._gains: dict[str, torch.nn.Parameter] = {}  # of norms that hold others now: what they held
        self._modules = {name: self.model.get_submodule(name) for x in layout.layers for name in (x.name, *x.shared)}

    def put(self, layer: blocks.Layer, tensor: QuantizedTensor) -> None:
        """Let the layer compute with a stored matrix; layers that share the weight follow."""
        values = self._spill.keep(layer.as_weight(tensor.dequantize(layer.module.weight.dtype)))
        parameter = torch.nn.Parameter(values, requires_grad=False)
        for name in (layer.name, *layer.shared):
            self._modules[name].weight = parameter
        self.stored[layer.name] = tensor

    def restore(self, layer: blocks.Layer) -> None:
        """Give the layer its original weight back, the same tensor."""
        for name in (layer.name, *layer.shared):
            self._modules[name].weight = layer.module.weight
        self.stored.pop(layer.name, None)

    def hold(self, stored: Mapping[str, QuantizedTensor], gains: Mapping[str, torch.Tensor]) -> None:
        """Compute with exactly these matrices and gains; layers that do so already are not touched."""
        self._restore_gains()
        for layer in self.original.layers:
            tensor = stored.get(layer.name)
            if tensor is self.stored.get(layer.name):
                continue
            if tensor is None:
                self.restore(layer)
            else:
                self.put(layer, tensor)
        self.put_gains(gains)

    def put_gains(self, gains: Mapping[str, torch.Tensor]) -> None:
        """Let norms, by name, compute with other gains."""
        for name, gain in gains.items():
            module = self.model.get_submodule(name)
            self._gains.setdefault(name, module.weight)
            module.weight = torch.nn.Parameter(gain.to(module.weight.dtype), requires_grad=False)

    def restore_all(self) -> None:
        """Give every layer and every norm its original weight back."""
        self._restore_gains()
        for layer in self.original.layers:
            if layer.name in self.stored:
                self.restore(layer)

    def _restore_gains(self) -> None:
        for name, weight in self._gains.items():
            self.model.get_submodule(name).weight = weight
        self._gains.clear()

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
        end_rest(self.model)
        for layer in self.original.layers:
            if layer.name in self.stored:
                self._install(layer, self._spill.recall(self.stored[layer.name]), dtype)
        fold_untouched(self.model)
        for module in self.model.modules():  # not .to(dtype): packed buffers and rotary tables keep their own types
            for name, parameter in module.named_parameters(recurse=False):
                values = parameter.detach()
                if parameter.is_floating_point() and parameter.dtype != dtype:
                    values = values.to(dtype)
                values = self._spill.in_memory(values)
                if values.data_ptr() != parameter.data_ptr():
                    setattr(module, name, torch.nn.Parameter(values, parameter.requires_grad))
        self._tie_again()
        self.model.config.dtype = dtype
        write_tied_flag(self.model, self.original.tied)
        delivery.check_delivered(expected, delivery.logits_in_float32(self.model, ids), dtype)
        return attach(self.model)

    def _install(self, layer: blocks.Layer, tensor: QuantizedTensor, dtype: torch.dtype) -> None:
        """One packed layer with its bias and mode; modules that share the weight share the codes, each with its own."""
        from bitween.layers import QuantizedEmbedding, QuantizedLinear
        from bitween.layers.conv import QuantizedConv
        from bitween.layers.embedding import lookup_scale, stored_scale
        from bitween.layers.in_place import PackedInPlace

        table, module = None, self._modules[layer.name]
        if layer.kind == "conv":
            bias = None if module.bias is None else module.bias.detach().to(dtype)
            self.model.set_submodule(layer.name, QuantizedConv(tensor, module, bias, dtype).train(module.training))
            return
        lookup = isinstance(module, torch.nn.Embedding) and lookup_scale(module) is not None
        if layer.kind == "own" or (layer.kind == "table" and not lookup):
            in_place = PackedInPlace.of(module, tensor, dtype)
            self.model.set_submodule(layer.name, in_place.train(module.training))
            return
        if layer.kind in ("embedding", "table"):
            marks = {"padding_idx": module.padding_idx, "scale": stored_scale(module)}
            table = QuantizedEmbedding.from_quantized(tensor, dtype=dtype, **marks)
        first: torch.nn.Module | None = None
        for name in (layer.name, *layer.shared):
            old = self._modules[name]
            if first is not None and old is module:  # one module under two names
                self.model.set_submodule(name, first)
                continue
            bias = getattr(old, "bias", None)
            bias = None if bias is None else bias.detach().to(dtype)
            if blocks.kind_of(old) == "embedding" and table is not None:
                packed = table if name == layer.name else QuantizedEmbedding.tied_to(table)
            elif table is not None:
                packed = QuantizedLinear.tied_to(table, bias)
            elif first is not None:
                packed = QuantizedLinear.tied_to(first, bias)
            else:
                packed = QuantizedLinear.from_quantized(tensor, bias=bias, dtype=dtype)
            first = packed if first is None else first
            self.model.set_submodule(name, packed.train(old.training))

    def _tie_again(self) -> None:
        """Weights that were one parameter before the cast are one after it."""
        for layer in self.original.layers:
            if layer.name not in self.stored:
                weight = self._modules[layer.name].weight
                for name in layer.shared:
                    self._modules[name].weight = weight
