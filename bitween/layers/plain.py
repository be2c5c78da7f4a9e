"""Whether a module computes the plain thing that its class is named for, found by running it.

A packed layer takes the place of a module whole: what the module does beside its product would be lost. Families
override `forward` for many reasons, some of which change nothing (Falcon's linear layers), so the type says little.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

__all__ = ["can_pack_convolution", "is_plain_convolution", "is_plain_linear"]

_ROWS = 3
# of a convolution in groups: fewer numbers in a kernel than this, and scales would take what codes save
_LEAST_COLUMNS = 16
_PLAIN_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


def is_plain_linear(module: nn.Linear) -> bool:
    """Whether a linear layer returns x WT + bias and nothing else.

    A class with a `forward` of its own is run beside the plain product, on probe numbers of the weight's shape: the
    answer does not hang on the values of the weight, which may be zero or on the meta device.
    """
    if type(module).forward is nn.Linear.forward:
        return True
    rows, cols = module.out_features, module.in_features
    if not rows or not cols or module.weight.device.type not in ("cpu", "meta"):
        return False
    with torch.device("cpu"), torch.no_grad():  # loaders lay models out with "meta" as the default
        return _multiplies_only(module, rows, cols)


def _multiplies_only(module: nn.Linear, rows: int, cols: int) -> bool:
    dtype = torch.float32 if module.weight.dtype not in (torch.float64,) else torch.float64
    weight = torch.linspace(-1.0, 1.5, rows * cols, dtype=dtype).reshape(rows, cols)
    bias = None if module.bias is None else torch.linspace(-0.5, 0.7, rows, dtype=dtype)
    probe = copy.copy(module)  # shares everything but weight and bias
    probe._parameters = {**module._parameters, "weight": nn.Parameter(weight, False)}
    if bias is not None:
        probe._parameters["bias"] = nn.Parameter(bias, False)
    x = torch.linspace(-1.0, 1.0, _ROWS * cols, dtype=dtype).reshape(1, _ROWS, cols).sin()
    try:
        got = probe(x)
    except Exception:  # of another signature: it takes more than what is multiplied
        return False
    expected = nn.functional.linear(x, weight, bias)
    if not isinstance(got, torch.Tensor) or got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    scale = expected.abs().max().item() or 1.0
    return bool((got - expected).abs().max() <= 1e-5 * scale)


def is_plain_convolution(module: nn.Module) -> bool:
    """Whether a Conv1d or Conv2d computes its class's own convolution, with zeros around the input."""
    own = next((kind for kind in _PLAIN_CONVOLUTIONS if isinstance(module, kind)), None)
    if own is None or module.padding_mode != "zeros":
        return False
    return type(module).forward is own.forward and type(module)._conv_forward is own._conv_forward


def can_pack_convolution(module: nn.Module) -> bool:
    """Whether a Conv1d or Conv2d is plain, and its kernels are long enough for codes to save bytes."""
    return is_plain_convolution(module) and (module.groups == 1 or module.weight[0].numel() >= _LEAST_COLUMNS)
