"""compressed-tensors `pack-quantized`: read by transformers and vLLM without any bitween code.

A code is stored as bitween stores it, so tensors are views of the layers' own memory. compressed-tensors 0.18 or
newer packs 3, 5 and 6 bits this way; older ones read only 2, 4 and 8 right.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from bitween.layers import QuantizedEmbedding, packed_layers
from bitween.layers.conv import QuantizedConv
from bitween.layers.in_place import PackedInPlace
from bitween.model.experts import experts_of
from bitween.quantized_tensor import QuantizedTensor
from bitween.scheme import COMMON_BITS, Scheme
from bitween.store.checkpoint import CheckpointError, TensorFiles

__all__ = ["config", "config_of", "plan_from_config", "reasons", "state_dict", "supports", "tensors", "tensors_from"]

METHOD, _FORMAT = "compressed-tensors", "pack-quantized"
_TRANSPOSED = ("gpt2", "openai-gpt", "decision_transformer", "imagegpt")  # families built of Conv1D
_STORED = {"weight_packed", "weight_scale", "weight_shape"}


def supports(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Why the format cannot hold a (rows, cols) matrix under a scheme; None when it can."""
    if scheme.bits not in COMMON_BITS:
        return f"{scheme.bits:g} bits; it holds 2, 3, 4, 5, 6 and 8"
    if scheme.coding == "trellis":
        return "trellis codes, which only bitween reads"
    if not scheme.symmetric:
        return "asymmetric; its readers in use load symmetric only"
    if scheme.group_size != -1 and shape[1] % scheme.group_size:
        return f"{shape[1]} columns are not a multiple of the group size {scheme.group_size}"
    return None


def reasons(model: nn.Module) -> dict[str, str]:
    """{layer: why the format cannot hold it} of a quantized model; empty when all fits."""
    found, experts = {}, experts_of(model)
    for name, module in packed_layers(model):
        if name in experts:
            found[name] = "one of a stack of experts, whose names there differ with the architecture"
        elif isinstance(module, QuantizedEmbedding):
            found[name] = "an embedding; it holds linear layers"
        elif isinstance(module, PackedInPlace):
            found[name] = "a module with arithmetic of its own; it holds linear layers"
        elif isinstance(module, QuantizedConv):
            found[name] = "a convolution; it holds linear layers"
        elif "codes" not in module._buffers:
            continue  # a head that shares an embedding's codes, which is refused by itself
        elif getattr(model.config, "model_type", "") in _TRANSPOSED:
            found[name] = "part of a model whose layers are transposed (Conv1D), which it does not pack"
        else:
            reason = supports(module.scheme, (module.out_features, module.in_features))
            if reason:
                found[name] = reason
    return found


def config(model: nn.Module) -> dict[str, Any]:
    """The `quantization_config` of a quantized model: one group of layers for each scheme."""
    groups: dict[Scheme, list[str]] = {}
    for name, module in packed_layers(model):
        groups.setdefault(module.scheme, []).append(name)
    return config_of(model, groups)


def config_of(model: nn.Module, groups: dict[Scheme, list[str]]) -> dict[str, Any]:
    """The `quantization_config` of a model of whose matrices those of these names, as written, have these schemes."""
    kept = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return {
        "quant_method": METHOD,
        "format": _FORMAT,
        "quantization_status": "compressed",
        "ignore": kept,
        "config_groups": {
            f"group_{i}": {"targets": names, "weights": _weights(scheme), "format": _FORMAT}
            for i, (scheme, names) in enumerate(sorted(groups.items()))
        },
    }


def _weights(scheme: Scheme) -> dict[str, Any]:
    row = scheme.group_size == -1
    group = {"strategy": "channel"} if row else {"strategy": "group", "group_size": scheme.group_size}
    return {"num_bits": int(scheme.bits), "type": "int", "symmetric": True, **group}


