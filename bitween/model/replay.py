"""A model's own forward pass with other work in place of its blocks.

The model calls its blocks in a loop of its own, after embedding the tokens and before its head. With
the blocks' work taken out, that loop tells what each block is given, and carries hidden states
computed elsewhere through everything around the blocks, exactly as the model would.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

# What a config may ask for beside logits. Collecting it costs memory, and changes how a model calls its blocks.
_EXTRA_OUTPUTS = ("use_cache", "output_hidden_states", "output_attentions", "output_router_logits")


@dataclass(frozen=True)
class Call:
    """Arguments of one block, without the hidden states, whose place is `slot`."""

    args: tuple
    kwargs: dict
    slot: int | str

    def arguments(self, hidden: torch.Tensor) -> tuple[list, dict]:
        """Positional and keyword arguments with `hidden` in its place."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.slot, int):
            args[self.slot] = hidden
        else:
            kwargs[self.slot] = hidden
        return args, kwargs

    def sharing(self, known: "Call", memo: dict) -> "Call":
        """The same call, holding `known`'s tensors wherever its own are equal to them."""
        return Call(_share(self.args, known.args, memo), _share(self.kwargs, known.kwargs, memo), self.slot)


class Stop(Exception):
    """Ends a forward pass whose remaining work is not needed."""


@contextmanager
def settled(model: nn.Module) -> Iterator[None]:
    """Hold a model in evaluation mode, without a cache and with logits as its only output.

    On exit its modes, configs and the RNG are as before.
    """
    training = [(module, module.training) for module in model.modules()]
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    flags = [(c, name, getattr(c, name)) for c in configs for name in _EXTRA_OUTPUTS if getattr(c, name, None)]
    rng = torch.get_rng_state()
    try:
        for module, _ in training:
            module.training = False
        for config, name, _ in flags:
            setattr(config, name, False)
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for config, name, flag in flags:
            setattr(config, name, flag)
        torch.set_rng_state(rng)


