"""Mixture of experts: a stack of linear layers in the place where a model keeps one 3-D parameter for all its experts.

The experts' module keeps its class and its own arithmetic (gates, activations, clamps, biases, routing weights); only
its products with the 3-D parameter are taken over. What `stack[e]` gives is an operand that has not been unpacked:
multiplied, it calls the layer of expert e, packed or not, hooks included; put to any other use, it becomes the numbers.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from bitween.layers.linear import QuantizedLinear
from bitween.layers.together import multiply_together

__all__ = ["ExpertStack", "ExpertWeight", "take_over", "unpacked"]

IMPLEMENTATION = "bitween"  # the name under which transformers' dispatch of experts knows `forward_by_expert`


class ExpertStack(nn.Module):
    """The matrices of all experts, each a linear layer named by its number.

    Parameters
    ----------
    layers : linear layers (outputs, inputs) of one shape, in the experts' order
    transposed : whether the parameter that stood here held (experts, inputs, outputs)
    dtype : of the parameter that stood here
    """

    _is_hf_initialized = True  # weight initialisers of transformers pass over what bears this mark

    def __init__(self, layers: Iterable[nn.Module], transposed: bool, dtype: torch.dtype) -> None:
        super().__init__()
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)
        self.transposed, self._like = transposed, dtype

    def __len__(self) -> int:
        return len(self._modules)

    def layer(self, number: int) -> nn.Module:
        """The linear layer of one expert."""
        return self._modules[str(number)]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, torch.Tensor) and index.ndim == 0 and not index.is_floating_point():
            index = int(index)
        if isinstance(index, int):
            return ExpertWeight(self.layer(range(len(self))[index]), not self.transposed, self.dtype)
        if isinstance(index, tuple) and index == (slice(None), None) and not self.transposed:
            return _Spread(self)
        return self.dense()[index]

    @property
    def shape(self) -> torch.Size:
        """That of the parameter that stood here."""
        first = self.layer(0)
        sides = first.out_features, first.in_features
        return torch.Size((len(self), *(sides[::-1] if self.transposed else sides)))

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers, were they unpacked."""
        weight = self.layer(0)._parameters.get("weight")
        return self._like if weight is None else weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the first expert."""
        return next(t.device for t in (*self.layer(0).parameters(), *self.layer(0).buffers()))

    @property
    def ndim(self) -> int:
        """3: experts, and the two sides of their matrices."""
        return 3

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def dense(self) -> torch.Tensor:
        """All numbers at once, in the parameter's shape: slow, for uses that are no product."""
        return torch.stack([self[e].dense() for e in range(len(self))])

    def transpose(self, dim0: int, dim1: int) -> Any:
        """As of a tensor; with the sides of the matrices exchanged a batched product still runs on packed bytes."""
        if {dim0 % 3, dim1 % 3} == {1, 2}:
            return _Turned(self)
        return self.dense().transpose(dim0, dim1)

    @property
    def mT(self) -> Any:
        """The stack with the sides of the matrices exchanged."""
        return _Turned(self)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """As nn.Module, and the dtype that the numbers would have follows."""
        super()._apply(fn, recurse)
        self._like = fn(torch.empty(0, dtype=self._like, device=self.device)).dtype
        return self

    def __rmatmul__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x, self)

    def __matmul__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(self, x)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """A batched product runs expert by expert on the rows that are not zero; all else gets the numbers."""
        kwargs = kwargs or {}
        if func in (torch.bmm, torch.Tensor.bmm, *_MATMULS) and len(args) == 2 and not kwargs:
            x, stack = args
            if isinstance(stack, ExpertStack) and stack.transposed and (out := _batched(x, stack)) is not None:
                return out
        return func(*unpacked(args), **{name: unpacked(value) for name, value in kwargs.items()})

    def extra_repr(self) -> str:
        return f"{len(self)} experts, transposed={self.transposed}"


class _Turned:
    """A stack whose matrices have their sides exchanged, as an operand."""

    def __init__(self, stack: ExpertStack) -> None:
        self.stack = stack

    def dense(self) -> torch.Tensor:
        """All numbers at once."""
        return self.stack.dense().transpose(1, 2)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __rmatmul__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x, self)

    def __getitem__(self, index: Any) -> Any:
        return self.stack[index].t() if isinstance(index, int) else self.dense()[index]

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.bmm, torch.Tensor.bmm, *_MATMULS) and len(args) == 2 and not kwargs:
            x, turned = args
            upright = isinstance(turned, _Turned) and not turned.stack.transposed
            if upright and (out := _batched(x, turned.stack)) is not None:
                return out
        return func(*unpacked(args), **{name: unpacked(value) for name, value in kwargs.items()})


