"""Whether modules are still what they were: the same tensors at the same addresses, no hooks, no other forward."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

__all__ = ["Watch"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL = ("_global_forward_hooks", "_global_forward_pre_hooks")


class Watch:
    """Remembers modules as they are, and tells whether they still are so.

    A module counts as changed when one of its tensors or modules is another, lies elsewhere, or has another dtype (which
    lies elsewhere), when it has a hook or a `forward` of its own, or when a watched attribute is another. Numbers
    written into a tensor's own memory are no change: they are read from there.
    """

    def __init__(self) -> None:
        self.empty: list[dict] = [getattr(torch_module, name) for name in _GLOBAL]
        self.same: list[tuple[dict, str, Any]] = []
        self.tensors: list[tuple[Any, int]] = []
        self.absent: list[dict] = []
        self.versions: list[tuple[Any, int]] = []

    def module(self, module: nn.Module) -> None:
        """Watch a module, its own tensors and its children."""
        self.empty += [getattr(module, name) for name in _HOOKS]
        self.absent.append(module.__dict__)
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                self.same.append((held, name, tensor))
                if tensor is not None:
                    self.tensors.append((tensor.data_ptr, tensor.data_ptr()))
        self.same += [(module._modules, name, child) for name, child in module._modules.items()]

    def attribute(self, owner: Any, name: str) -> None:
        """Watch an attribute that stands in an object's dictionary."""
        if name in owner.__dict__:
            self.same.append((owner.__dict__, name, owner.__dict__[name]))

    def eval(self, module: nn.Module) -> None:
        """Watch that a module stays as it is: training or not."""
        for part in module.modules():
            self.attribute(part, "training")

    def version(self, tensor: Any) -> None:
        """Watch a tensor's numbers."""
        self.versions.append((tensor, tensor._version))

    def unchanged(self) -> bool:
        """Whether all is as it was."""
        for held in self.empty:
            if held:
                return False
        for held in self.absent:
            if "forward" in held:
                return False
        for held, name, value in self.same:
            if held.get(name, self) is not value:
                return False
        for address, before in self.tensors:
            if address() != before:
                return False
        return all(tensor._version == version for tensor, version in self.versions)
