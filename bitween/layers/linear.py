"""QuantizedLinear: a linear layer whose weight is the packed bytes and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from bitween import _core, trellis
from bitween._threads import follow_torch
from bitween.functional import quantize
from bitween.layers import tiles
from bitween.layers.packed import Borrowed, Packed, by_torch_alone, empty_stored
from bitween.layers.plain import is_plain_linear
from bitween.quantized_tensor import QuantizedTensor, as_input, mode_number
from bitween.scheme import Scheme

if TYPE_CHECKING:
    pass

__all__ = ["QuantizedLinear", "set_matmul_mode"]


class _Product(torch.autograd.Function):
    """x WT + bias for a frozen W: the gradient reaches x and bias."""

    @staticmethod
    def forward(ctx, x, bias, layer):
        ctx.layer = layer
        return layer.multiply(x.detach(), None if bias is None else bias.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows = grad.reshape(-1, grad.shape[-1])
        into_x = into_bias = None
        if ctx.needs_input_grad[0]:
            into_x = _times_weight(rows, ctx.layer).reshape(*grad.shape[:-1], ctx.layer.in_features)
        if ctx.needs_input_grad[1]:
            into_bias = rows.sum(0)
        return into_x, into_bias, None


def _times_weight(grad: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
    """grad (m, rows) W, by tiles of W; fp32 sums between them."""
    total = torch.zeros(grad.shape[0], layer.in_features, dtype=torch.float32)
    for part, weight in tiles.row_tiles(layer.quantized, grad.dtype):
        total += grad[:, part] @ weight
    return total.to(grad.dtype)


class QuantizedLinear(Packed):
    """A linear layer with a stored weight: y = x WT + bias.

    Parameters
    ----------
    stored : QuantizedTensor
        The weight, (out_features, in_features). Its memory becomes the buffers `codes`, `scales` and `zeros`.
    bias : Tensor (out_features,), optional
        Kept as a parameter.
    dtype : torch.dtype, optional
        What `weight.dtype` answers; default the bias's, else float32. Follows `module.to(dtype)`.

    The input may have any leading shape and be float32, float16 or bfloat16; the output has its dtype. Gradients
    flow to the input and the bias. On a device other than the CPU the weight is unpacked for each call.

    Attributes
    ----------
    mode : "int16" (default), "int8" or "exact", as in `QuantizedTensor.matmul`: how up to 16 rows are multiplied.
        Rounding activations to 16 bits adds less than a thousandth of the damage that the weights' rounding does;
        8 bits are quicker still and do more. More rows are always multiplied as they are; those in bfloat16 with
        weights that are rounded to bfloat16, where the CPU has such products.
    """

    bias: nn.Parameter | None

    def __init__(
        self, stored: QuantizedTensor, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(stored, dtype or (torch.float32 if bias is None else bias.dtype))
        self.out_features, self.in_features = self._shape
        self.mode = "int16"
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_quantized(
        cls, stored: QuantizedTensor, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> QuantizedLinear:
        """A layer on the memory of `stored`."""
        return cls(stored, bias, dtype)

    @classmethod
    def from_linear(cls, linear: nn.Module, scheme: Scheme, method: str = "rtn", **options: Any) -> QuantizedLinear:
        """Quantize an nn.Linear (or transformers' Conv1D); `options` go to `bitween.quantize`.

        The bias parameter is shared with `linear`. The new layer stands on the device of the weight.
        """
        weight = linear.weight.detach()
        if hasattr(linear, "nf"):  # Conv1D keeps the transpose
            weight = weight.t()
        stored = quantize(weight.cpu(), scheme, method=method, **options)
        layer = cls(stored, dtype=weight.dtype).to(weight.device)
        layer.register_parameter("bias", linear.bias)
        return layer.train(linear.training)

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
    ) -> QuantizedLinear:
        """A layer of zero codes, to be filled by `load_state_dict`. `dtype` is the bias's and the weight's."""
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        return cls(empty_stored(out_features, in_features, scheme, device), zeros, dtype)

    @classmethod
    def empty_like(cls, module: nn.Module, scheme: Scheme) -> QuantizedLinear | None:
        """An empty layer for an nn.Linear that only multiplies, or transformers' Conv1D; None for any other module."""
        if isinstance(module, nn.Linear) and is_plain_linear(module):
            cols, rows = module.in_features, module.out_features
        elif hasattr(module, "nf"):
            cols, rows = module.nx, module.nf
        else:
            return None
        weight = module.weight
        return cls.empty(cols, rows, scheme, module.bias is not None, weight.dtype, weight.device)

    @staticmethod
    def tied_to(owner: Packed, bias: torch.Tensor | None = None) -> QuantizedLinear:
        """A head on the memory of an embedding, or a layer on that of another: nothing is stored twice, and
        `state_dict` holds it once."""
        return _TiedLinear(owner, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if by_torch_alone(x):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return nn.functional.linear(x, self.dequantize(x.dtype), bias)
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        bias = self._parameters["bias"]
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return _Product.apply(x, bias, self)
        return self.multiply(x, bias)

    @property
    def mode(self) -> str:
        """How few rows are multiplied."""
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        self._mode, self._mode_number = mode, mode_number(mode)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x WT + bias on the CPU, without autograd. The way of `QuantizedTensor.matmul`, with as few steps as possible:
        a generated token passes here once for each layer."""
        follow_torch()
        if x.is_neg() or not x.is_contiguous():
            x = as_input(x).contiguous()
        out = x.new_empty((*x.shape[:-1], self.out_features))
        bias = None if bias is None else bias.detach()
        if x.dtype is torch.bfloat16 and x.numel() > _core.FEW_TOKENS * self.in_features and tiles.cpu_has_bf16():
            tiles.product(x, self.quantized, bias, out)
            return out
        if self.scheme.coding == "trellis":
            if x.numel() > _core.FEW_TOKENS * self.in_features and x.dtype is not torch.float16:
                tiles.product(x, self.quantized, bias, out)  # unpacked once for all rows
            else:
                trellis.multiply(x, *self._packed(), self.scheme, bias, out, self._mode_number)
            return out
        key = self.scheme.key
        _core.matmul(x, *self._packed(), key, self.in_features, bias, out, self._mode_number)
        return out

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme='{self.scheme}'"
        )


class _TiedLinear(Borrowed, QuantizedLinear):
    """A linear layer that reads its weight from an embedding or another layer, which owns it."""

    def __init__(self, owner: Packed, bias: torch.Tensor | None) -> None:
        self._borrow(owner)
        super().__init__(owner.quantized, bias, owner.dtype)


def set_matmul_mode(model: nn.Module, mode: str) -> int:
    """Set the `mode` of every QuantizedLinear in a model; returns how many there are."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    for layer in layers:
        layer.mode = mode
    return len(layers)
