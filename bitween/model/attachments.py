"""What people attach to a model and a packed layer could not carry on: refused before any work, with the way out.

A quantized layer is another module in the place of the old one. Its weight, its bias and its mode go over; hooks, a
`forward` set on the one object, weights that are computed from others and adapters would be dropped in silence, and
the proof would be of a model that nobody gets.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn
from torch.nn.utils import parametrize

from bitween.model.layout import Layer, kind_of

__all__ = ["check_attachments", "check_own_weights"]

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def check_own_weights(model: nn.Module) -> None:
    """ValueError, with the module's name, where a weight is not a parameter of its own layer.

    To be called before the model is looked at further: adapters and parametrized weights confuse whatever runs it.
    """
    for name, module in model.named_modules():
        if _is_adapter(module):
            where = f"{name}: " if name else ""
            raise ValueError(
                f"model: expected a model without adapters; got {where}{type(module).__name__} of peft: "
                "call merge_and_unload() first, and give what it returns"
            )
        if parametrize.is_parametrized(module) and not _stays(module):
            raise ValueError(
                f"{name}: expected weights of its own; got a parametrization of "
                f"{', '.join(module.parametrizations)}: call torch.nn.utils.parametrize.remove_parametrizations first"
            )
        if any(key.endswith("_mask") and f"{key[:-5]}_orig" in module._parameters for key in module._buffers):
            raise ValueError(
                f"{name}: expected weights of its own; got a pruning mask that is not merged: "
                "call torch.nn.utils.prune.remove first"
            )
        if "weight_g" in module._parameters and "weight" not in module._parameters:
            raise ValueError(
                f"{name}: expected a weight of its own; got weight normalisation: "
                "call torch.nn.utils.remove_weight_norm first"
            )


def check_attachments(model: nn.Module, layers: Iterable[Layer]) -> None:
    """ValueError, with the module's name, for what stands on layers that are to be replaced and would be lost."""
    for layer in layers:
        for name in (layer.name, *layer.shared):
            _check(name, _holder(model, name))


def _holder(model: nn.Module, name: str) -> nn.Module:
    """The module of this name; of one matrix in a stack of experts the module that holds the stack."""
    while name:
        try:
            return model.get_submodule(name)
        except AttributeError:
            name = name.rpartition(".")[0]
    return model


def _check(name: str, module: nn.Module) -> None:
    if "_hf_hook" in module.__dict__:
        raise ValueError(
            f"{name}: expected a module without hooks; got one of accelerate: load the model without device_map, or "
            "call accelerate.hooks.remove_hook_from_module(model, recurse=True) first"
        )
    if "forward" in module.__dict__:
        raise ValueError(
            f"{name}: expected {type(module).__name__}'s own forward; got one set on this module, which a packed layer "
            f"would not run: delete it, or name the layer in ignore_layers"
        )
    for kind in _HOOKS:
        if getattr(module, kind, None):
            raise ValueError(
                f"{name}: expected a module without hooks; got {len(getattr(module, kind))} in {kind}, which a packed "
                "layer would not run: remove them, or name the layer in ignore_layers"
            )
    if kind_of(module) == "embedding" and getattr(module, "max_norm", None) is not None:
        raise ValueError(
            f"{name}: expected max_norm=None, since packed rows are not renormalised; got {module.max_norm}"
        )


def _stays(module: nn.Module) -> bool:
    """A convolution in groups is left alone: wav2vec2's, whose weight transformers itself computes from two others, is
    one, and its checkpoints hold these two."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups > 1


def _is_adapter(module: nn.Module) -> bool:
    """Whether it is peft's, if peft is loaded; a model with adapters has loaded it."""
    found = []
    for library, kind in (("peft.peft_model", "PeftModel"), ("peft.tuners.tuners_utils", "BaseTunerLayer")):
        found.append(getattr(sys.modules.get(library), kind, ()))
    return isinstance(module, tuple(kind for kind in found if kind))
