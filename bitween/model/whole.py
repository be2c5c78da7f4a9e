"""Any torch module as a row of matrices: what there is to quantize where no blocks can be run one at a time.

The module runs as a whole, on examples of its own inputs. Its matrices are listed in the order in which such a run
reaches them, with the groups that read one and the same tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from bitween.layers.embedding import lookup_scale
from bitween.layers.plain import can_pack_convolution, is_plain_linear
from bitween.model.layout import SUPPORTED_DTYPES, Kept, Layer, kind_of
from bitween.model.placement import check_placement

__all__ = ["WholeLayout", "describe", "rows_read", "trace_order"]


@dataclass(frozen=True, eq=False)
class WholeLayout:
    """A module as its matrices.

    Attributes
    ----------
    layers : every matrix that a packed layer can hold, once, in the order of the module's parts
    kept : every other parameter of two dimensions or more, with the reason why it stays as it is
    dtype : in which most of the layers' numbers are kept
    """

    layers: tuple[Layer, ...]
    kept: tuple[Kept, ...]
    dtype: torch.dtype
    blocks: tuple = field(default=(), repr=False)  # none: it runs as a whole

    def layer(self, name: str) -> Layer:
        """The layer of this name, or the one that shares its weight with this name."""
        for layer in self.layers:
            if name == layer.name or name in layer.shared:
                return layer
        raise KeyError(f"no layer named {name!r}")


def describe(model: nn.Module) -> WholeLayout:
    """List the matrices of a module, without running it.

    Raises
    ------
    TypeError
        It is no torch module.
    ValueError
        No matrix at all; weights on the meta device, split over processes or on several devices; layers that are
        neither float32, float16 nor bfloat16.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch module; got {type(model).__name__}")
    check_placement(model)
    paths = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if _kind(module)]
    shared: dict[tuple, list[tuple[str, nn.Module]]] = {}
    for name, module in paths:
        if module.weight.numel():
            shared.setdefault(_memory(module.weight), []).append((name, module))
    layers = tuple(_layer(uses) for uses in shared.values())
    if not layers:
        raise ValueError(
            f"model: expected at least one weight matrix (linear layer, convolution or embedding); "
            f"{type(model).__name__} has none"
        )
    for layer in layers:
        if layer.module.weight.dtype not in SUPPORTED_DTYPES:
            dtype = str(layer.module.weight.dtype).removeprefix("torch.")
            raise ValueError(f"{layer.name}.weight: expected float32, float16 or bfloat16; got {dtype}")
    sizes: dict[torch.dtype, int] = {}
    for layer in layers:
        sizes[layer.module.weight.dtype] = sizes.get(layer.module.weight.dtype, 0) + layer.nbytes
    return WholeLayout(layers, tuple(_kept(model, set(shared))), max(sizes, key=lambda dtype: sizes[dtype]))


def trace_order(model: nn.Module, layout: WholeLayout, run: Any) -> tuple[tuple[tuple[str, ...], ...], frozenset[str]]:
    """Which layers `run()` reaches, and when.

    Returns
    -------
    groups : names in the order of their first call; those that read one and the same tensor (q, k, v) stand together.
        Layers without an input of numbers (embeddings) stand alone
    repeated : names of those that are called more than once in a run
    """
    groups: dict[tuple, list[str]] = {}
    held: list[torch.Tensor] = []  # so that no memory is used twice, which would make two tensors look like one
    seen: set[str] = set()
    repeated: set[str] = set()

    def note(layer: Layer) -> Any:
        def hook(_module, args, kwargs):
            if layer.name in seen:
                repeated.add(layer.name)
                return
            seen.add(layer.name)
            x = (args or tuple(kwargs.values()))[0]
            held.append(x)
            key = (x.data_ptr(), tuple(x.shape), x.stride(), 0 if x.is_inference() else x._version)
            groups.setdefault(key if layer.kind in ("linear", "conv1d") else (layer.name,), []).append(layer.name)

        return hook

    with ExitStack() as hooks:
        for layer, module in _uses(model, layout):
            hooks.callback(module.register_forward_pre_hook(note(layer), with_kwargs=True).remove)
        run()
    return tuple(tuple(names) for names in groups.values()), frozenset(repeated)


