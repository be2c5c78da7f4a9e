"""Mixture of experts: finds 3-D parameters that are multiplied expert by expert, and makes each matrix a layer.

Nothing is known by name. A model is watched at work over a few tokens: a 3-D parameter (experts, a, b) whose slices, or
which as a whole, is multiplied with hidden states is a stack of experts, and the product tells whether a slice is
(outputs, inputs) or its transpose. The unfolded model is a copy in the same memory, in which every matrix is an
nn.Linear of its own name, `...experts.gate_up_proj.3`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bitween.layers.experts import _MATMULS, ExpertStack, take_over
from bitween.model.memory import stored_again
from bitween.model.replay import settled

__all__ = [
    "experts_of",
    "find_stacks",
    "fold_untouched",
    "routers_of",
    "shared_copy",
    "transposed_stacks",
    "unfold",
    "unfolded",
]

_TOKENS = 8
_PRODUCTS = (nn.functional.linear, torch.bmm, torch.Tensor.bmm, *_MATMULS)


def shared_copy(model: Any) -> Any:
    """A model of its own modules in the very memory of `model`; giving it other weights leaves `model` alone.

    A head that repeats the embedding number by number in memory of its own is tied to it in the copy.

    Quantizers work on such copies only, so that a model may run, or be quantized a second time, in another thread.
    """
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


def find_stacks(model: nn.Module) -> dict[str, bool]:
    """{name of a 3-D parameter that holds experts: whether its slices are (inputs, outputs)}."""
    wanted = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3
        and parameter.is_floating_point()
        and not parameter.is_meta
        and _has_own_forward(model, name)
    }
    if not wanted:
        return {}
    found = {name: module.is_transposed for name in wanted if hasattr(module := _owner(model, name), "is_transposed")}
    found = {name: bool(transposed) for name, transposed in found.items() if _by_contract(_owner(model, name), name)}
    rest = {name: parameter for name, parameter in wanted.items() if name not in found}
    return {**found, **(_watched(model, rest) if rest else {})}


def unfold(model: nn.Module, stacks: Mapping[str, bool]) -> None:
    """Put an ExpertStack of linear layers, views of its memory, in the place of every 3-D parameter named."""
    owners = {}
    for name, transposed in stacks.items():
        owner, attribute = _owner(model, name), name.rpartition(".")[2]
        parameter = owner._parameters.pop(attribute)
        layers = (_linear(matrix.t() if transposed else matrix, parameter) for matrix in parameter.detach())
        setattr(owner, attribute, ExpertStack(layers, transposed, parameter.dtype).train(owner.training))
        owners[id(owner)] = owner
    for owner in owners.values():
        take_over(owner)


def fold_untouched(model: nn.Module) -> None:
    """Give modules of experts none of whose matrices is packed their 3-D parameters back; in others, matrices that are
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
    module beside them."""
    routers = set()
    for name, module in model.named_modules():
        experts = [len(m) for m in module._modules.values() if isinstance(m, ExpertStack)]
        if not experts:
            continue
        home = name.rpartition(".")[0]
        for path, layer in model.get_submodule(home).named_modules():
            inside = f"{home}.{path}" if home else path
            if isinstance(layer, nn.Linear) and layer.out_features in experts and not inside.startswith(name + "."):
                routers.add(inside)
    return routers


def transposed_stacks(model: nn.Module) -> list[str]:
    """Names of the stacks whose parameter held (experts, inputs, outputs)."""
    return [n for n, stack in model.named_modules() if isinstance(stack, ExpertStack) and stack.transposed]


def stacks_of_plan(model: nn.Module, layers: Iterable[str], transposed: Iterable[str]) -> dict[str, bool]:
    """The 3-D parameters of a fresh model whose experts a plan names, for `unfold`."""
    turned = set(transposed)
    found: dict[str, bool] = {}
    for name in layers:
        stack, _, number = name.rpartition(".")
        if number.isdigit() and stack not in found:
            try:
                parameter = model.get_parameter(stack)
            except AttributeError:
                continue
            if parameter.ndim == 3:
                found[stack] = stack in turned
    return found


# ---- inside -----------------------------------------------------------------------------------------


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _has_own_forward(model: nn.Module, name: str) -> bool:
    """Not a convolution or another module of torch's own, whose 3-D weight is no stack of matrices."""
    return not type(_owner(model, name)).__module__.startswith("torch.")


def _by_contract(owner: nn.Module, name: str) -> bool:
    return name.rpartition(".")[2] in ("gate_up_proj", "up_proj", "down_proj") and hasattr(owner, "has_gate")


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
        self.seen: dict[str, set[bool]] = {}

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
            if first <= place < last and sorted(operand.shape[-2:]) == sorted(parameter.shape[1:]):
                as_stored = operand.stride()[-2:] == parameter.stride()[1:]
                self.seen.setdefault(name, set()).add(as_stored != linear)


def _watched(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, bool]:
    """Run the model over a few tokens; parameters used in one way only are stacks."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    count = getattr(embedding, "num_embeddings", None)
    if not count:
        return {}
    device = next(iter(parameters.values())).device
    watch = _Watch(parameters)
    with settled(model), torch.no_grad(), watch:
        model(torch.arange(_TOKENS, device=device)[None] % count)
    return {name: ways.pop() for name, ways in watch.seen.items() if len(ways) == 1}
