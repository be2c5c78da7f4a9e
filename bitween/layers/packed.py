"""Packed: what every torch module on a stored matrix has in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bitween.layers.decoding import decode
from bitween.layers.lazy_weight import LazyWeight
from bitween.quantized_tensor import QuantizedTensor
from bitween.scheme import TILE, Scheme

__all__ = ["MOVES", "Borrowed", "Packed", "by_torch_alone", "empty_stored", "packed_layers"]

MOVES = [0]  # how often a packed layer was moved or cast, so that who keeps addresses knows when to look again


def by_torch_alone(tensor: torch.Tensor) -> bool:
    """Whether packed bytes are to be unpacked by torch's own operations: on devices that the core does not reach, and
    wherever a pass is written down to be run later, since what the core does leaves no trace there."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()


def _as_buffer(array: Any) -> torch.Tensor | None:
    """NumPy memory as a tensor, without a copy where it may be written."""
    if array is None or isinstance(array, torch.Tensor):
        return array
    return torch.from_numpy(array if array.flags.writeable else array.copy())


class Packed(nn.Module):
    """A stored matrix as buffers: `codes` uint8, `scales` float16, `zeros` uint8 or None."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    _is_hf_initialized = True  # transformers fills no such module at random, whatever a family's initialiser does

    def __init__(self, stored: QuantizedTensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self._keep(stored, dtype)

    def _keep(self, stored: QuantizedTensor, dtype: torch.dtype) -> None:
        self.scheme = stored.scheme
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)  # follows module.to(dtype)
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
    def dtype(self) -> torch.dtype:
        """Of the weight, as model code that asks for it sees it."""
        return self._like.dtype

    @property
    def weight(self) -> torch.Tensor:
        """The matrix as model code reads it: a tensor without memory, unpacked where its numbers are wanted."""
        return LazyWeight(self.dequantize, self._shape, self.dtype, self.codes.device, self.rows)

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
        if not by_torch_alone(self.codes):
            return self.quantized.dequantize(dtype)
        return decode(self.codes, self.scales, self.zeros, self.scheme, self._shape[1], dtype)

    def rows(self, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Rows of the matrix as a new tensor (*ids.shape, cols) of `dtype`; all others stay packed."""
        flat = ids.reshape(-1).to(torch.int64)
        if not by_torch_alone(ids):
            found = self.quantized.dequantize(dtype, rows=flat)
        else:
            zeros = None if self.zeros is None else self.zeros[flat]
            found = decode(self.codes[flat], self.scales[flat], zeros, self.scheme, self._shape[1], dtype)
        return found.reshape(*ids.shape, self._shape[1])

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """As nn.Module, but scales keep their 16 bits when a change of dtype passes over the model."""
        MOVES[0] += 1
        scales = self._buffers.get("scales")
        if scales is not None:
            self._buffers["scales"] = scales.view(torch.int16)  # what is not floating point moves, but is not cast
        super()._apply(fn, recurse)
        if scales is not None:
            self._buffers["scales"] = self._buffers["scales"].view(torch.float16)
        return self


class Borrowed(Packed):
    """A packed layer on the bytes of another, the owner: nothing is stored twice. Stands before the layer's kind."""

    def _borrow(self, owner: Packed) -> None:
        self.__dict__["_owner"] = owner  # not a submodule: the weight belongs to one module only

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


def empty_stored(rows: int, cols: int, scheme: Scheme, device: Any) -> QuantizedTensor:
    sizes = scheme.layout(rows, cols)
    if scheme.coding == "trellis":
        codes = torch.zeros(-(-rows // TILE), sizes["row_bytes"], dtype=torch.uint8, device=device)
        scales = torch.ones(rows, 1, dtype=torch.float16, device=device)
        rates = torch.full((sizes["row_zero_bytes"],), int(scheme.bits), dtype=torch.uint8, device=device)
        if scheme.bits % 1:  # as many tiles of the higher rate as there are bytes for; which ones, the file says
            rates[: (len(rates) + 1) // 2] += 1
        return QuantizedTensor(codes, scales, rates, scheme, (rows, cols))
    codes = torch.zeros(rows, sizes["row_bytes"], dtype=torch.uint8, device=device)
    scales = torch.ones(rows, sizes["n_groups"], dtype=torch.float16, device=device)
    zeros = None if scheme.symmetric else torch.zeros(rows, sizes["row_zero_bytes"], dtype=torch.uint8, device=device)
    return QuantizedTensor(codes, scales, zeros, scheme, (rows, cols))


def packed_layers(model: nn.Module) -> list[tuple[str, Packed]]:
    """(name, module) of every packed layer of a model, in its order."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, Packed)]
