"""Whether modules are still what they were: the same tensors at the same addresses, no hooks, no other forward."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from bitween import _core
from bitween.layers.packed import MOVES, Packed

try:  # how transformers collects outputs that a caller asks for; not in every version
    from transformers.utils import output_capturing
except ImportError:
    output_capturing = None

__all__ = ["Watch", "outputs_are_collected"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL = ("_global_forward_hooks", "_global_forward_pre_hooks")

_TURNS = 8
_registered = [0]  # modules, parameters and buffers that were given to any module since `_count_registrations`


@functools.cache
def _count_registrations() -> None:
    def count(*_: Any) -> None:
        _registered[0] += 1

    torch_module.register_module_module_registration_hook(count)
    torch_module.register_module_parameter_registration_hook(count)
    torch_module.register_module_buffer_registration_hook(count)


def _events() -> tuple[int, int, int]:
    """Counters that move when any module of the process gets a part or a hook, or a packed layer is moved or cast."""
    return _registered[0], RemovableHandle.next_id, MOVES[0]


_collector = getattr(output_capturing, "_active_collector", None)


def outputs_are_collected() -> bool:
    """Whether a model around this one gathers what inner modules give: hidden states, attentions, router logits."""
    return _collector is not None and bool(_collector.get())


def _only_collect(hooks: dict) -> bool:
    """Whether hooks are transformers' own, which stay with a model that was once asked for such outputs, and idle."""
    name = getattr(output_capturing, "__name__", None)
    return _collector is not None and all(getattr(hook, "__module__", None) == name for hook in hooks.values())


class Watch:
    """Remembers modules as they are, and tells whether they still are so.

    A module counts as changed when one of its tensors or modules is another or lies elsewhere, which a tensor of
    another dtype or device does, when it has a hook or a `forward` of its own, or when a watched attribute is another.
    Numbers written into a tensor's own memory are no change: they are read from there.

    To look at everything takes as long as a block of a small model. So all is looked at before the first step with a
    cache, and whenever something was registered, hooked, moved or cast anywhere; of what can still change behind that,
    by writing into a module's dictionaries or a tensor's `data`, the gains of norms are looked at before each step and
    the rest within `_TURNS` steps.
    """

    def __init__(self) -> None:
        _count_registrations()
        self._parts: list[tuple[list, list, list, list]] = []
        self._always: list[Any] = []
        self._versions: list[tuple[torch.Tensor, int]] = []
        self._turns: list[tuple] = []
        self._turn, self._seen = 0, (-1, -1, -1)

    def module(self, module: nn.Module) -> None:
        """Watch a module, its own tensors and its children."""
        same: list[Any] = []
        answers: list[Any] = []
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                same += [held, name, tensor]
                if tensor is not None:
                    answers += [tensor.data_ptr, tensor.data_ptr()]
        for name, child in module._modules.items():
            same += [module._modules, name, child]
        empty = []
        for hooks in (getattr(module, name) for name in _HOOKS):
            if hooks and _only_collect(hooks):
                answers += [functools.partial(tuple, hooks), tuple(hooks)]
            else:
                empty.append(hooks)
        if not isinstance(module, Packed):
            self._always += answers
        self._parts.append((empty, [module.__dict__], same, answers))

    def attribute(self, owner: Any, name: str) -> None:
        """Watch an attribute that stands in an object's dictionary."""
        if name in owner.__dict__:
            self._parts.append(([], [], [owner.__dict__, name, owner.__dict__[name]], []))

    def eval(self, module: nn.Module) -> None:
        """Watch that a module and those in it stay as they are: training or not."""
        for part in module.modules():
            self.attribute(part, "training")

    def numbers(self, tensor: torch.Tensor) -> None:
        """Watch the numbers of a tensor, of which something else was computed."""
        self._versions.append((tensor, tensor._version))

    def unchanged(self, fully: bool) -> bool:
        """Whether all is as it was; with fully=False as far as the class says."""
        if not self._turns:
            self._turns = [self._flat(self._parts[k::_TURNS]) for k in range(_TURNS)]
            self._parts = []
        events = _events()
        if fully or events != self._seen:
            wanted = self._turns
        else:
            self._turn = (self._turn + 1) % _TURNS
            wanted = self._turns[self._turn : self._turn + 1]
        globally = tuple(getattr(torch_module, name) for name in _GLOBAL)
        if not _core.unchanged(globally, (), "", (), tuple(self._always)):
            return False
        if not all(_core.unchanged(*part) for part in wanted):
            return False
        self._seen = events
        return all(tensor._version == version for tensor, version in self._versions)

    @staticmethod
    def _flat(parts: list[tuple[list, list, list, list]]) -> tuple:
        empty, absent, same, answers = (tuple(x for part in parts for x in part[k]) for k in range(4))
        return empty, absent, "forward", same, answers
