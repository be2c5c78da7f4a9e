"""Mixtures of experts in GGUF: one tensor holds a matrix of every expert, and gate and up stand apart.

transformers keeps (experts, 2 · inner, width) of gates above ups, and (experts, width, inner) of downs; here a packed
stack has a layer for each expert. Rows are independent in every block type, so that taking gates from ups changes no
number; one tensor has one block type, so that the experts of a stack must agree on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from bitween.export import gguf_blocks
from bitween.layers.experts import ExpertStack
from bitween.layers.packed import Packed

__all__ = ["MIXTURES", "add_settings", "check", "is_vector", "parameters", "reasons", "stacks"]

# {model type: whether llama.cpp makes the chosen experts' weights add up to one}
MIXTURES = {"mixtral": True, "qwen2_moe": False, "qwen3_moe": True}
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def check(model: nn.Module) -> None:
    """Raise ValueError where llama.cpp would run a mixture of experts otherwise than transformers does."""
    config = model.config
    if config.model_type not in MIXTURES:
        return
    normed = bool(getattr(config, "norm_topk_prob", True))
    if normed != MIXTURES[config.model_type]:
        raise ValueError(
            f"model: expected norm_topk_prob={MIXTURES[config.model_type]} of a {config.model_type}, as llama.cpp has "
            f"it; got {normed}"
        )
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        raise ValueError("model: expected experts in every block, as llama.cpp has them; some blocks have none")


def reasons(model: nn.Module, exact: bool) -> dict[str, str]:
    """{stack: why it is no tensor of GGUF}."""
    found = {}
    for name, stack in _packed_stacks(model):
        layers = [stack.layer(e) for e in range(len(stack))]
        if not all(isinstance(layer, Packed) for layer in layers):
            found[name] = "some of its experts are packed and some are not; GGUF stacks them in one tensor"
            continue
        kinds = {str(gguf_blocks.block_type(x.quantized.scheme, x.quantized.shape, exact)) for x in layers}
        if len(kinds) > 1:
            found[name] = f"its experts take {len(kinds)} block types; GGUF stacks them in one tensor"
    return found


def stacks(model: nn.Module, exact: bool) -> Iterator[tuple[str, np.ndarray, Any, bool]]:
    """(name as before experts were fused, blocks uint8 (experts, rows, bytes of a row), block type, whether numbers
    changed) of every packed stack."""
    for name, stack in _packed_stacks(model):
        home, _, own = name.rpartition(".")
        stored = [stack.layer(e).quantized for e in range(len(stack))]
        kind = gguf_blocks.block_type(stored[0].scheme, stored[0].shape, exact)
        parts = _PARTS[own]
        for place, part in enumerate(parts):
            size = stored[0].shape[0] // len(parts)
            rows = [matrix.row_range(place * size, (place + 1) * size) for matrix in stored]
            blocks = np.stack([gguf_blocks.encode(matrix, kind) for matrix in rows])
            changed = any(gguf_blocks.is_rounded(matrix.scheme, kind) for matrix in stored)
            yield f"{home}.{part}", blocks, kind, changed


def is_vector(layer: str) -> bool:
    """Whether a layer of one output is a vector of GGUF, read in full precision, rather than a matrix of one row."""
    return layer.endswith("shared_expert_gate")


def parameters(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A parameter of full precision under the names of before experts were fused; any other as it is."""
    if is_vector(name.removesuffix(".weight")):
        yield name, tensor[0]
        return
    home, _, own = name.rpartition(".")
    if tensor.ndim != 3 or own not in _PARTS:
        yield name, tensor
        return
    parts = _PARTS[own]
    yield from ((f"{home}.{part}.weight", x) for part, x in zip(parts, tensor.chunk(len(parts), dim=1), strict=True))


def add_settings(writer: Any, config: Any) -> None:
    """How many experts there are, are chosen, and how wide they are."""
    if config.model_type not in MIXTURES:
        return
    writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type != "mixtral":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if shared := getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(shared)


def _packed_stacks(model: nn.Module) -> list[tuple[str, ExpertStack]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ExpertStack)]
