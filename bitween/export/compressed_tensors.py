"""compressed-tensors: as `save_model` writes it, and of models with experts each expert's matrices under the names of
before they were fused.

vLLM loads experts so, every layer with its own schemes, those of one layer alike. transformers 5.24 unpacks them
(`CompressedTensorsConfig(dequantize=True)`), all experts by one scheme and all other layers by one. What `save_model`
writes loads packed.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import nn

from bitween.export.checkpoint import write_checkpoint
from bitween.layers import packed_layers
from bitween.layers.experts import ExpertStack
from bitween.layers.packed import Packed
from bitween.quantized_tensor import QuantizedTensor
from bitween.scheme import Scheme
from bitween.store import compressed_tensors
from bitween.store.saving import save_model

__all__ = ["export_compressed_tensors"]

_EXPERTS = r"re:.*\.experts\.\d+\..*"


def export_compressed_tensors(
    model: nn.Module, tokenizer: Any, directory: str | os.PathLike, *, max_shard_size: str | int = "5GB"
) -> None:
    """Write a quantized model as a compressed-tensors checkpoint.

    Parameters
    ----------
    model : transformers model with packed layers; it is not changed
    tokenizer : its tokenizer, or None
    directory : must not exist, or be empty

    Raises
    ------
    ValueError
        naming the layers that the format cannot hold: experts that their family never kept one by one too.

    Warns
    -----
    RuntimeWarning
        transformers would unpack the checkpoint by wrong schemes; vLLM reads it as it is meant.
    """
    if not any(isinstance(module, ExpertStack) for module in model.modules()):
        save_model(model, tokenizer, directory, format="compressed-tensors", max_shard_size=max_shard_size)
        return
    found = _pieces(model)

    def pieces(name: str, stored: QuantizedTensor) -> list[tuple[str, QuantizedTensor]]:
        if name not in found:
            return [(name, stored)]
        return [(own, stored.row_range(first, last)) for own, first, last in found[name]]

    groups: dict[Scheme, list[str]] = {}
    for name, module in packed_layers(model):
        groups.setdefault(module.scheme, []).extend(own for own, _ in pieces(name, module.quantized))
    refused = _refused(model, found)
    config = {} if refused else _config(model, groups, found)
    write_checkpoint(
        model,
        tokenizer,
        directory,
        form="compressed-tensors",
        target="vllm",
        refused=refused,
        config=lambda model: config,
        tensors=compressed_tensors.tensors,
        pieces=pieces,
        max_shard_size=max_shard_size,
    )


def _pieces(model: nn.Module) -> dict[str, list[tuple[str, int, int]]]:
    """{expert: [(name of a matrix before experts were fused, its first row, the row after its last)]}, for experts
    whose family kept them one by one, by transformers' own table of conversions.

    The rows of every stack go through that table as numbers, so that which of them a matrix gets is read off.
    """
    stacks = {n: m for n, m in model.named_modules() if isinstance(m, ExpertStack) and _is_whole(m)}
    try:
        from transformers.core_model_loading import revert_weight_conversion

        numbers, owners = {}, []
        for name, stack in stacks.items():
            rows = stack.layer(0).out_features
            first = sum(count for *_, count in owners)
            ids = torch.arange(first, first + len(stack) * rows, dtype=torch.float64)
            numbers[name] = ids.view(len(stack), rows, 1).expand(-1, -1, 2).contiguous()
            owners += [(f"{name}.{e}", rows) for e in range(len(stack))]
        written = revert_weight_conversion(model, numbers)
    except Exception:  # an older version, or a table that takes no numbers: then their names are not known
        return {}
    starts = torch.tensor([0] + [rows for _, rows in owners]).cumsum(0)
    found: dict[str, list[tuple[str, int, int]]] = {}
    for own, ids in written.items():
        if ids.ndim != 2 or not own.endswith(".weight"):
            continue
        rows = ids[:, 0].long()
        expert = int(torch.searchsorted(starts, rows[0], right=True)) - 1
        first = int(rows[0] - starts[expert])
        if torch.equal(rows, torch.arange(len(rows)) + rows[0]) and first + len(rows) <= owners[expert][1]:
            found.setdefault(owners[expert][0], []).append((own.removesuffix(".weight"), first, first + len(rows)))
    whole = dict(owners)
    return {n: p for n, p in found.items() if sum(last - first for _, first, last in p) == whole[n]}


def _is_whole(stack: ExpertStack) -> bool:
    """Whether all of its experts are packed, and rows are outputs."""
    return not stack.transposed and all(isinstance(stack.layer(e), Packed) for e in range(len(stack)))


def _refused(model: nn.Module, found: dict[str, Any]) -> dict[str, str]:
    refused = {name: why for name, why in compressed_tensors.reasons(model).items() if name not in found}
    for name, module in packed_layers(model):
        reason = name in found and compressed_tensors.supports(module.scheme, module.quantized.shape)
        if reason:
            refused[name] = reason
    return refused


def _config(model: nn.Module, groups: dict[Scheme, list[str]], found: dict[str, Any]) -> dict[str, Any]:
    experts = {own for pieces in found.values() for own, _, _ in pieces}
    of_experts = [scheme for scheme, names in groups.items() if experts & set(names)]
    of_others = [scheme for scheme, names in groups.items() if set(names) - experts]
    if len(of_experts) > 1 or len(of_others) > 1:
        warnings.warn(
            f"experts have {len(of_experts)} schemes and other layers {len(of_others)}: transformers 5.24 unpacks each "
            "kind by one scheme, into other numbers where that is not theirs; vLLM reads every layer by its own",
            RuntimeWarning,
            stacklevel=3,
        )
    if len(of_experts) == 1 and of_experts != of_others:  # transformers knows their scheme by a pattern
        groups = groups | {of_experts[0]: [_EXPERTS, *sorted(set(groups[of_experts[0]]) - experts)]}
    return compressed_tensors.config_of(model, groups)
