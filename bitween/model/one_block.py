"""A model that hidden states alone do not carry from block to block, run as one block: embedding to head.

Some models hand more than hidden states from block to block (several streams, per-layer inputs, keys of earlier
layers), run a block twice, or leave blocks out for plain text. Their own forward pass is still exact: it runs with
other numbers in place of the word embedding's output, and ends where the head is entered. Everything between the two
counts as one block, which costs more time where layers are rounded one after the other, and is never wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import nn

from bitween.model.replay import Call, Replay, Stop, _put_back, logits_of

__all__ = ["OneBlockReplay"]


class OneBlockReplay(Replay):
    """`Replay` of the one block that reaches from the module `embedding_name` to the module `head_name`."""

    def __init__(self, model: nn.Module, embedding_name: str, head_name: str):
        super().__init__(model, [""], head_name)
        self._embedding_name = embedding_name

    def block(self, i: int) -> Callable:
        """The function (ids, inputs, hidden) -> what enters the head; `i` is 0."""
        return self._between

    def walk(self, ids: torch.Tensor, on_block: Callable, **inputs):
        """Run the model up to its embedding's output, then `on_block(0, call, hidden) -> what enters the head`."""
        found: list[torch.Tensor] = []

        def stop(_module, _args, out):
            found.append(out)
            raise Stop

        handle = self._embedding.register_forward_hook(stop)
        try:
            self.model(ids, **inputs)
        except Stop:
            pass
        finally:
            handle.remove()
        if not found:
            raise ValueError(f"model: expected {self._embedding_name} to be called; the forward pass did not")
        try:
            on_block(0, Call((ids, inputs, None), {}, 2), found[0])
        except Stop:
            return None

    def to_head(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` itself: the block ends where the head is entered."""
        return hidden

    def after_head(self, ids: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
        """The logits the model returns when its head returns `raw`."""
        head = self.head
        with ExitStack() as undo:
            undo.callback(_put_back(head, "forward"))
            head.forward = lambda _: raw
            return logits_of(self.model(ids))

    def find_tail(self, ids: torch.Tensor) -> list[nn.Module]:
        """None: what follows the last block of the model belongs to the one block."""
        return []

    @property
    def _embedding(self) -> nn.Module:
        return self.model.get_submodule(self._embedding_name)

    def _between(self, ids: torch.Tensor, inputs: dict, hidden: torch.Tensor) -> torch.Tensor:
        found: list[torch.Tensor] = []

        def enter(_module, args, kwargs):
            found.append(args[0] if args else next(iter(kwargs.values())))
            raise Stop

        calls = iter(range(1 << 30))
        embedding = self._embedding
        own = embedding.forward
        with ExitStack() as undo:
            given = {"forward": lambda *args, **kwargs: hidden if next(calls) == 0 else own(*args, **kwargs)}
            for name, value in {**given, "_forward_pre_hooks": {}, "_forward_hooks": {}}.items():
                undo.callback(_put_back(embedding, name))
                setattr(embedding, name, value)
            undo.callback(self.head.register_forward_pre_hook(enter, with_kwargs=True).remove)
            try:
                self.model(ids, **inputs)
            except Stop:
                return found[0]
        raise ValueError(f"model: expected its head {self._head_name} to be called; the forward pass did not")