def state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors under the names and shapes of the format. Codes and scales are views, not copies."""
    state = model.state_dict()
    for name, module in packed_layers(model):
        for part in ("codes", "scales"):
            state.pop(f"{name}.{part}")
        state |= {f"{name}.{part}": tensor for part, tensor in tensors(module.quantized).items()}
    return state


def tensors(stored: QuantizedTensor) -> dict[str, torch.Tensor]:
    """A matrix in the parts of the format: views, not copies."""
    return {
        "weight_packed": torch.as_tensor(stored.codes).view(torch.int32),
        "weight_scale": torch.as_tensor(stored.scales),
        "weight_shape": torch.tensor(stored.shape),
    }


def plan_from_config(settings: dict[str, Any], model: nn.Module) -> dict[str, Scheme]:
    """The plan that a checkpoint's `quantization_config` gives for a model's linear layers.

    Raises
    ------
    CheckpointError
        for other formats and settings than packed symmetric integers.
    """
    groups = settings.get("config_groups")
    if not isinstance(groups, dict):
        raise CheckpointError("config_groups: expected an object", "config.json")
    ignore = _strings(settings.get("ignore") or [], "ignore")
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    plan: dict[str, Scheme] = {}
    for key, group in groups.items():
        if not isinstance(group, dict) or group.get("format", settings.get("format")) != _FORMAT:
            raise CheckpointError(f"{key}: expected format {_FORMAT!r}", "config.json")
        scheme = _scheme(group.get("weights"), key)
        targets = set(_strings(group.get("targets"), f"{key}.targets"))
        for name in linears:
            if not _matches(name, ignore) and ("Linear" in targets or name in targets or _matches(name, targets)):
                plan.setdefault(name, scheme)
        missing = [t for t in targets if "." in t and not t.startswith("re:") and t not in plan]
        if missing:
            raise CheckpointError(f"{key}: the model has no linear layer {missing[0]!r}", "config.json")
    return plan


def _strings(value: Any, what: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise CheckpointError(f"{what}: expected a list of names", "config.json")
    return value


def _matches(name: str, patterns: Any) -> bool:
    """Whether a name is listed, or meets a `re:` pattern of letters, digits, dots and `.*` (no others are run)."""
    for pattern in patterns:
        if pattern == name:
            return True
        if pattern.startswith("re:"):
            text = pattern[3:]
            if not re.fullmatch(r"\^?(?:[\w$]|\\?\.|\.\*|\\d\+)*", text) or text.count("*") > 3:
                raise CheckpointError(f"pattern {pattern!r} is not one this reader runs", "config.json")
            if re.match(text, name):
                return True
    return False


def _scheme(weights: Any, key: str) -> Scheme:
    if not isinstance(weights, dict) or weights.get("type", "int") != "int" or weights.get("symmetric") is not True:
        raise CheckpointError(f"{key}.weights: expected symmetric integers", "config.json")
    if weights.get("num_bits") not in COMMON_BITS or weights.get("actorder") not in (None, False, "weight", "static"):
        raise CheckpointError(f"{key}.weights: expected 2, 3, 4, 5, 6 or 8 bits in column order", "config.json")
    strategy = weights.get("strategy")
    if strategy not in ("group", "channel"):
        raise CheckpointError(f"{key}.weights: expected strategy group or channel; got {strategy!r}", "config.json")
    try:
        return Scheme(weights["num_bits"], weights.get("group_size") if strategy == "group" else -1, True)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{key}.weights: {error}", "config.json") from None


def tensors_from(files: TensorFiles, plan: dict[str, Scheme], model: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, those of the plan's layers as `codes` and `scales` on the memory that was read.

    Raises
    ------
    CheckpointError
        when one is missing, of another dtype or shape, or a scale is not a 16-bit number.
    """
    state = {}
    for name in plan:
        layer = model.get_submodule(name)
        for part in sorted(_STORED):
            if f"{name}.{part}" not in files.entries:
                raise files.error("missing", f"{name}.{part}")
        shape = files.read(f"{name}.weight_shape")
        if shape.tolist() != [layer.out_features, layer.in_features]:
            expected = [layer.out_features, layer.in_features]
            raise files.error(f"expected {expected}; got {str(shape.tolist())[:80]}", f"{name}.weight_shape")
        packed = files.entries[f"{name}.weight_packed"]
        if packed.dtype != "I32" or len(packed.shape) != 2:
            raise files.error(
                f"expected int32 (rows, words); got {packed.dtype} {packed.shape}", f"{name}.weight_packed"
            )
        state[f"{name}.codes"] = files.read(f"{name}.weight_packed").view(torch.uint8)
        state[f"{name}.scales"] = _half(files, f"{name}.weight_scale")
    own = {f"{name}.{part}" for name in plan for part in _STORED}
    return {**state, **{name: files.read(name) for name in files.names if name not in own}}


def _half(files: TensorFiles, name: str) -> torch.Tensor:
    scales = files.read(name)
    half = scales.to(torch.float16)
    if not scales.is_floating_point() or not torch.equal(half.double(), scales.double()):
        raise files.error("expected scales that 16 bits hold exactly", name)
    return half
