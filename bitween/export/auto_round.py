"""AutoRound's checkpoint: mixed widths, symmetric and asymmetric, read by transformers with auto-round installed.

The codes are the transpose of what bitween stores, in words of 32 bits; zero points are packed along the rows. vLLM and
GPTQ kernels read the same tensors. (Format `auto_round:gptqmodel`, whose zero points are stored as they are.)
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import nn

from bitween import _core
from bitween.export.checkpoint import write_checkpoint
from bitween.layers import QuantizedEmbedding, packed_layers
from bitween.quantized_tensor import QuantizedTensor
from bitween.scheme import COMMON_BITS, Scheme

__all__ = ["config", "export_auto_round", "reasons", "tensors"]

_WORD = 32  # rows and columns are packed in runs of 32


def reasons(model: nn.Module) -> dict[str, str]:
    """{layer: why the format cannot hold it} of a quantized model; empty when all fits."""
    found = {}
    for name, module in packed_layers(model):
        scheme, (rows, cols) = module.scheme, module.quantized.shape
        if isinstance(module, QuantizedEmbedding):
            found[name] = "an embedding; it holds linear layers"
        elif "codes" not in module._buffers:
            continue  # a head that shares an embedding's codes, which is refused by itself
        elif scheme.bits not in COMMON_BITS:
            found[name] = f"{scheme.bits:g} bits; it holds 2, 3, 4, 5, 6 and 8"
        elif rows % _WORD or cols % _WORD:
            found[name] = f"{rows} x {cols}; both must be multiples of {_WORD}"
        elif scheme.group_size != -1 and cols % scheme.group_size:
            found[name] = f"{cols} columns are not a multiple of the group size {scheme.group_size}"
    return found


def config(model: nn.Module) -> dict[str, Any]:
    """The `quantization_config`: the most frequent scheme, then what each other layer has instead."""
    schemes = {name: module.scheme for name, module in packed_layers(model)}
    base = max(sorted(set(schemes.values())), key=list(schemes.values()).count)
    extra = {name: _settings(scheme) for name, scheme in schemes.items() if scheme != base or name == "lm_head"}
    extra |= {name: {"bits": 16} for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    blocks = sorted({name.split(".layers.")[0] + ".layers" for name in schemes if ".layers." in name})
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round:gptqmodel",
        "data_type": "int",
        "block_name_to_quantize": ",".join(blocks),
        "extra_config": extra,
        **_settings(base),
    }


def _settings(scheme: Scheme) -> dict[str, Any]:
    return {"bits": int(scheme.bits), "group_size": scheme.group_size, "sym": scheme.symmetric}


def tensors(stored: QuantizedTensor) -> dict[str, torch.Tensor]:
    """A layer's `qweight` int32 (cols / 32 * bits, rows), `qzeros` int32 (groups, rows / 32 * bits), `scales` float16
    (groups, rows)."""
    words = np.ascontiguousarray(np.ascontiguousarray(stored.codes).view(np.int32).T)
    zeros = stored.unpack_zeros().astype(np.uint8)
    packed = _core.pack(np.ascontiguousarray(zeros.T), stored.scheme.levels)
    return {
        "qweight": torch.from_numpy(words),
        "qzeros": torch.from_numpy(np.ascontiguousarray(packed).view(np.int32)),
        "scales": torch.from_numpy(np.ascontiguousarray(np.asarray(stored.scales).T)),
    }


def export_auto_round(
    model: nn.Module, tokenizer: Any, directory: str | os.PathLike, *, max_shard_size: str | int = "5GB"
) -> None:
    """Write a quantized model as an AutoRound checkpoint.

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
        form="AutoRound",
        target="auto-round",
        refused=reasons(model),
        config=config,
        tensors=tensors,
        max_shard_size=max_shard_size,
    )
