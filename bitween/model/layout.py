"""What a language model is made of: its blocks, its linear layers and the weights they share.

Everything is found from the model's structure. No architecture is known by name, so a new Hugging
Face family needs no new code here.
"""

import fnmatch
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.nn.utils import parametrize

from bitween.layers.embedding import is_lookup
from bitween.layers.in_place import can_be_packed
from bitween.layers.plain import can_pack_convolution, is_plain_linear
from bitween.model.experts import experts_of, routers_of
from bitween.model.placement import check_placement

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight matrix that can be quantized.

    Attributes
    ----------
    name : str
        Path of the module inside the model, as ``model.named_modules()`` spells it.
    module : nn.Module
        The module itself.
    kind : {"linear", "conv1d", "embedding", "expert", "router", "table", "own", "conv"}
        "conv1d" is transformers' Conv1D, a linear layer that stores its weight transposed. "table" is a lookup of
        anything but words (positions, segments, codebooks), "own" a linear layer that computes more than a product:
        it keeps its arithmetic (`bitween.layers.in_place`), rounded by its weights alone. "conv" is a convolution
        of torch's, its kernels flattened to rows, in a model of blocks rounded by its weights too. "expert" is one
        expert's matrix, a linear layer that sees the tokens routed to it; "router" the linear layer that chooses the
        experts and stays in full precision: a small change of it sends tokens elsewhere.
    shape : (int, int)
        Rows and columns of the weight: (outputs, inputs), for an embedding (tokens, width). A
        Conv1D is given in this order too, although it stores the transpose.
    shared : tuple of str
        Paths of the other modules that use the same memory, for instance a tied head. They are the
        same item: quantized once, counted once.
    plain : bool
        True when the module computes nothing beyond the product or the lookup, so that a
        quantized layer can stand in its place. An embedding that multiplies its rows by a number is plain too, and
        so is what keeps its arithmetic.
    """

    name: str
    module: nn.Module = field(repr=False)
    kind: str
    shape: tuple[int, int]
    shared: tuple[str, ...] = ()
    plain: bool = True

    @property
    def quantized(self) -> bool:
        """Whether the module already holds packed codes instead of a weight."""
        return _is_quantized(self.module)

    @property
    def weight(self) -> torch.Tensor:
        """The weight as (outputs, inputs), a view of the model's memory; changing it changes the model."""
        if self.quantized:
            raise ValueError(f"{self.name}: the layer is already quantized and holds no full weight")
        weight = self.module.weight.detach()
        if self.kind == "conv":
            return weight.flatten(1)
        return weight.t() if self.kind == "conv1d" else weight

    def as_weight(self, values: torch.Tensor) -> torch.Tensor:
        """Numbers (outputs, inputs) in the shape in which the module keeps its weight."""
        if self.kind == "conv":
            return values.reshape(self.module.weight.shape)
        return values.T.contiguous() if self.kind == "conv1d" else values

    def matches(self, patterns: Iterable[str]) -> bool:
        """Whether a pattern (fnmatch) fits the name or one that shares the weight."""
        names = (self.name, *self.shared)
        return any(name == pattern or fnmatch.fnmatch(name, pattern) for name in names for pattern in patterns)

    @property
    def nbytes(self) -> int:
        """Bytes the weight takes now, scales and zeros included when it is quantized."""
        if self.quantized:
            return self.module.weight_nbytes
        return self.module.weight.numel() * self.module.weight.element_size()


@dataclass(frozen=True, eq=False)
class Block:
    """One element of the model's main list of blocks, with the layers that first appear in it."""

    name: str
    module: nn.Module = field(repr=False)
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Kept:
    """A matrix that stays as it is, because no linear layer or word embedding holds it."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True, eq=False)
class ModelLayout:
    """A causal language model in parts, every weight listed once.

    Attributes
    ----------
    embedding : Layer
        The word embedding.
    blocks : tuple of Block
        In the order of execution.
    tail : tuple of (str, nn.Module)
        What runs between the last block and the head, usually one norm.
    head : Layer
        The output layer. Tied to the embedding when ``embedding.name in head.shared``.
    others : tuple of Layer
        Linear layers outside the blocks.
    kept : tuple of Kept
        Every other matrix, with the reason why it is not a layer.
    one_block : str or None
        Why the model cannot be run block by block; all its layers between embedding and head are then one block.
    """

    embedding: Layer
    blocks: tuple[Block, ...]
    tail: tuple[tuple[str, nn.Module], ...] = field(repr=False)
    head: Layer
    others: tuple[Layer, ...]
    kept: tuple[Kept, ...]
    one_block: str | None = None

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm after the last block: the first module of `tail` without a weight matrix."""
        for _, module in self.tail:
            if all(p.ndim < 2 for p in module.parameters()):
                return module
        return None

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one weight."""
        return self.embedding.name in self.head.shared

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer once: embedding, blocks, others, head (left out when tied)."""
        inner = [layer for block in self.blocks for layer in block.layers]
        head = [] if self.tied else [self.head]
        return (self.embedding, *inner, *self.others, *head)

    def layer(self, name: str) -> Layer:
        """The layer of this name, or the one that shares its weight with this name."""
        for layer in self.layers:
            if name == layer.name or name in layer.shared:
                return layer
        raise KeyError(f"no layer named {name!r}")


