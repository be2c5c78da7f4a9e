"""transformers' `resize_token_embeddings` for models whose embedding or head is packed.

The library's function knows modules of torch alone. It is given packed ends that have the new size already, and does
the rest itself: ends that are not packed, the config, ties.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from bitween.layers.packed import Packed
from bitween.layers.resizing import can_resize, owner_of, resize
from bitween.model.ties import untie

__all__ = ["register"]


def register() -> None:
    """Let `resize_token_embeddings` of every transformers model take packed ends; once."""
    own = PreTrainedModel.resize_token_embeddings
    if hasattr(own, "_bitween"):
        return

    @functools.wraps(own)
    def resize_token_embeddings(
        self: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        _resize_packed(self, new_num_tokens, pad_to_multiple_of, mean_resizing)
        return own(self, new_num_tokens, pad_to_multiple_of, mean_resizing)

    resize_token_embeddings._bitween = True
    PreTrainedModel.resize_token_embeddings = resize_token_embeddings


def _resize_packed(model: Any, tokens: int | None, multiple: int | None, mean: bool) -> None:
    """Bring packed ends to the size that transformers will ask for."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = {name: m for name, m in (("embedding", table), ("head", head)) if isinstance(m, Packed)}
    if not ends or (tokens is None and multiple is None) or not (multiple is None or isinstance(multiple, int)):
        return  # nothing to do, or a mistake that transformers tells of
    tokens = table.weight.shape[0] if tokens is None else tokens
    if multiple:
        tokens = -(-tokens // multiple) * multiple
    for name, end in ends.items():
        if tokens != end.weight.shape[0] and not can_resize(end):
            raise ValueError(
                f"resize_token_embeddings: expected a packed {name} whose rows are stored one by one; got "
                f"{end.scheme}, whose rows stand in tiles. Resize the model before it is quantized, or leave the "
                f"{name} out with ignore_layers"
            )
    untie(model)
    spread = None if mean else float(getattr(model.config.get_text_config(), "initializer_range", 0.02))
    for end in ends.values():
        if owner_of(end)._shape[0] != tokens:
            resize(model, end, tokens, spread)


register()
