"""QuantizedLinear and QuantizedEmbedding: torch modules whose weight is the packed bytes and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from . import _core, tiles
from ._threads import follow_torch
from .decoding import decode
from .functional import quantize
from .quantized_tensor import QuantizedTensor, as_input, mode_number
from .scheme import Scheme

__all__ = ["QuantizedEmbedding", "QuantizedLinear", "packed_layers", "set_matmul_mode"]


def _as_buffer(array: Any) -> torch.Tensor | None:
    """NumPy memory as a tensor, without a copy where it may be written."""
    if array is None or isinstance(array, torch.Tensor):
        return array
    return torch.from_numpy(array if array.flags.writeable else array.copy())


class _Packed(nn.Module):
    """A stored matrix as buffers: `codes` uint8, `scales` float16, `zeros` uint8 or None."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def __init__(self, stored: QuantizedTensor) -> None:
        super().__init__()
        self.scheme = stored.scheme
        self._shape = (int(stored.shape[0]), int(stored.shape[1]))
        self._hold(*(_as_buffer(a) for a in (stored.codes, stored.scales, stored.zeros)))

    def _hold(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> None:
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)

    def _packed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        buffers = self._buffers  # straight from the dictionary: nn.Module's look-up takes longer than all the rest
        return buffers["codes"], buffers["scales"], buffers["zeros"]

    @property
    def quantized(self) -> QuantizedTensor:
        """The stored matrix, on the same memory."""
        return QuantizedTensor(*self._packed(), self.scheme, self._shape)

    @property
    def qweight(self) -> torch.Tensor:
        """The codes, under the name by which peft and accelerate find the device of a packed layer."""
        return self.codes

    @property
    def weight_nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return self.quantized.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix as a new tensor (rows, cols) of `dtype`, on the device of the layer."""
        if self.codes.device.type == "cpu" and not torch.compiler.is_compiling():
            return self.quantized.dequantize(dtype)
        return decode(self.codes, self.scales, self.zeros, self.scheme, self._shape[1], dtype)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """As nn.Module, but scales keep their 16 bits when a change of dtype passes over the model."""
        scales = self._buffers.get("scales")
        if scales is not None:
            self._buffers["scales"] = scales.view(torch.int16)  # what is not floating point moves, but is not cast
        super()._apply(fn, recurse)
        if scales is not None:
            self._buffers["scales"] = self._buffers["scales"].view(torch.float16)
        return self


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


class QuantizedLinear(_Packed):
    """A linear layer with a stored weight: y = x WT + bias.

    Parameters
    ----------
    stored : QuantizedTensor
        The weight, (out_features, in_features). Its memory becomes the buffers `codes`, `scales` and `zeros`.
    bias : Tensor (out_features,), optional
        Kept as a parameter.

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

    def __init__(self, stored: QuantizedTensor, bias: torch.Tensor | None = None) -> None:
        super().__init__(stored)
        self.out_features, self.in_features = self._shape
        self.mode = "int16"
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_quantized(cls, stored: QuantizedTensor, bias: torch.Tensor | None = None) -> QuantizedLinear:
        """A layer on the memory of `stored`."""
        return cls(stored, bias)

    @classmethod
    def from_linear(cls, linear: nn.Module, scheme: Scheme, method: str = "rtn", **options: Any) -> QuantizedLinear:
        """Quantize an nn.Linear (or transformers' Conv1D); `options` go to `bitween.quantize`.

        The bias parameter is shared with `linear`. The new layer stands on the device of the weight.
        """
        weight = linear.weight.detach()
        if hasattr(linear, "nf"):  # Conv1D keeps the transpose
            weight = weight.t()
        stored = quantize(weight.cpu(), scheme, method=method, **options)
        layer = cls(stored).to(weight.device)
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
        """A layer of zero codes, to be filled by `load_state_dict`. `dtype` is the bias's."""
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        return cls(_empty_stored(out_features, in_features, scheme, device), zeros)

    @staticmethod
    def tied_to(embedding: QuantizedEmbedding, bias: torch.Tensor | None = None) -> QuantizedLinear:
        """A head on the memory of an embedding: nothing is stored twice, and `state_dict` holds it once."""
        return _TiedLinear(embedding, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
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
        key = self.scheme.key
        _core.matmul(x, *self._packed(), key, self.in_features, bias, out, self._mode_number)
        return out

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme='{self.scheme}'"
        )