def check_finite(model: nn.Module, done: Callable[[], None] = lambda: None) -> None:
    """Raise ValueError for the first parameter that holds NaN or infinity.

    One vectorised pass over the weights; `done` is called after each of them. The message names the parameter, how many
    of its values are not finite and where the first one is.
    """
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if not values.is_floating_point() or values.numel() == 0:
            continue
        low, high = torch.aminmax(values)  # both are NaN if any value is
        if math.isfinite(low.item()) and math.isfinite(high.item()):
            done()
            continue
        bad = ~torch.isfinite(values)
        first = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: expected finite values; got {int(bad.sum()):,} non-finite of {values.numel():,}, first at {first}"
        )


def find_parts(model: nn.Module) -> tuple[Layer, tuple[Block, ...], Layer, tuple[Layer, ...], tuple[Kept, ...]]:
    """Find embedding, blocks, head, other linear layers and kept matrices without running the model.

    Raises
    ------
    ValueError
        No linear layers, no list of blocks, no embedding or head, weights on the meta device, split over processes, on
        several devices, or of a dtype other than float32, float16 and bfloat16.
    """
    check_placement(model)
    paths = list(model.named_modules(remove_duplicate=False))
    names = _names_by_weight(paths)
    if not any(kind_of(m) in ("linear", "conv1d") for _, m in paths):
        raise ValueError(f"model: expected at least one linear layer; {type(model).__name__} has none")

    listed: set[tuple] = set()
    kinds = {**dict.fromkeys(experts_of(model), "expert"), **dict.fromkeys(routers_of(model), "router")}
    embedding = _end(model, model.get_input_embeddings(), "input embedding", paths, names)
    listed.add(_weight_key(embedding.module))
    head = _end(model, model.get_output_embeddings(), "output head", paths, names)
    listed.add(_weight_key(head.module))

    list_name, members = _find_blocks(model)
    blocks = []
    for i, member in enumerate(members):
        prefix = f"{list_name}.{i}"
        inside = [(f"{prefix}.{n}", m) for n, m in member.named_modules()]
        blocks.append(Block(prefix, member, _new_layers(inside, names, listed, kinds)))
    others = _others(paths, names, listed, kinds)
    layers = (embedding, head, *others, *(layer for block in blocks for layer in block.layers))
    _check_dtypes(layers)
    return embedding, tuple(blocks), head, others, _kept(model, layers)


def kind_of(module: nn.Module) -> str | None:
    """ "linear", "conv1d" or "embedding", for full and quantized layers alike; "conv" for packed convolutions alone;
    None for anything else."""
    if _is_quantized(module):
        if hasattr(module, "kernel_size"):
            return "conv"
        return "embedding" if hasattr(module, "num_embeddings") else "linear"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "conv1d" if isinstance(module, _conv1d_class()) else None


