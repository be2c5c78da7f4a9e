"""Mixture of experts: finds parameters that are multiplied expert by expert, and makes each matrix a layer.

Nothing is known by name. A model is watched at work over a few tokens: a 3-D parameter (experts, a, b) whose slices, or
which as a whole, is multiplied with hidden states is a stack of experts, and so is a 2-D parameter (experts * a, b)
that is never multiplied but in equal parts of its rows. The product tells whether a slice is (outputs, inputs) or its
transpose. The unfolded model is a copy in the same memory, in which every matrix is an nn.Linear of its own name,
`...experts.gate_up_proj.3`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bitween.layers.experts import _MATMULS, ExpertStack, take_over
from bitween.layers.fused_experts import FusedStack
from bitween.model.memory import stored_again
from bitween.model.placement import check_whole
from bitween.model.replay import settled

__all__ = [
    "Held",
    "experts_of",
    "find_stacks",
    "fold_untouched",
    "routers_of",
    "shared_copy",
    "stack_fields",
    "stacks_of_plan",
    "unfold",
    "unfolded",
]

_TOKENS, _MORE = 8, 64
_PRODUCTS = (nn.functional.linear, torch.bmm, torch.Tensor.bmm, *_MATMULS)


def shared_copy(model: Any) -> Any:
    """A model of its own modules in the very memory of `model`; giving it other weights leaves `model` alone.

    A head that repeats the embedding number by number in memory of its own is tied to it in the copy.

    Quantizers work on such copies only, so that a model may run, or be quantized a second time, in another thread.

    Raises
    ------
    ValueError
        Weights are split over processes.
    """
    check_whole(model)
    parameters = {id(p): nn.Parameter(_recordable(p.detach()), p.requires_grad) for p in model.parameters()}
    if (again := stored_again(model)) is not None:  # it is quantized once, as it is counted once
        parameters[id(again)] = parameters[id(model.get_input_embeddings().weight)]
    memo: dict[int, Any] = {id(t): _recordable(t.detach()) for t in model.buffers()}
    memo |= parameters
    return copy.deepcopy(model, memo)


def _recordable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself; a copy of one made in inference mode, through which no gradient could be recorded."""
    return tensor.clone() if tensor.is_inference() else tensor


def unfolded(model: nn.Module) -> nn.Module:
    """`model` itself where it has no stacks of experts; else a copy in the same memory, each matrix a linear layer."""
    stacks = find_stacks(model)
    if not stacks:
        return model
    model = shared_copy(model)
    unfold(model, stacks)
    return model


@dataclass(frozen=True)
class Held:
    """How a parameter holds the matrices of experts.

    Attributes
    ----------
    transposed : whether they are (inputs, outputs)
    fused : how many of them a 2-D parameter holds one below the other; 0 for a 3-D parameter
    """

    transposed: bool
    fused: int = 0


def find_stacks(model: nn.Module) -> dict[str, Held]:
    """{name of a parameter that holds experts: how}."""
    wanted = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim in (2, 3)
        and parameter.is_floating_point()
        and not parameter.is_meta
        and _has_own_forward(model, name)
    }
    owners = {name: _owner(model, name) for name in wanted}
    found = {name: Held(bool(owner.is_transposed)) for name, owner in owners.items() if _by_contract(owner, name)}
    rest = {name: parameter for name, parameter in wanted.items() if name not in found}
    cubes = {name: parameter for name, parameter in rest.items() if parameter.ndim == 3}
    flat = _large(model, rest)
    if cubes:
        return {**found, **_watched(model, cubes | flat)}
    with suppress(Exception):  # a model that ids alone don't run: what it is told with says so, in words of its own
        found |= _watched(model, flat) if flat else {}
    return found


def unfold(model: nn.Module, stacks: Mapping[str, Held]) -> None:
    """Put an ExpertStack of linear layers, views of its memory, in the place of every parameter named."""
    owners = {}
    for name, held in stacks.items():
        owner, attribute = _owner(model, name), name.rpartition(".")[2]
        parameter = owner._parameters.pop(attribute)
        matrices = parameter.detach()
        matrices = matrices.unflatten(0, (held.fused, -1)) if held.fused else matrices
        layers = (_linear(matrix.t() if held.transposed else matrix, parameter) for matrix in matrices)
        kind = FusedStack if held.fused else ExpertStack
        setattr(owner, attribute, kind(layers, held.transposed, parameter.dtype).train(owner.training))
        owners[id(owner)] = owner
    for owner in owners.values():
        take_over(owner)