class _TiedLinear(QuantizedLinear):
    """A linear layer that reads its weight from an embedding, which owns it."""

    def __init__(self, embedding: QuantizedEmbedding, bias: torch.Tensor | None) -> None:
        self.__dict__["_owner"] = embedding  # not a submodule: the weight belongs to one module only
        super().__init__(embedding.quantized, bias)

    def _hold(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> None:
        """Holds nothing: the owner is asked."""

    def _packed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self._owner._packed()

    @property
    def codes(self) -> torch.Tensor:
        return self._owner.codes

    @property
    def scales(self) -> torch.Tensor:
        return self._owner.scales

    @property
    def zeros(self) -> torch.Tensor | None:
        return self._owner.zeros


class QuantizedEmbedding(_Packed):
    """A lookup table with stored rows.

    Parameters
    ----------
    stored : QuantizedTensor
        The table, (num_embeddings, embedding_dim).
    dtype : torch.dtype
        Of the output; follows `module.to(dtype)`.
    padding_idx : int, optional
        Kept as a mark only.
    """

    def __init__(
        self, stored: QuantizedTensor, dtype: torch.dtype = torch.float32, padding_idx: int | None = None
    ) -> None:
        super().__init__(stored)
        self.num_embeddings, self.embedding_dim = self._shape
        self.padding_idx = padding_idx
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the output."""
        return self._like.dtype

    @classmethod
    def from_quantized(
        cls, stored: QuantizedTensor, dtype: torch.dtype = torch.float32, padding_idx: int | None = None
    ) -> QuantizedEmbedding:
        """A table on the memory of `stored`."""
        return cls(stored, dtype, padding_idx)

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, scheme: Scheme, method: str = "rtn", **options: Any
    ) -> QuantizedEmbedding:
        """Quantize an nn.Embedding; `options` go to `bitween.quantize`."""
        if embedding.max_norm is not None:
            raise ValueError(f"embedding: expected max_norm=None; got {embedding.max_norm}")
        weight = embedding.weight.detach()
        stored = quantize(weight.cpu(), scheme, method=method, **options)
        table = cls(stored, weight.dtype, embedding.padding_idx).to(weight.device)
        return table.train(embedding.training)

    @classmethod
    def empty(
        cls,
        num_embeddings: int,
        embedding_dim: int,
        scheme: Scheme,
        dtype: torch.dtype = torch.float32,
        padding_idx: int | None = None,
        device: Any = None,
    ) -> QuantizedEmbedding:
        """A table of zero codes, to be filled by `load_state_dict`."""
        return cls(_empty_stored(num_embeddings, embedding_dim, scheme, device), dtype, padding_idx)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        flat = ids.reshape(-1).to(torch.int64)
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            rows = self.quantized.dequantize(self.dtype, rows=flat)
        else:
            zeros = None if self.zeros is None else self.zeros[flat]
            rows = decode(self.codes[flat], self.scales[flat], zeros, self.scheme, self.embedding_dim, self.dtype)
        return rows.reshape(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme='{self.scheme}', dtype={self.dtype}"


def _empty_stored(rows: int, cols: int, scheme: Scheme, device: Any) -> QuantizedTensor:
    sizes = scheme.layout(rows, cols)
    codes = torch.zeros(rows, sizes["row_bytes"], dtype=torch.uint8, device=device)
    scales = torch.ones(rows, sizes["n_groups"], dtype=torch.float16, device=device)
    zeros = None if scheme.symmetric else torch.zeros(rows, sizes["row_zero_bytes"], dtype=torch.uint8, device=device)
    return QuantizedTensor(codes, scales, zeros, scheme, (rows, cols))


def packed_layers(model: nn.Module) -> list[tuple[str, QuantizedLinear | QuantizedEmbedding]]:
    """(name, module) of every packed layer of a model, in its order."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, (QuantizedLinear, QuantizedEmbedding))]


def set_matmul_mode(model: nn.Module, mode: str) -> int:
    """Set the `mode` of every QuantizedLinear in a model; returns how many there are."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    for layer in layers:
        layer.mode = mode
    return len(layers)