def _conv1d_class() -> type | tuple:
    """transformers' Conv1D if transformers is loaded; a model that uses it has loaded it."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library.Conv1D if library else ()


def _is_quantized(module: nn.Module) -> bool:
    return hasattr(module, "weight_nbytes")


def _weight_key(module: nn.Module) -> tuple:
    """Equal for two modules exactly when they use the same weight memory."""
    weight = module.codes if _is_quantized(module) else module.weight
    return weight.data_ptr(), weight.numel(), str(weight.device)


def _names_by_weight(paths: Iterable[tuple[str, nn.Module]]) -> dict[tuple, list[str]]:
    names: dict[tuple, list[str]] = {}
    for name, module in paths:
        if kind_of(module) and _shape(module)[0] * _shape(module)[1]:
            names.setdefault(_weight_key(module), []).append(name)
    return names


def _shape(module: nn.Module) -> tuple[int, int]:
    kind = kind_of(module)
    if kind == "embedding":
        return module.num_embeddings, module.embedding_dim
    if kind == "conv1d":
        return module.nf, module.nx
    if kind == "linear":
        return module.out_features, module.in_features
    return module.weight.shape[0], module.weight[0].numel()


def _make_layer(name: str, module: nn.Module, names: dict[tuple, list[str]]) -> Layer:
    shared = tuple(n for n in names.get(_weight_key(module), ()) if n != name)
    kind, plain = kind_of(module), True
    if not _is_quantized(module):
        if isinstance(module, nn.Embedding):
            plain = is_lookup(module)
        elif isinstance(module, nn.Linear) and not is_plain_linear(module):
            kind, plain = "own", not shared and can_be_packed(module)
    return Layer(name, module, kind, _shape(module), shared, plain)


def _make_table(name: str, module: nn.Module, names: dict[tuple, list[str]]) -> Layer:
    """A lookup of anything but words; memory that several modules share stays where it is unless all look it up."""
    layer = _make_layer(name, module, names)
    if layer.quantized or layer.plain:
        return replace(layer, kind="table")
    return replace(layer, kind="table", plain=not layer.shared and can_be_packed(module))


def _end(model, module, role: str, paths, names) -> Layer:
    if module is None or kind_of(module) is None:
        raise ValueError(f"model: expected a causal language model with an {role}; {type(model).__name__} has none")
    name = next(n for n, m in paths if m is module)
    return _make_layer(name, module, names)


def _new_layers(paths, names, listed: set[tuple], kinds: dict[str, str]) -> tuple[Layer, ...]:
    """Linear layers among `paths` whose weight is not listed yet; lists them. Those with arithmetic of their own are
    left for `_others`, since nothing is known of what they multiply."""
    layers = []
    for name, module in paths:
        if kind_of(module) not in ("linear", "conv1d") or 0 in _shape(module):
            continue
        key = _weight_key(module)
        if key not in listed:
            layer = _make_layer(name, module, names)
            if layer.kind == "own":
                continue
            listed.add(key)
            layers.append(replace(layer, kind=kinds.get(name, layer.kind)))
    return tuple(layers)


def _others(paths, names, listed: set[tuple], kinds: dict[str, str]) -> tuple[Layer, ...]:
    """What no block and no end holds: linear layers, then lookups and linear layers with arithmetic of their own."""
    layers = list(_new_layers(paths, names, listed, kinds))
    for name, module in paths:
        kind = kind_of(module)
        if kind is None or 0 in _shape(module) or (key := _weight_key(module)) in listed:
            continue
        make = _make_table if kind == "embedding" else _make_layer
        listed.add(key)
        layers.append(make(name, module, names))
    return (*layers, *_convolutions(paths))


def _convolutions(paths) -> Iterator[Layer]:
    """Convolutions whose kernels can be packed, but for those that share their memory; no block's input is known to be
    theirs, wherever they stand."""
    found: dict[tuple, list[tuple[str, nn.Module]]] = {}
    for name, module in paths:
        weight = getattr(module, "_parameters", {}).get("weight")
        if weight is not None and not parametrize.is_parametrized(module):
            found.setdefault(_weight_key(module), []).append((name, module))
    for uses in found.values():
        name, module = uses[0]
        if len(uses) == 1 and isinstance(module, (nn.Conv1d, nn.Conv2d)) and can_pack_convolution(module):
            yield Layer(name, module, "conv", _shape(module))


def _find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The outermost ModuleList with the most weight; lists inside it (experts) belong to its blocks."""
    best: tuple[int, str, nn.ModuleList] | None = None
    seen: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(outer + ".") for outer in seen):
            continue
        seen.append(name)
        if any(kind_of(m) in ("linear", "conv1d") for m in module.modules()):
            size = sum(p.numel() for p in module.parameters()) + sum(b.numel() for b in module.buffers())
            if best is None or size > best[0]:
                best = size, name, module
    if best is None:
        raise ValueError(f"model: expected a ModuleList of blocks with linear layers; {type(model).__name__} has none")
    return best[1], list(best[2])


def _check_dtypes(layers: Iterable[Layer]) -> None:
    for layer in layers:
        if not layer.quantized and layer.module.weight.dtype not in SUPPORTED_DTYPES:
            dtype = str(layer.module.weight.dtype).removeprefix("torch.")
            raise ValueError(f"{layer.name}.weight: expected float32, float16 or bfloat16; got {dtype}")


def _kept(model: nn.Module, layers: Iterable[Layer]) -> tuple[Kept, ...]:
    taken = {_weight_key(layer.module) for layer in layers}

    def rest() -> Iterator[Kept]:
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(path, recurse=False):
                key = parameter.data_ptr(), parameter.numel(), str(parameter.device)
                if parameter.ndim >= 2 and key not in taken:
                    reason = f"{type(module).__name__} is neither a linear layer nor the word embedding"
                    yield Kept(name, tuple(parameter.shape), reason)

    return tuple(rest())