def fold_untouched(model: nn.Module) -> None:
    """Give modules of experts none of whose matrices is packed their parameters back; in others, matrices that are
    not packed get memory of their own, so that nothing of the whole parameter stays behind."""
    for owner in list(model.modules()):
        stacks = {name: child for name, child in owner._modules.items() if isinstance(child, ExpertStack)}
        if not stacks:
            continue
        layers = [stack.layer(e) for stack in stacks.values() for e in range(len(stack))]
        if any(not isinstance(layer, nn.Linear) for layer in layers):
            for layer in layers:
                if isinstance(layer, nn.Linear):
                    own = layer.weight.detach().clone(memory_format=torch.contiguous_format)
                    layer.weight = nn.Parameter(own, layer.weight.requires_grad)
            continue
        for name, stack in stacks.items():
            wanted = stack.layer(0).weight.requires_grad
            del owner._modules[name]
            owner.register_parameter(name, nn.Parameter(stack.dense().detach().contiguous(), wanted))
        if hasattr(owner, "is_transposed") and hasattr(owner, "config"):
            owner.config._experts_implementation_internal = getattr(
                getattr(model, "config", None), "_experts_implementation_internal", None
            )


def experts_of(model: nn.Module) -> set[str]:
    """Names of the linear layers, packed or not, that are one expert's matrix."""
    stacks = [(name, stack) for name, stack in model.named_modules() if isinstance(stack, ExpertStack)]
    return {f"{name}.{e}" for name, stack in stacks for e in range(len(stack))}


def routers_of(model: nn.Module) -> set[str]:
    """Names of the linear layers that choose experts: as many outputs as there are experts, beside the experts or in a
    module beside them; where none is, beside the module that holds them, within their block."""
    routers: set[str] = set()
    for name, module in model.named_modules():
        experts = [len(m) for m in module._modules.values() if isinstance(m, ExpertStack)]
        if not experts:
            continue
        home = name.rpartition(".")[0]
        found = _routers_in(model, home, name, experts)
        outside = home.rpartition(".")[0]
        if not found and outside and not _is_block(home) and not _is_block(outside):
            found = _routers_in(model, outside, home, experts)
        routers |= found
    return routers


def _routers_in(model: nn.Module, home: str, name: str, experts: list[int]) -> set[str]:
    """Linear layers of `home`, but not of `name` inside it, with as many outputs as there are experts."""
    paths = ((f"{home}.{path}" if home else path, m) for path, m in model.get_submodule(home).named_modules())
    return {
        path
        for path, m in paths
        if isinstance(m, nn.Linear) and m.out_features in experts and not path.startswith(name + ".")
    }


def _is_block(name: str) -> bool:
    """Whether a module is a member of a list, by its name."""
    return name.rpartition(".")[2].isdigit()


def stack_fields(model: nn.Module) -> dict[str, Any]:
    """What a file must say of a model's stacks beside the plan, JSON values, for `stacks_of_plan`.

    Returns
    -------
    {"transposed_experts": names of the stacks whose parameter held matrices (inputs, outputs),
    "fused_experts": {name of a stack whose parameter held the experts one below the other: how many}}
    """
    stacks = [(name, stack) for name, stack in model.named_modules() if isinstance(stack, ExpertStack)]
    return {
        "transposed_experts": [name for name, stack in stacks if stack.transposed],
        "fused_experts": {name: len(stack) for name, stack in stacks if isinstance(stack, FusedStack)},
    }


def stacks_of_plan(
    model: nn.Module, layers: Iterable[str], transposed_experts: Iterable[str], fused_experts: Mapping[str, int]
) -> dict[str, Held]:
    """The parameters of a fresh model whose experts a plan names, for `unfold`; the rest is as `stack_fields` gives it.

    Raises ValueError where a 2-D parameter can't be divided into as many parts as `fused` says.
    """
    turned, fused = set(transposed_experts), fused_experts
    found: dict[str, Held] = {}
    for name in layers:
        stack, _, number = name.rpartition(".")
        if number.isdigit() and stack not in found:
            try:
                parameter = model.get_parameter(stack)
            except AttributeError:
                continue
            if parameter.ndim == 2 and stack in fused:
                if len(parameter) % fused[stack]:
                    raise ValueError(f"{stack}: expected a divisor of its {len(parameter)} rows; got {fused[stack]}")
                found[stack] = Held(stack in turned, fused[stack])
            elif parameter.ndim == 3:
                found[stack] = Held(stack in turned)
    return found


# ---- inside -----------------------------------------------------------------------------------------


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _has_own_forward(model: nn.Module, name: str) -> bool:
    """Not a convolution or another module of torch's own, whose 3-D weight is no stack of matrices, and no weight that
    is packed as the one matrix it is."""
    owner = _owner(model, name)
    one = isinstance(owner, (nn.Linear, nn.Embedding)) or hasattr(owner, "nf")  # transformers' Conv1D
    if one and name.rpartition(".")[2] == "weight":
        return False
    return not type(owner).__module__.startswith("torch.")


