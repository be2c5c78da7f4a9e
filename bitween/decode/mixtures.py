"""Experts of a decoder's blocks: which stand where is known by family, how tokens choose them is found by asking."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bitween import _core
from bitween.decode.refusing import refuse
from bitween.layers.experts import IMPLEMENTATION, ExpertStack

if TYPE_CHECKING:
    from bitween.decode.recognising import _Builder

__all__ = ["Clamped", "mixture_of", "noted"]

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ASKED = 64  # tokens, or rows of numbers, by which a choice is compared


@dataclass(frozen=True)
class Clamped:
    """(up + 1) * gate * sigmoid(alpha * gate), the gate at most `limit` and up within it."""

    alpha: float
    limit: float

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


def mixture_of(build: _Builder, block: nn.Module, mlp_parts: Callable) -> tuple[tuple, list, Any]:
    """A block of experts for the core, the parts of the MLP that stands beside them, and the experts' activation.

    `mlp_parts` describes an MLP without experts, as (parts, activation).
    """
    if build.family.router is None:
        raise refuse("experts in a family that is known without")
    router, experts = getattr(block, build.family.router), block.experts
    stacks = experts.gate_up_proj, experts.down_proj
    if not all(isinstance(stack, ExpertStack) for stack in stacks):
        raise refuse("experts that are not packed")
    if experts.config._experts_implementation != IMPLEMENTATION:
        raise refuse(f"experts by {experts.config._experts_implementation}")
    build.watch.attribute(experts.config, "_experts_implementation_internal")
    for module in (router, experts, *stacks):
        build.watch.module(module)
    build.routers.append(router)
    for name in ("top_k", "norm_topk_prob"):
        build.watch.attribute(router, name)
    choice = _choice(router, build.config.hidden_size, build.dtype)
    number, n = build.plain(router.weight, getattr(router, "bias", None))
    if not len(stacks[0]) == len(stacks[1]) == n:
        raise refuse("more or fewer experts than the router knows")
    pairs = not experts.is_concatenated
    described = tuple(_expert(build, experts, e, pairs) for e in range(n))
    own, gate = [None] * 3, None
    shared = getattr(block, "shared_expert", None)
    activation = _activation_of(build, experts)
    if shared is not None:
        build.watch.module(shared)
        own, beside = mlp_parts(build, shared)
        if type(beside) is not type(activation):
            raise refuse("a shared expert with another activation")
        gate_number, rows = build.linear(block.shared_expert_gate)
        gate = (gate_number, 0, rows)
    chosen, over_all, divided, dtype = choice
    return ((number, 0, n), gate, described, chosen, over_all, divided, pairs, dtype), own, activation


@contextlib.contextmanager
def noted(routers: list[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """The experts that each router, called in this order, chooses meanwhile in this thread: int64 (tokens * chosen,)
    each."""
    chosen: list[torch.Tensor] = []
    thread = threading.get_ident()

    def note(module: nn.Module, args: tuple, out: tuple) -> None:
        if threading.get_ident() == thread:
            chosen.append(out[2].reshape(-1))

    handles = [router.register_forward_hook(note) for router in routers]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()


def _expert(build: _Builder, experts: nn.Module, number: int, pairs: bool) -> tuple:
    first, down = experts.gate_up_proj.layer(number), experts.down_proj.layer(number)
    biases = (experts.gate_up_proj_bias[number], experts.down_proj_bias[number]) if experts.has_bias else (None, None)
    layer, total = build.linear(first, biases[0])
    last, hidden = build.linear(down, biases[1])
    inner = total // 2
    ends = (None, (layer, 0, total)) if pairs else ((layer, 0, inner), (layer, inner, inner))
    return *ends, (last, 0, hidden)


def _activation_of(build: _Builder, experts: nn.Module) -> Any:
    """What experts make of a gate and an up, which is all they compute between their products."""
    if not experts.has_gate or experts.has_post_expert_norm:
        raise refuse("experts without a gate, or with norms of their own")
    x = torch.linspace(-9, 9, 128).to(build.dtype)[None]
    gate, up = x.chunk(2, -1) if experts.is_concatenated else (x[:, ::2], x[:, 1::2])
    if hasattr(experts, "act_fn"):
        activation = experts.act_fn
        if isinstance(activation, nn.Module):
            build.watch.module(activation)
        expected = activation(gate) * up
    else:
        for name in ("alpha", "limit"):
            build.watch.attribute(experts, name)
        activation = Clamped(float(experts.alpha), torch.tensor(experts.limit).to(build.dtype).item())
        expected = activation(gate, up)
    with torch.no_grad():
        if not torch.equal(experts._apply_gate(x), expected):
            raise refuse(f"{type(experts).__name__} with a gate of its own")
    return activation


def _choice(router: nn.Module, hidden: int, dtype: torch.dtype) -> tuple[int, bool, bool, int]:
    """How a router makes logits a choice, for the core: (chosen, over_all, divided, dtype of the weights)."""
    weight, bias = router.weight, getattr(router, "bias", None)
    if weight.dtype is not dtype or weight.ndim != 2 or weight.shape[1] != hidden or weight.device.type != "cpu":
        raise refuse(f"a router of {weight.dtype}, {tuple(weight.shape)}, in a model of {dtype}")
    x = torch.randn(_ASKED, hidden, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        logits, weights, experts = router(x)
        own = nn.functional.linear(x, weight, bias)
    name = type(router).__name__
    if not torch.equal(logits, own) or weights.shape != experts.shape or weights.dtype not in DTYPES:
        raise refuse(f"{name} computes logits or weights of its own")
    chosen, number = experts.shape[1], DTYPES[weights.dtype]
    if not _as_torch_chooses(weight.shape[0], chosen):
        raise refuse("torch.topk, which takes others among equal numbers than the core does")
    misses = {}
    for way in ((True, False), (True, True), (False, False)):
        taken, given = _routed(logits.float(), chosen, *way, number)
        if torch.equal(taken.sort().values, experts.sort().values):
            misses[way] = (given - weights.float()).abs().max().item()
    way = min(misses, key=misses.__getitem__, default=None)
    if way is None or not misses[way] <= 4 * torch.finfo(weights.dtype).eps:
        raise refuse(f"{name} chooses by a rule of its own")
    return chosen, *way, number


def _routed(logits: torch.Tensor, chosen: int, over_all: bool, divided: bool, dtype: int) -> tuple:
    """(experts, weights) as the core chooses them."""
    experts = torch.empty(len(logits), chosen, dtype=torch.int64)
    weights = torch.empty(len(logits), chosen)
    _core.route(logits, experts, weights, over_all, divided, dtype)
    return experts, weights


@functools.cache
def _as_torch_chooses(n: int, chosen: int) -> bool:
    """Whether torch takes the same ones as the core where many are equal, which its build decides."""
    generator = torch.Generator().manual_seed(0)
    for distinct in (2, n // 2 + 2, n + 2):
        x = torch.randint(0, distinct, (_ASKED, n), generator=generator).float()
        if not torch.equal(_routed(x, chosen, False, False, 0)[0].sort().values, x.topk(chosen).indices.sort().values):
            return False
    return True
