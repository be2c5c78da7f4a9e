"""Layers on the bytes of a layer that is gone, as `set_input_embeddings` leaves a tied head behind."""

from __future__ import annotations

from torch import nn

from bitween.layers import QuantizedEmbedding, QuantizedLinear
from bitween.layers.packed import Borrowed, Packed
from bitween.layers.resizing import owner_of
from bitween.model.ties import write_tied_flag

__all__ = ["adopt"]


def adopt(model: nn.Module) -> None:
    """Make layers on the bytes of a layer that is no longer part of the model hold these bytes themselves."""
    present = set(model.modules())
    new: dict[Packed, Packed] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, Borrowed) or (owner := owner_of(module)) in present:
            continue
        table = isinstance(module, QuantizedEmbedding)
        if owner in new:
            kind = QuantizedEmbedding if table else QuantizedLinear
            made = kind.tied_to(new[owner], *(() if table else (module.bias,)))
        elif table:
            scale = None if module.multiplier is None else float(module.multiplier)
            made = QuantizedEmbedding.from_quantized(module.quantized, module.dtype, module.padding_idx, scale)
        else:
            made = QuantizedLinear.from_quantized(module.quantized, module.bias, module.dtype)
        if not table:
            made.mode = module.mode
        new.setdefault(owner, made)
        model.set_submodule(name, made.train(module.training))
    if new and getattr(model, "get_output_embeddings", lambda: None)() in set(new.values()):
        write_tied_flag(model, False)
