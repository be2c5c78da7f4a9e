"""A quantized model as a transformers checkpoint in another library's format."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from bitween.layers import packed_layers
from bitween.quantized_tensor import QuantizedTensor
from bitween.store.files import atomic_directory

__all__ = ["write_checkpoint"]


def _whole(name: str, stored: QuantizedTensor) -> list[tuple[str, QuantizedTensor]]:
    return [(name, stored)]


def write_checkpoint(
    model: nn.Module,
    tokenizer: Any,
    directory: str | os.PathLike,
    *,
    form: str,
    target: str,
    refused: Mapping[str, str],
    config: Callable[[nn.Module], dict[str, Any]],
    tensors: Callable[[QuantizedTensor], dict[str, torch.Tensor]],
    max_shard_size: str | int,
    pieces: Callable[[str, QuantizedTensor], Iterable[tuple[str, QuantizedTensor]]] = _whole,
) -> None:
    """Write a directory whole or not at all.

    Parameters
    ----------
    model : transformers model with packed layers; it is not changed
    tokenizer : its tokenizer, or None
    directory : must not exist, or be empty
    form, target : the format's name, and that of the export target that plans for it
    refused : {layer: why the format cannot hold it}
    config : gives the `quantization_config` of the model
    tensors : gives what stands in the files for a matrix's codes, scales and zeros
    pieces : gives (name, matrix) of all that a layer is written as; default itself

    Raises
    ------
    ValueError
        naming the layers that are refused.
    """
    if refused:
        shown = "; ".join(f"{name}: {why}" for name, why in list(refused.items())[:3])
        raise ValueError(
            f'model: {len(refused)} layers do not fit {form}\'s format ({shown}): plan with export_target="{target}"'
        )
    state = model.state_dict()
    for name, module in packed_layers(model):
        for part in ("codes", "scales", "zeros"):
            state.pop(f"{name}.{part}", None)
        for own, matrix in pieces(name, module.quantized):
            state |= {f"{own}.{part}": value for part, value in tensors(matrix).items()}
    # a view of the model with another config: no module is copied, and the model's own saving is not touched
    plain = copy.copy(model)
    plain.config = copy.deepcopy(model.config)
    plain.config.quantization_config = config(model)
    plain.hf_quantizer = None
    with atomic_directory(directory) as folder:
        plain.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
