"""QuantizedConv: a convolution whose kernels are packed bytes, one row a kernel.

The kernels (out, in / groups, *kernel) are a matrix (out, in / groups * elements of a kernel). They are unpacked for
each call: a convolution uses every number many times, so that unpacking is a small part of its work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bitween.functional import quantize
from bitween.layers.packed import Packed, empty_stored
from bitween.quantized_tensor import QuantizedTensor
from bitween.scheme import Scheme

__all__ = ["QuantizedConv"]

_RUNS = {1: nn.functional.conv1d, 2: nn.functional.conv2d}
_SETTINGS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")


class QuantizedConv(Packed):
    """A Conv1d or Conv2d with stored kernels.

    Parameters
    ----------
    stored : QuantizedTensor (out_channels, in_channels / groups * elements of a kernel)
    like : the convolution whose settings it takes; padded with zeros
    bias : Tensor (out_channels,), optional
    dtype : torch.dtype, optional
        What `weight.dtype` answers; default that of `like`
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        stored: QuantizedTensor,
        like: nn.Module,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(stored, dtype or like.weight.dtype)
        for name in _SETTINGS:
            setattr(self, name, getattr(like, name))
        self.padding_mode = "zeros"
        self._kernel = tuple(like.weight.shape)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_conv(cls, conv: nn.Module, scheme: Scheme, method: str = "rtn", **options: Any) -> QuantizedConv:
        """Quantize an nn.Conv1d or nn.Conv2d; `options` go to `bitween.quantize`. The bias parameter is shared."""
        if conv.padding_mode != "zeros":
            raise ValueError(f"conv: expected padding_mode='zeros'; got {conv.padding_mode!r}")
        weight = conv.weight.detach()
        stored = quantize(weight.flatten(1).cpu(), scheme, method=method, **options)
        layer = cls(stored, conv, conv.bias).to(weight.device)
        return layer.train(conv.training)

    @classmethod
    def empty_like(cls, module: nn.Module, scheme: Scheme) -> QuantizedConv | None:
        """An empty layer for what an nn.Conv1d or nn.Conv2d holds; None for any other module."""
        if not isinstance(module, (nn.Conv1d, nn.Conv2d)) or module.padding_mode != "zeros":
            return None
        weight = module.weight
        stored = empty_stored(weight.shape[0], weight[0].numel(), scheme, weight.device)
        bias = None if module.bias is None else torch.zeros_like(module.bias)
        return cls(stored, module, bias)

    @property
    def weight(self) -> torch.Tensor:
        """The kernels (out, in / groups, *kernel), unpacked."""
        return self.dequantize(self.dtype).reshape(self._kernel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernels = self.dequantize(x.dtype).reshape(self._kernel)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        run = _RUNS[len(self._kernel) - 2]
        return run(x, kernels, bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"groups={self.groups}, bias={self.bias is not None}, scheme='{self.scheme}'"
        )
