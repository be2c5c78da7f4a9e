"""What a packed layer answers when model code reads its `.weight`: dtype, device and shape at once, numbers on demand.

Models ask `layer.weight.dtype` in every pass (T5, Mamba) and some multiply by the weight themselves. The answer is a
tensor without memory that is unpacked when an operation wants its numbers. It is no parameter, so that `state_dict`,
`parameters()`, optimizers and memory reports see the packed bytes only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

_SCALING = (
    torch.ops.aten.div_.Scalar,
    torch.ops.aten.div_.Tensor,
    torch.ops.aten.mul_.Scalar,
    torch.ops.aten.mul_.Tensor,
)

__all__ = ["LazyWeight"]


class LazyWeight(torch.Tensor):
    """A read-only view of a packed matrix.

    Parameters
    ----------
    unpack : from a dtype to the matrix as a new tensor
    shape, dtype, device : of the matrix
    rows : from ids and a dtype to rows of the matrix as a new tensor, so that a lookup unpacks no others
    """

    _is_hf_initialized = True  # transformers' initialisers leave what is marked so alone

    @staticmethod
    def __new__(
        cls,
        unpack: Callable[[torch.dtype], torch.Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: Any,
        rows: Callable[[torch.Tensor, torch.dtype], torch.Tensor] | None = None,
    ) -> LazyWeight:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(
        self,
        unpack: Callable[[torch.dtype], torch.Tensor],
        _shape: Any = None,
        _dtype: Any = None,
        _device: Any = None,
        rows: Callable[[torch.Tensor, torch.dtype], torch.Tensor] | None = None,
    ) -> None:
        self._unpack, self._rows = unpack, rows

    def numbers(self) -> torch.Tensor:
        """The matrix as a plain new tensor."""
        return self._unpack(self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            weight = args[0]  # `.data` too: a copy there would take what is written to it and forget it
            return LazyWeight(weight._unpack, tuple(weight.shape), weight.dtype, weight.device, weight._rows)
        if func is torch.ops.aten.embedding.default and isinstance(args[0], LazyWeight) and args[0]._rows:
            return args[0]._rows(args[1], args[0].dtype)
        if func in _SCALING and len(args) > 1 and isinstance(args[1], (int, float)) and args[1] == 1:
            return args[0]  # RWKV divides weights by 2^(layer // 6), by 1 in most layers
        schema = func._schema
        if schema.is_mutable and any(
            isinstance(value, LazyWeight) and argument.alias_info is not None and argument.alias_info.is_write
            for argument, value in zip(schema.arguments, args, strict=False)
        ):
            raise TypeError(f"weight: expected to be read only, since the layer holds packed codes; got {func}")

        def plain(value: Any) -> Any:
            return value.numbers() if isinstance(value, LazyWeight) else value

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"LazyWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"
