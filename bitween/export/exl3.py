"""ExLlamaV3's checkpoint: turned trellis codes as they are.

EXL3 keeps a layer as y = svh * (H V H (suh * x)), H the orthogonal Hadamard transform of each 128 numbers, V in trellis
codes whose states have 16 bits. The order inside a tile and the ring of bits are those of `Scheme.trellis(...,
turned=True)`; tiles stand the other way round, input by output, and the bytes of each word of 32 bits in the machine's
order. So every code is carried over. ExLlamaV3 decodes values in float16, which rounds each by at most 2^-11 of itself
and lowers all by .0018 of a deviation.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import nn

from bitween.export.checkpoint import write_checkpoint
from bitween.layers import QuantizedEmbedding, packed_layers
from bitween.quantized_tensor import QuantizedTensor
from bitween.rounding.turned import signs
from bitween.scheme import TILE

__all__ = ["config", "export_exl3", "reasons", "tensors"]

MULTIPLIER = 0x83DCD12D  # of the codebook "mul1", and of our states of 16 bits
_UNIT = float(np.array([0x1EEE], np.uint16).view(np.float16)[0])  # what one unit of a sum of bytes is worth there


def reasons(model: nn.Module) -> dict[str, str]:
    """{layer: why the format cannot hold it} of a quantized model; empty when all fits."""
    found = {}
    for name, module in packed_layers(model):
        if isinstance(module, QuantizedEmbedding):
            found[name] = "an embedding; it holds linear layers"
        elif "codes" not in module._buffers:
            continue  # a head that shares an embedding's codes, which is refused by itself
        elif not module.scheme.turned:
            found[name] = f"{module.scheme}; it holds turned trellis codes"
    return found


def config(model: nn.Module) -> dict[str, Any]:
    """The `quantization_config`: mean bits of the layers and of the head, and which codebook."""
    layers = dict(packed_layers(model))
    head = [int(m.scheme.bits) for name, m in layers.items() if name == "lm_head"]
    sizes = [(m.in_features * m.out_features, m.scheme.bits) for name, m in layers.items() if name != "lm_head"]
    mean = sum(n * bits for n, bits in sizes) / max(1, sum(n for n, _ in sizes))
    return {
        "quant_method": "exl3",
        "bits": round(mean, 2),
        "head_bits": head[0] if head else 16,
        "codebook": "mul1",
        "tensor_storage": {
            name: {"quant_format": "exl3", "bits_per_weight": int(m.scheme.bits), "mul1_multiplier": MULTIPLIER}
            for name, m in layers.items()
        },
    }


def tensors(stored: QuantizedTensor) -> dict[str, torch.Tensor]:
    """A layer's `trellis` int16 (cols / 16, rows / 16, 16 * bits), `suh` float16 (cols,), `svh` float16 (rows,) and
    `mul1` int32 ().

    Raises
    ------
    ValueError
        a scheme that is not turned.
    """
    if not stored.scheme.turned:
        raise ValueError(f"stored: expected turned trellis codes; got {stored.scheme}")
    (rows, cols), bits = stored.shape, int(stored.scheme.bits)
    words = np.ascontiguousarray(stored.codes).view(">u4").astype("<u4")
    tiles = words.reshape(rows // TILE, cols // TILE, 8 * bits).transpose(1, 0, 2)
    into = np.tile(signs(), cols // len(signs())) / (TILE * 8 * _UNIT)  # a scale of ours is worth 1 / 128 a unit
    out = np.asarray(stored.scales, np.float16)[:, 0] * np.tile(signs(), rows // len(signs())).astype(np.float16)
    return {
        "trellis": torch.from_numpy(np.ascontiguousarray(tiles).view(np.int16)),
        "suh": torch.from_numpy(into.astype(np.float16)),
        "svh": torch.from_numpy(out),
        "mul1": torch.tensor(MULTIPLIER - (1 << 32), dtype=torch.int32),
    }


def export_exl3(
    model: nn.Module, tokenizer: Any, directory: str | os.PathLike, *, max_shard_size: str | int = "5GB"
) -> None:
    """Write a quantized model as an EXL3 checkpoint.

    Parameters
    ----------
    model : transformers model with packed layers; it is not changed
    tokenizer : its tokenizer, or None
    directory : must not exist, or be empty

    Raises
    ------
    ValueError
        naming the layers that the format cannot hold.
    """
    write_checkpoint(
        model,
        tokenizer,
        directory,
        form="EXL3",
        target="exl3",
        refused=reasons(model),
        config=config,
        tensors=tensors,
        max_shard_size=max_shard_size,
    )