def rows_read(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """What a layer multiplies its matrix with, from its input: (rows, columns of the matrix).

    Of a convolution these are the patches that its kernels lie on; only without groups do all kernels see the same.
    """
    if layer.kind != "conv":
        return x.reshape(-1, x.shape[-1])
    module = layer.module
    two = module.weight.ndim == 4
    x = x if x.ndim == module.weight.ndim else x[None]
    if isinstance(module.padding, str):
        x = nn.functional.pad(x, module._reversed_padding_repeated_twice)
        padding: tuple[int, ...] = (0,) * len(module.kernel_size)
    else:
        padding = module.padding
    if not two:
        x, kernel = x[:, :, None], (1, *module.kernel_size)
        patches = nn.functional.unfold(x, kernel, (1, *module.dilation), (0, *padding), (1, *module.stride))
    else:
        patches = nn.functional.unfold(x, module.kernel_size, module.dilation, padding, module.stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


# ---- inside -----------------------------------------------------------------------------------------


def _kind(module: nn.Module) -> str | None:
    if hasattr(module, "weight_nbytes"):  # packed already: nothing is left to do there
        return None
    if parametrize.is_parametrized(module):  # its weight is computed from others
        return None
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and not isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "conv"
    return kind_of(module)


def _memory(weight: torch.Tensor) -> tuple:
    return weight.data_ptr(), weight.numel(), str(weight.device)


def _layer(uses: list[tuple[str, nn.Module]]) -> Layer:
    """One matrix with all modules that use its memory; a lookup table comes first, since it owns packed rows."""
    uses = sorted(uses, key=lambda use: _kind(use[1]) != "embedding")
    (name, module), rest = uses[0], uses[1:]
    kind = _kind(module)
    plain = all(_is_plain(m) for _, m in uses)
    if kind == "embedding":  # all tables on one memory become one module
        plain = plain and len({lookup_scale(m) for _, m in uses if _kind(m) == "embedding"}) == 1
    elif kind == "conv" or any(_kind(m) != kind for _, m in rest):
        plain = plain and not rest
    return Layer(name, module, kind, _shape(module), tuple(n for n, _ in rest), plain)


def _shape(module: nn.Module) -> tuple[int, int]:
    if hasattr(module, "nf"):  # transformers' Conv1D keeps the transpose
        return module.nf, module.nx
    return module.weight.shape[0], module.weight[0].numel()


def _is_plain(module: nn.Module) -> bool:
    kind = _kind(module)
    if kind == "conv1d":
        return True
    if kind == "linear":
        # torch's own attention multiplies by this layer's weight itself, so that no input ever reaches the layer
        return not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear) and is_plain_linear(module)
    if kind == "embedding":
        return module.max_norm is None and lookup_scale(module) is not None
    return can_pack_convolution(module)


def _uses(model: nn.Module, layout: WholeLayout) -> Iterator[tuple[Layer, nn.Module]]:
    """Every layer that can be quantized with each module that uses it, in the model given, which may be a copy of the
    one described."""
    for layer in (layer for layer in layout.layers if layer.plain):
        for module in {id(m): m for m in (model.get_submodule(n) for n in (layer.name, *layer.shared))}.values():
            yield layer, module


def _kept(model: nn.Module, taken: set[tuple]) -> Iterator[Kept]:
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.ndim >= 2 and parameter.numel() and _memory(parameter) not in taken:
                yield Kept(name, tuple(parameter.shape), _why(module))


def _why(module: nn.Module) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.MultiheadAttention):
        return f"{kind} multiplies by it itself, without a layer that could be replaced"
    if isinstance(module, parametrize.ParametrizationList):
        return "a weight is computed from it and others each time"
    if isinstance(module, nn.modules.rnn.RNNBase):
        return f"{kind} hands its weights to one kernel of torch, which takes no packed ones"
    return f"{kind} is neither a linear layer, a convolution nor an embedding"