def _by_contract(owner: nn.Module, name: str) -> bool:
    attribute = name.rpartition(".")[2]
    stacks = attribute in ("gate_up_proj", "up_proj", "down_proj") and owner._parameters[attribute].ndim == 3
    return stacks and hasattr(owner, "_apply_gate") and hasattr(owner, "is_transposed")


def _large(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Matrices among `parameters` that hold more than a thousandth of the model's numbers."""
    total = sum(parameter.numel() for parameter in model.parameters())
    return {name: p for name, p in parameters.items() if p.ndim == 2 and 1000 * p.numel() > total}


def _linear(matrix: torch.Tensor, parameter: nn.Parameter) -> nn.Linear:
    """A linear layer on the memory of `matrix` (outputs, inputs)."""
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(matrix, parameter.requires_grad)
    return layer


class _Watch(TorchFunctionMode):
    """Notes how parameters, or slices of them, are multiplied."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.ranges = [(p.data_ptr(), p.data_ptr() + p.nbytes, name, p) for name, p in parameters.items()]
        self.seen: dict[str, set[Held]] = {}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _PRODUCTS and len(args) >= 2 and all(isinstance(x, torch.Tensor) for x in args[:2]):
            self._note(func is nn.functional.linear, args[1])
            if func in _MATMULS:  # w @ x reads w as `linear` does: rows are outputs
                self._note(True, args[0])
        return func(*args, **(kwargs or {}))

    def _note(self, linear: bool, operand: torch.Tensor) -> None:
        if not operand.is_floating_point() or operand.ndim < 2 or operand.is_meta:
            return
        place = operand.data_ptr()
        for first, last, name, parameter in self.ranges:
            if not first <= place < last:
                continue
            as_stored = operand.stride()[-2:] == parameter.stride()[-2:]
            if parameter.ndim == 2:
                count = _parts_of(parameter, operand, place - first, as_stored)
                self.seen.setdefault(name, set()).add(Held(as_stored != linear, count))
            elif sorted(operand.shape[-2:]) == sorted(parameter.shape[1:]):
                self.seen.setdefault(name, set()).add(Held(as_stored != linear))


def _parts_of(parameter: nn.Parameter, operand: torch.Tensor, offset: int, as_stored: bool) -> int:
    """Into how many parts (rows / count, columns) of a 2-D parameter an operand at this offset in bytes divides it;
    1 for an operand that is no such part, or the whole."""
    rows, columns = operand.shape[-2:] if as_stored else operand.shape[:-3:-1]
    turned = operand.stride()[-2:] == parameter.stride()[::-1]
    if columns != parameter.shape[1] or rows < 2 or columns < 2 or not (as_stored or turned):
        return 1
    part = rows * columns * parameter.element_size()
    return 1 if parameter.nbytes % part or offset % part else parameter.nbytes // part


def _watched(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Held]:
    """Run the model over a few tokens; parameters used in one way only, and not as one matrix, are stacks.

    Those that no token reached (a router may send all of them elsewhere) are held as what has their name in modules of
    their class; where there is none, more tokens are tried.
    """
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    count = getattr(embedding, "num_embeddings", None)
    if not count:
        return {}
    device = next(iter(parameters.values())).device
    watch = _Watch(parameters)
    found: dict[str, Held] = {}
    for tokens in (_TOKENS, _MORE):
        known = nullcontext() if tokens == _TOKENS else suppress(Exception)  # it may have fewer positions
        with known, settled(model), torch.no_grad(), watch:
            model(torch.arange(tokens, device=device)[None] % count)
        found = {name: next(iter(ways)) for name, ways in watch.seen.items() if len(ways) == 1}
        kinds = {_kind(model, name): held for name, held in found.items()}
        unseen = {name: _kind(model, name) for name in parameters if name not in watch.seen}
        found |= {name: kinds[kind] for name, kind in unseen.items() if kind in kinds}
        if not any(kind not in kinds and _many(parameters[name]) for name, kind in unseen.items()):
            break
    return {name: held for name, held in found.items() if held.fused != 1}


def _many(parameter: nn.Parameter) -> bool:
    """Whether it may hold matrices of several experts, unlike a table of positions (1, length, width)."""
    return parameter.ndim == 3 and parameter.shape[0] > 1


def _kind(model: nn.Module, name: str) -> tuple[type, str, int]:
    """What parameters of one use have in common: their module's class, their name in it and their dimensions."""
    owner, attribute = _owner(model, name), name.rpartition(".")[2]
    return type(owner), attribute, owner._parameters[attribute].ndim