class _Spread:
    """A stack (experts, 1, outputs, inputs) on the left of a product, as `stack[:, None] @ x` has it."""

    def __init__(self, stack: ExpertStack) -> None:
        self.stack = stack

    def dense(self) -> torch.Tensor:
        """All numbers at once."""
        return self.stack.dense()[:, None]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "stack":
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __matmul__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(self, x)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """The product runs expert by expert; all else gets the numbers."""
        if func in _MATMULS and len(args) == 2 and not kwargs and isinstance(args[0], _Spread):
            stack, x = args[0].stack, args[1]
            if isinstance(x, torch.Tensor) and x.ndim == 4 and len(x) == len(stack):
                return torch.stack([_times(stack.layer(e), columns) for e, columns in enumerate(x)])
        return func(*unpacked(args), **{name: unpacked(value) for name, value in (kwargs or {}).items()})


def _on_numbers(name: str) -> Callable:
    def operation(self: ExpertStack | _Turned | _Spread, *others: Any) -> Any:
        return getattr(self.dense(), name)(*others)

    return operation


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "neg"):
    for _kind in (ExpertStack, _Turned, _Spread):
        setattr(_kind, f"__{_name}__", _on_numbers(f"__{_name}__"))
for _name in ("getitem", "rmatmul"):
    setattr(_Spread, f"__{_name}__", _on_numbers(f"__{_name}__"))


def _times(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """W x of a layer's matrix W and columns x (..., inputs, columns)."""
    return layer(x.transpose(-1, -2)).transpose(-1, -2)


def _batched(x: Any, stack: ExpertStack) -> torch.Tensor | None:
    """x (experts, rows, inputs) times each expert's matrix; None for operands of another shape."""
    if not isinstance(x, torch.Tensor) or x.ndim != 3 or len(x) != len(stack):
        return None
    return torch.stack([_nonzero_rows(stack.layer(e), rows) for e, rows in enumerate(x)])


def _nonzero_rows(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """x WT, where models that send every token to every expert have set the rows of other experts' tokens to zero."""
    routed = x.detach().any(-1).nonzero()[:, 0]
    out = x.new_zeros(len(x), layer.out_features)
    return out.index_copy(0, routed, layer(x[routed]).to(out.dtype)) if len(routed) else out


class ExpertWeight:
    """One expert's matrix as an operand that is not unpacked.

    Parameters
    ----------
    layer : the linear layer that multiplies
    upright : whether the operand reads (outputs, inputs), as `linear` wants it, or its transpose, as `x @ w` does
    dtype : of the numbers, were they unpacked
    """

    def __init__(self, layer: nn.Module, upright: bool, dtype: torch.dtype) -> None:
        self.layer, self.upright, self.dtype = layer, upright, dtype

    @property
    def shape(self) -> torch.Size:
        """Of the operand."""
        sides = self.layer.out_features, self.layer.in_features
        return torch.Size(sides if self.upright else sides[::-1])

    @property
    def ndim(self) -> int:
        """2."""
        return 2

    @property
    def device(self) -> torch.device:
        """Of the layer."""
        return next(t.device for t in (*self.layer.parameters(), *self.layer.buffers()))

    def t(self) -> ExpertWeight:
        """The transpose, not unpacked either."""
        return ExpertWeight(self.layer, not self.upright, self.dtype)

    T = mT = property(t)

    def transpose(self, dim0: int, dim1: int) -> ExpertWeight:
        """The transpose, or the same for equal dimensions."""
        return self if dim0 % 2 == dim1 % 2 else self.t()

    def dense(self) -> torch.Tensor:
        """The numbers."""
        packed = isinstance(self.layer, QuantizedLinear)
        weight = self.layer.dequantize(self.dtype) if packed else self.layer.weight
        return weight if self.upright else weight.t()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("layer", "upright", "dtype"):  # not there yet while it is being copied
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __rmatmul__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x, self)

    def __matmul__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(self, x)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.dense()[index]

    def __add__(self, other: Any) -> torch.Tensor:
        return self.dense() + other

    def __mul__(self, other: Any) -> torch.Tensor:
        return self.dense() * other

    __radd__, __rmul__ = __add__, __mul__

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """A product with rows calls the layer; all else gets the numbers."""
        kwargs = kwargs or {}
        if len(args) >= 2 and isinstance(args[1], ExpertWeight) and isinstance(args[0], torch.Tensor):
            x, weight = args[:2]
            if x.is_floating_point() and x.ndim and x.shape[-1] == weight.layer.in_features:
                if func is nn.functional.linear and weight.upright and set(kwargs) <= {"bias"}:
                    bias = args[2] if len(args) > 2 else kwargs.get("bias")
                    out = weight.layer(x)
                    return out if bias is None else out + bias
                if func in _MATMULS and not weight.upright and len(args) == 2 and not kwargs:
                    return weight.layer(x)
        if func in _MATMULS and len(args) == 2 and not kwargs and isinstance(args[0], ExpertWeight):
            weight, x = args
            if weight.upright and isinstance(x, torch.Tensor) and x.ndim >= 2:
                return _times(weight.layer, x)
        return func(*unpacked(args), **{name: unpacked(value) for name, value in kwargs.items()})


_MATMULS = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)


