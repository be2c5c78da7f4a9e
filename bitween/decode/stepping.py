"""One step of a decoder by the core, beside transformers' own forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from bitween import _core
from bitween._threads import follow_torch
from bitween.decode.cache import rooms_of
from bitween.decode.recognising import Recognised

__all__ = ["CACHE_NAME", "ReadyStep", "Step", "read_step", "ready_step"]

_FIELDS = BaseModelOutputWithPast.__dataclass_fields__
CACHE_NAME = "cache" if "cache" in _FIELDS else "past_key_values"  # newer transformers call it cache
_TAKEN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache", "past_key_values", "use_cache"}
_TAKEN |= {"cache_position", "return_dict"}
_OFF = {"output_attentions", "output_hidden_states", "output_router_logits"}
_TABLE = 512  # positions at once
_LONGEST_TABLE = 1 << 18


class Step:
    """The arguments of a forward pass that is a step: a few tokens after those in a cache."""

    __slots__ = ("batch", "cache", "embeds", "ids", "mask", "new", "positions", "seen")

    def __init__(self, tokens: torch.Tensor, kwargs: dict[str, Any], cache: DynamicCache, seen: int) -> None:
        self.batch, self.new = tokens.shape[:2]
        self.ids, self.embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        self.cache, self.seen = cache, seen
        self.mask, self.positions = kwargs.get("attention_mask"), kwargs.get("position_ids")


def read_step(args: tuple, kwargs: dict[str, Any]) -> Step | None:
    """The step that a call asks for, or None where it asks for something else."""
    if args:
        return None
    cache = kwargs.get("cache")
    if cache is None:
        cache = kwargs.get("past_key_values")
    if type(cache) is not DynamicCache or kwargs.get("use_cache") is False or kwargs.get("return_dict") is False:
        return None
    tokens, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    if (tokens is None) is (embeds is None):
        return None
    tokens = embeds if tokens is None else tokens
    if not isinstance(tokens, torch.Tensor) or tokens.ndim not in (2, 3) or tokens.device.type != "cpu":
        return None
    batch, new = tokens.shape[:2]
    if not 0 < batch * new <= _core.FEW_TOKENS:
        return None
    for name, value in kwargs.items():
        if name not in _TAKEN and value is not None and not (name in _OFF and value is False):
            return None
    seen = cache.get_seq_length()
    return Step(tokens, kwargs, cache, seen) if seen else None


def _padding(step: Step) -> torch.Tensor | bool | None:
    """How many tokens at the start of each sequence nobody sees; None where there are none, False for other masks."""
    mask = step.mask
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or tuple(mask.shape) != (step.batch, step.seen + step.new):
        return False
    if mask.dtype not in (torch.int64, torch.int32, torch.bool) or mask.device.type != "cpu":
        return False
    if mask.dtype is not torch.bool:
        mask = mask != 0
    if bool(mask.all()):
        return None
    padding = mask.shape[1] - mask.sum(1)
    expected = torch.arange(mask.shape[1])[None] >= padding[:, None]
    if not torch.equal(mask, expected) or bool((padding > step.seen).any()):
        return False
    return padding


class _Tables:
    """Cosines and sines of positions, computed by the decoder's own rotary embedding."""

    def __init__(self, known: Recognised) -> None:
        self.known = known
        self.kept: list[tuple[torch.Tensor, torch.Tensor, bool]] = []

    def at(self, base: nn.Module, positions: torch.Tensor, like: torch.Tensor) -> tuple | None:
        """For the core; positions (batch or 1, new). None for positions below 0."""
        first = int(positions.min()) if positions.numel() > 1 else int(positions)
        last = int(positions.max()) if positions.numel() > 1 else first
        if first < 0:
            return None
        if not self.known.steady or last >= _LONGEST_TABLE:
            return tuple(self._compute(base, positions, like))
        if not self.kept or last >= self.kept[0][0].shape[0]:
            length = (last // _TABLE + 1) * _TABLE
            self.kept = self._compute(base, torch.arange(length)[None], like)
        if positions.numel() == 1:
            return tuple((c[first : first + 1], s[first : first + 1], steps) for c, s, steps in self.kept)
        flat = positions.reshape(-1)
        return tuple((c[flat], s[flat], steps) for c, s, steps in self.kept)

    def _compute(self, base: nn.Module, positions: torch.Tensor, like: torch.Tensor) -> list:
        made = []
        for kind in self.known.ropes:
            cosine, sine = base.rotary_emb(like, positions, *(() if kind is None else (kind,)))
            if self.known.family.halves:
                cosine, sine = torch.cat([cosine, cosine], -1), torch.cat([sine, sine], -1)
            steps = cosine.dtype is like.dtype and cosine.dtype is not torch.float32
            width = cosine.shape[-1]
            made.append((cosine.reshape(-1, width).float(), sine.reshape(-1, width).float(), steps))
        return made


class ReadyStep:
    """A step whose arguments fit, beside the rooms of its cache, which it does not advance."""

    __slots__ = ("core", "padding", "rooms", "ropes", "x")

    def __init__(self, core: Any, x: torch.Tensor, ropes: tuple, rooms: Any, padding: torch.Tensor | None) -> None:
        self.core, self.x, self.ropes, self.rooms, self.padding = core, x.contiguous(), ropes, rooms, padding

    def run(self, experts: torch.Tensor | None = None) -> torch.Tensor:
        """What the final norm gives, (batch, new, hidden); `experts` are chosen where they are given, int64 (tokens,
        chosen) of each block that has any, flat."""
        follow_torch()
        out = torch.empty_like(self.x)
        _core.decode(self.core, self.x, out, self.ropes, self.rooms.described(), self.padding, experts)
        return out


def ready_step(base: nn.Module, known: Recognised, tables: _Tables, step: Step) -> ReadyStep | None:
    """The step, ready to be run; None where the cache or the mask is not for the core."""
    padding = _padding(step)
    if padding is False:
        return None
    positions = step.positions
    if positions is None:
        positions = torch.arange(step.seen, step.seen + step.new)[None]
    elif positions.ndim != 2 or positions.shape[1] != step.new or positions.shape[0] not in (1, step.batch):
        return None
    if positions.shape[0] != step.batch:
        positions = positions.expand(step.batch, step.new)
    x = base.embed_tokens(step.ids) if step.embeds is None else step.embeds
    if known.family.embedding_scale is not None:
        x = x * getattr(base, known.family.embedding_scale)
    if x.dtype is not known.dtype or x.ndim != 3:
        return None
    ropes = tables.at(base, positions, x)
    rooms = None if ropes is None else rooms_of(step.cache, known, step.batch)
    if rooms is None:
        return None
    for room in rooms.rooms:
        room.make_space(step.new)
    return ReadyStep(known.core, x, ropes, rooms, padding)
