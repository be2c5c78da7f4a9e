"""How many windows pass through a block at once."""

from __future__ import annotations

from bitween.model import blocks

__all__ = ["ONE_PASS_BYTES", "activation_bytes", "fits_one_pass"]

ONE_PASS_BYTES = 1 << 30  # of one block's activations
_BYTES_A_UNIT = 16  # of the widest layer, a token: about four float32 tensors live at once


def fits_one_pass(layout: blocks.ModelLayout, tokens: int) -> bool:
    """Whether one block's activations for so many tokens are small enough to be held at once."""
    return activation_bytes(layout, tokens) <= ONE_PASS_BYTES


def activation_bytes(layout: blocks.ModelLayout, tokens: int) -> int:
    """Bytes of one block's activations for so many tokens, about."""
    widest = max(max(layer.shape) for block in layout.blocks for layer in block.layers)
    return tokens * widest * _BYTES_A_UNIT