def unpacked(value: Any) -> Any:
    if isinstance(value, (ExpertStack, ExpertWeight, _Spread, _Turned)):
        return value.dense()
    return type(value)(unpacked(v) for v in value) if type(value) in (tuple, list) else value


# ---- transformers' own contract for experts, by expert -----------------------------------------------


def take_over(module: nn.Module) -> None:
    """Let a module of experts whose parameters have become stacks be run expert by expert.

    Where transformers dispatches its class (`use_experts_implementation`), it is sent to `forward_by_expert` by a
    config of its own, so that no setting of the model's leads back to kernels which need the full parameter. Any other
    class runs its own forward.
    """
    library = sys.modules.get("transformers.integrations.moe")
    if library is None or not hasattr(type(module), "_apply_gate") or not hasattr(module, "is_transposed"):
        return
    if not hasattr(module, "config") or not hasattr(library, "ALL_EXPERTS_FUNCTIONS"):
        return
    library.ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward_by_expert)
    module.config = copy.copy(module.config)
    name = "eager" if _own_way(module) else IMPLEMENTATION
    module.config._experts_implementation_internal = name


def _own_way(module: nn.Module) -> bool:
    """Whether the module holds other parameters than the contract's, which only its own loop knows how to use."""
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    return not all(isinstance(getattr(module, name, None), ExpertStack) for name in (first, "down_proj"))


def forward_by_expert(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers' `batched_mm_experts_forward` computes, each expert's layer called once with its tokens."""
    each, n_experts = top_k_index.shape[-1], len(self.down_proj)
    if top_k_weights.shape[-1] != each:  # a router that tells every expert's weight
        top_k_weights = top_k_weights.gather(-1, top_k_index)
    chosen = top_k_index.reshape(-1)
    order = None
    if len(hidden_states) == 1:
        numbers, x = chosen.tolist(), hidden_states.expand(each, -1)
        parts = [(number, place, place + 1) for place, number in enumerate(numbers)]
    else:
        chosen, order = torch.sort(chosen, stable=True)
        x = hidden_states[order // each]
        parts = _parts(torch.bincount(chosen, minlength=n_experts).tolist())
    parts = [part for part in parts if part[0] < n_experts]  # a number beyond them marks a slot without an expert
    inside = chosen.clamp(max=n_experts - 1)
    gated = getattr(self, "has_gate", True)  # all are in the first versions of transformers 5
    first, bias = ("gate_up_proj", "gate_up_proj_bias") if gated else ("up_proj", "up_proj_bias")
    out = _products(getattr(self, first), x, parts)
    if self.has_bias:
        out = out + getattr(self, bias)[inside].to(out.dtype)
    out = self._apply_gate(out) if gated else self.act_fn(out)
    out = _products(self.down_proj, out, parts)
    if self.has_bias:
        out = out + self.down_proj_bias[inside].to(out.dtype)
    if getattr(self, "has_post_expert_norm", False):
        out = self.post_expert_norm(out)
    weights = top_k_weights.reshape(-1)
    weights = (weights if order is None else weights[order]).masked_fill(chosen >= n_experts, 0.0)
    out = out * weights[:, None]
    if order is not None:
        out = torch.empty_like(out).index_copy(0, order, out)
    return out.view(len(hidden_states), each, -1).sum(1).to(hidden_states.dtype)


def _parts(counts: list[int]) -> list[tuple[int, int, int]]:
    """(expert, first row, last row + 1) of every expert that has rows, from the number of rows of each."""
    parts, first = [], 0
    for number, count in enumerate(counts):
        if count:
            parts.append((number, first, first + count))
        first += count
    return parts


def _products(stack: ExpertStack, x: torch.Tensor, parts: list[tuple[int, int, int]]) -> torch.Tensor:
    """Rows of x times their expert's matrix; rows of no expert become zero."""
    layers = [stack.layer(number) for number, _, _ in parts]
    one_token = x.stride(0) == 0 and len(layers) > 1 and all(type(layer) is QuantizedLinear for layer in layers)
    if one_token and not any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers):
        outs = multiply_together(layers, x[:1])  # activations are rounded once, threads woken once
    else:
        outs = [layer(x[first:last]) for layer, (_, first, last) in zip(layers, parts, strict=True)]
    covered = sum(last - first for _, first, last in parts)
    return torch.cat(outs) if covered == len(x) else _placed(x, parts, outs, stack.layer(0).out_features)


def _placed(x: torch.Tensor, parts: list, outs: list[torch.Tensor], width: int) -> torch.Tensor:
    """Products in their rows, zeros in those of no expert."""
    pieces, row = [], 0
    for (_, first, last), out in zip(parts, outs, strict=True):
        pieces += [out.new_zeros(first - row, width), out]
        row = last
    return torch.cat([*pieces, x.new_zeros(len(x) - row, width)])