class Replay:
    """Runs `model` with stand-ins for the blocks and the head of these names."""

    def __init__(self, model: nn.Module, block_names: list[str], head_name: str):
        self.model = model
        self._block_names, self._head_name = block_names, head_name
        self._wraps: dict[type, Callable] = {}  # class of block -> the form in which it returns hidden states

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks that the model holds now; layers may have been exchanged since the names were found."""
        return [self.block(i) for i in range(len(self._block_names))]

    def block(self, i: int) -> nn.Module:
        """Block `i` as the model holds it now."""
        return self.model.get_submodule(self._block_names[i])

    @property
    def head(self) -> nn.Module:
        """The head that the model holds now."""
        return self.model.get_submodule(self._head_name)

    def walk(self, ids: torch.Tensor, on_block: Callable, **inputs):
        """Run the model with `on_block(i, call, hidden) -> hidden` in place of every block.

        Returns the model's output, or None if `Stop` was raised on the way. The first block of each
        class is run once, to learn the form in which it returns its result.

        Raises
        ------
        ValueError
            The model calls its blocks out of order or changes the hidden states between them.
        """
        blocks = self.blocks
        turn = iter(range(len(blocks) + 1))
        previous: list[torch.Tensor] = []

        def stand_in(block: nn.Module, own_forward: Callable) -> Callable:
            def forward(*args, **kwargs):
                i = next(turn)
                if i >= len(blocks) or blocks[i] is not block:
                    raise ValueError(f"model: expected its blocks to run in order; got another one as number {i}")
                call, hidden = _split(args, kwargs)
                if previous and not _same(previous[0], hidden):
                    raise ValueError(f"model: cannot run block by block, it changes hidden states before block {i}")
                if type(block) not in self._wraps:
                    self._wraps[type(block)] = _wrapping(own_forward(*args, **kwargs))
                previous[:] = [on_block(i, call, hidden)]
                return self._wraps[type(block)](previous[0])

            return forward

        with ExitStack() as undo:
            for block in dict.fromkeys(blocks):
                stand = {"forward": stand_in(block, block.forward), "_forward_pre_hooks": {}, "_forward_hooks": {}}
                for name, value in stand.items():  # hooks on a block belong to its work, so they rest too
                    undo.callback(_put_back(block, name))
                    setattr(block, name, value)
            try:
                return self.model(ids, **inputs)
            except Stop:
                return None

    def to_head(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What enters the head when the last block returns `hidden`; `ids` has the same batch and length."""
        found: list[torch.Tensor] = []

        def stop(_module, args):
            found.append(args[0])
            raise Stop

        last = len(self._block_names) - 1
        handle = self.head.register_forward_pre_hook(stop)
        try:
            self.walk(ids, lambda i, _call, x: hidden if i == last else x)
        finally:
            handle.remove()
        return found[0]

    def after_head(self, ids: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
        """The logits the model returns when its head returns `raw`."""
        head = self.head
        with ExitStack() as undo:
            undo.callback(_put_back(head, "forward"))
            head.forward = lambda _: raw
            return logits_of(self.walk(ids, lambda _i, _call, x: x))

    def find_tail(self, ids: torch.Tensor) -> list[nn.Module]:
        """Outermost modules called after the last block and before the head."""
        head = self.head
        inside = {m for block in self.blocks for m in block.modules()}
        around = [m for m in self.model.modules() if not any(inner in inside for inner in m.modules())]
        tail: list[nn.Module] = []
        running: list[nn.Module] = []
        done: list[int] = []

        def enter(module, _args):
            if module is head:
                raise Stop
            if done and not running:
                tail.append(module)
            running.append(module)

        def leave(module, _args, _out):
            running.remove(module)

        def on_block(i, _call, hidden):
            if i == len(self._block_names) - 1:
                done.append(i)
            return hidden

        with ExitStack() as hooks:
            for module in around:
                hooks.callback(module.register_forward_pre_hook(enter).remove)
                hooks.callback(module.register_forward_hook(leave).remove)
            self.walk(ids, on_block)
        return tail


def logits_of(out) -> torch.Tensor:
    """Logits in a model's output, whether it is an object or a tuple."""
    return out[0] if isinstance(out, tuple) else out.logits


def hidden_of(out) -> torch.Tensor:
    """Hidden states in a block's output, alone or first of a tuple."""
    return out[0] if isinstance(out, (tuple, list)) else out


def _wrapping(out) -> Callable:
    """A function that returns hidden states in the form in which a block returned `out`."""
    if isinstance(out, (tuple, list)):
        rest, form = tuple(out[1:]), type(out)
        return lambda hidden: form((hidden, *rest))
    return lambda hidden: hidden


def _split(args: tuple, kwargs: dict) -> tuple[Call, torch.Tensor]:
    """Take the hidden states, the first floating-point tensor with three dimensions, out of a block's arguments."""
    for slot, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim == 3:
            if isinstance(slot, int):
                return Call((*args[:slot], None, *args[slot + 1 :]), kwargs, slot), value
            return Call(args, {**kwargs, slot: None}, slot), value
    raise ValueError("model: expected blocks that take hidden states (batch, length, width); found none in a call")


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _share(new, known, memo: dict):
    """`new` with `known`'s tensors where equal; inner dictionaries, which blocks may write to, stay as they are."""
    if isinstance(new, torch.Tensor):
        pair = id(new), id(known)
        if pair not in memo:
            memo[pair] = isinstance(known, torch.Tensor) and new.dtype == known.dtype and torch.equal(new, known)
        return known if memo[pair] else new
    if type(new) is tuple and isinstance(known, tuple) and len(new) == len(known):
        return tuple(_share(a, b, memo) for a, b in zip(new, known, strict=True))
    if isinstance(new, dict) and isinstance(known, dict):
        return {k: v if isinstance(v, dict) else _share(v, known.get(k), memo) for k, v in new.items()}
    return new


def _put_back(module: nn.Module, name: str) -> Callable:
    """A callback that restores an attribute of this very object, or its absence."""
    if name in module.__dict__:
        value = module.__dict__[name]
        return lambda: setattr(module, name, value)
    return lambda: module.__dict__.pop(name, None)
