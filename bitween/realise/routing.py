"""How often the routers of a mixture of experts choose otherwise than those of the original model.

Routers stay in full precision, but what they see does not: a changed hidden state can send a token to other experts,
which no smooth measure of a layer's error tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bitween.layers.experts import ExpertStack
from bitween.layers.fused_experts import FusedStack
from bitween.model.blocks import BlockRunner
from bitween.realise.context import RunContext

__all__ = ["routing_changes"]


def routing_changes(context: RunContext, candidate: BlockRunner, windows: torch.Tensor) -> dict[str, float]:
    """Share of the tokens whose set of experts is another one in the candidate, for each module of experts.

    Parameters
    ----------
    context : of the original model
    candidate : a model of the same modules
    windows : token ids (windows, length)

    Returns
    -------
    {name of the module that holds the experts: share}; without those that are not told which experts to use by whole
    numbers, and of a model without experts nothing, without running it.
    """
    if not _homes(context.model):
        return {}
    before, after = (_choices(context, runner, windows) for runner in (context.runner, candidate))
    return {name: _changed(before[name], after[name]) for name in before if name in after}


def _changed(before: torch.Tensor, after: torch.Tensor) -> float:
    if before.shape != after.shape:
        raise ValueError(f"expected choices of experts for the same tokens; got {before.shape} and {after.shape}")
    return (before != after).any(-1).double().mean().item()


def _choices(context: RunContext, runner: BlockRunner, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sorted numbers of the experts of every token, int64 (tokens, chosen)."""
    found: dict[str, list[torch.Tensor]] = {}
    with _watched(runner.model, lambda name, chosen: found.setdefault(name, []).append(chosen)):
        context.final_states(runner, windows)
    return {name: torch.cat(parts) for name, parts in found.items()}


@contextmanager
def _watched(model: nn.Module, told: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    def watch(name: str) -> Callable:
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            chosen = next((x for x in (*args, *kwargs.values()) if _is_choice(x)), None)
            if chosen is not None:
                told(name, chosen.detach().long().sort(-1).values)

        return hook

    handles = [m.register_forward_pre_hook(watch(name), with_kwargs=True) for name, m in _told(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _homes(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold stacks of experts themselves."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(isinstance(child, ExpertStack) for child in module._modules.values())
    }


def _told(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name of the module that holds experts, the module that is told which to use): itself, or the one around it,
    which takes the matrices out and hands them to a holder that only multiplies."""
    for name, module in _homes(model).items():
        around = name.rpartition(".")[0]
        taken_out = any(isinstance(child, FusedStack) for child in module._modules.values())
        yield name, model.get_submodule(around) if taken_out and around else module


def _is_choice(value: Any) -> bool:
    whole = isinstance(value, torch.Tensor) and not value.is_floating_point() and value.dtype != torch.bool
    return whole and value.ndim == 2
