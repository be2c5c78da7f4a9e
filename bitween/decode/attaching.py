"""A decoder's forward with a way through the core, given to one model and not to its class.

The model's class becomes a subclass of its own name whose forward takes steps by the core and everything else by
transformers. What was recognised stands with the model, and is left behind when the model is copied or pickled: a copy
is recognised by itself.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeModelOutputWithPast

from bitween.decode.cache import is_taken_over
from bitween.decode.families import family_of
from bitween.decode.mixtures import noted
from bitween.decode.recognising import Recognised, recognise
from bitween.decode.refusing import UnrecognisedError
from bitween.decode.stepping import CACHE_NAME, ReadyStep, _Tables, read_step, ready_step
from bitween.decode.watching import outputs_are_collected

__all__ = ["ALLOWED", "attach", "detach", "path_of"]

_STATE = "_bitween_decoding"
_CHECKED = 2  # steps of a model that are computed both ways
# Largest root mean square difference of the last hidden state, relative to its own. What differs between the two ways
# is the order of sums, by which a rounded number may fall to its neighbour (2^-24, 2^-11, 2^-8 of it) and an activation
# to the next whole number of 16 bits.
ALLOWED = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}


class _State:
    """What is known of one decoder.

    Attributes
    ----------
    owner : id of the module that was recognised
    known : Recognised, or None
    reason : why it is not
    checked : steps that were computed both ways
    """

    def __init__(self, owner: nn.Module, known: Recognised | None, reason: str | None) -> None:
        self.owner, self.known, self.reason = id(owner), known, reason
        self.checked = 0
        self.tables = None if known is None else _Tables(known)
        self.lock = threading.Lock()

    @classmethod
    def of(cls, base: nn.Module, original: type[nn.Module]) -> _State:
        try:
            return cls(base, recognise(base, original), None)
        except UnrecognisedError as error:
            return cls(base, None, str(error))


def _state(base: nn.Module, fully: bool = True) -> _State:
    """The state of a decoder, recognised (again) where it is new or changed; `fully` as in Watch.unchanged."""
    state = base.__dict__.get(_STATE)
    if state is None or state.owner != id(base) or (state.known is not None and not state.known.watch.unchanged(fully)):
        state = _State.of(base, type(base)._bitween_original)
        object.__setattr__(base, _STATE, state)
    return state


def _by_core(base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> BaseModelOutputWithPast | None:
    """A forward pass by the core, or None where it is transformers' to do."""
    step = read_step(args, kwargs)
    if step is None or outputs_are_collected():
        return None
    if base.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    settings = base.config.__dict__
    if settings.get("output_hidden_states") or settings.get("output_attentions") or settings.get("_output_attentions"):
        return None
    if settings.get("output_router_logits") and kwargs.get("output_router_logits") is not False:
        return None
    if settings.get("use_cache") is False and kwargs.get("use_cache") is None:
        return None
    state = _state(base, fully=not is_taken_over(step.cache))
    if state.known is None:
        return None
    ready = ready_step(base, state.known, state.tables, step)
    if ready is None:
        return None
    if state.checked < _CHECKED:
        return _compare(base, state, ready, kwargs)
    out = ready.run()
    for room in ready.rooms.rooms:
        room.advance(step.new)
    kind = BaseModelOutputWithPast if state.known.family.router is None else MoeModelOutputWithPast
    return kind(last_hidden_state=out, **{CACHE_NAME: step.cache})


def _compare(base: nn.Module, state: _State, ready: ReadyStep, kwargs: dict[str, Any]) -> Any:
    """The step by transformers, whose result it is; the core's is compared with it.

    The core is given the experts that transformers chose: between two that are equal but for rounding either choice is
    right, and the results are far apart.
    """
    with noted(state.known.routers) as chosen:
        theirs = type(base)._bitween_original.forward(base, **kwargs)
    out = ready.run(torch.cat(chosen) if chosen else None)
    expected = theirs.last_hidden_state.float()
    scale = expected.pow(2).mean().sqrt().item()
    miss = (out.float() - expected).pow(2).mean().sqrt().item()
    if torch.isfinite(expected).all():
        state.checked += 1
        if not miss <= ALLOWED[state.known.dtype] * scale:
            state.known = None
            state.reason = f"the core's result differs from the model's own by {miss / max(scale, 1e-30):.2g} of it"
    return theirs


@functools.cache
def _decoding_class(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a decoder's class, under the same name."""

    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            done = _by_core(self, args, kwargs)
            if done is not None:
                return done
        return original.forward(self, *args, **kwargs)

    def __reduce_ex__(self, protocol):
        state = {name: value for name, value in self.__dict__.items() if name != _STATE}
        return _new, (original,), state

    names = {"forward": forward, "__reduce_ex__": __reduce_ex__, "_bitween_original": original}
    names |= {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original)(original.__name__, (original,), names)


def _new(original: type[nn.Module]) -> nn.Module:
    kind = _decoding_class(original)
    return kind.__new__(kind)


def decoder_of(model: nn.Module) -> nn.Module | None:
    """The decoder inside a model whose family is known; None where there is none, or more than one."""
    found = [m for m in model.modules() if family_of(getattr(type(m), "_bitween_original", type(m))) is not None]
    return found[0] if len(found) == 1 else None


def attach(model: nn.Module) -> nn.Module:
    """Let a model's decoder take its steps by the core where that computes the same; returns the model.

    Any module may be given: one without a decoder of a known family is left as it is.
    """
    base = decoder_of(model)
    if base is not None and not hasattr(type(base), "_bitween_original"):
        base.__class__ = _decoding_class(type(base))
    return model


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach`; returns the model."""
    base = decoder_of(model)
    if base is not None and hasattr(type(base), "_bitween_original"):
        base.__class__ = type(base)._bitween_original
        with contextlib.suppress(KeyError):
            del base.__dict__[_STATE]
    return model


def path_of(model: nn.Module) -> dict[str, Any]:
    """Which path a model's steps take: {"path": "core" or "transformers", "reason": text or None, "checked": steps that
    were computed both ways, 0 where the path has not been taken yet}."""
    base = decoder_of(model)
    if base is None:
        return {"path": "transformers", "reason": "no decoder of a known family", "checked": 0}
    if not hasattr(type(base), "_bitween_original"):
        return {"path": "transformers", "reason": "not attached", "checked": 0}
    state = _state(base)
    return {"path": "transformers" if state.known is None else "core", "reason": state.reason, "checked": state.checked}
