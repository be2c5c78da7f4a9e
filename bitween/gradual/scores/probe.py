"""Trials on cached block inputs: what happens to the output when a few weights change for a moment.

The hidden states that enter each block are kept for a few windows. A trial changes weights of one block, runs
the model from that block on, and compares the outputs with the untouched model's at every few positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import bitween
from bitween._progress import Progress, no_progress
from bitween.gradual.utils import replaced_weights
from bitween.model import blocks
from bitween.realise.context import RunContext
from bitween.scheme import Scheme

__all__ = ["Probe", "Unit", "block_units", "layer_units", "rounded_weight"]


@dataclass(frozen=True)
class Unit:
    """Layers that a trial changes together, all of block number `block`."""

    name: str
    block: int
    layers: tuple[blocks.Layer, ...]


def block_units(layout: blocks.ModelLayout) -> list[Unit]:
    """Every block as one unit."""
    return [Unit(block.name, i, block.layers) for i, block in enumerate(layout.blocks) if block.layers]


def layer_units(layout: blocks.ModelLayout) -> list[Unit]:
    """Every layer of the blocks as a unit of its own."""
    return [Unit(layer.name, i, (layer,)) for i, block in enumerate(layout.blocks) for layer in block.layers]


class Probe:
    """Cached hidden states of a few calibration windows, and trials on them.

    Parameters
    ----------
    context : RunContext
    windows : how many calibration windows
    length : tokens of each, at most
    stride : every stride-th position is scored
    """

    def __init__(self, context: RunContext, *, windows: int = 4, length: int = 256, stride: int = 4):
        self.context = context
        self.seed = context.seed
        self.progress: Progress = no_progress
        ids = context.text.calibration.ids[:windows, :length]
        self.runner = context.runner
        self.stride = stride
        self.tokens = ids.numel()
        self.states: list[torch.Tensor] = []  # the input of each block, then the last block's output
        with self.runner:
            hidden, self.call = self.runner.embed(ids)
            for i in range(len(context.layout.blocks)):
                self.states.append(context.spill.keep(hidden))
                hidden = self.runner.run_block(i, self.states[-1], self.call)
            self.states.append(hidden)
            self.final = self._scored(hidden)
            self.base = context.reference_logits(self.final)

    def damage(self, weights: dict[torch.nn.Module, torch.Tensor], block: int, states: Sequence | None = None) -> float:
        """KL in nats per token when modules of `block` or later ones compute with other weights; inf on overflow.

        states : block inputs to start from; default the untouched model's
        """
        with self.runner, replaced_weights(weights):
            return self.divergence(self.run(block, (states or self.states)[block]))

    def run(self, block: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after the last block, from those that enter `block`."""
        for i in range(block, len(self.context.layout.blocks)):
            hidden = self.runner.run_block(i, hidden, self.call)
        return hidden

    def divergence(self, hidden: torch.Tensor) -> float:
        """Mean KL of the untouched model's output against that of last hidden states, over scored positions."""
        with self.runner:
            final = self._scored(hidden)
            if not torch.isfinite(final).all():
                return math.inf
            if self.runner.plain_logits:
                logits = self.base + self.runner.logits(final - self.final).float()
                if (bias := getattr(self.context.layout.head.module, "bias", None)) is not None:
                    logits -= bias.detach().float()
            else:
                logits = self.runner.logits(final, products="fp32").float()
        return bitween.mean(bitween.kl_divergence(self.base, logits))

    def rounded(self, layers: Sequence[blocks.Layer], scheme: Scheme) -> dict[torch.nn.Module, torch.Tensor]:
        """Weights rounded to nearest and back, for `damage`."""
        return {layer.module: rounded_weight(layer, scheme) for layer in layers}

    def each(self, stage: str, units: Sequence[Unit], trial: Callable[[Unit], float]) -> dict[str, float]:
        """Run one trial per unit, with progress."""
        found = {}
        for i, unit in enumerate(units):
            found[unit.name] = trial(unit)
            self.progress(stage, i + 1, len(units), f"{unit.name}: {found[unit.name]:.4g} nats")
        return found

    def _scored(self, hidden: torch.Tensor) -> torch.Tensor:
        final = self.runner.final(hidden).float()
        return final[:, self.stride - 1 :: self.stride].reshape(-1, final.shape[-1])


def rounded_weight(layer: blocks.Layer, scheme: Scheme) -> torch.Tensor:
    """The layer's weight rounded to nearest, in the module's own shape and dtype."""
    weight = layer.weight
    return layer.as_weight(bitween.quantize(weight, scheme).dequantize(weight.dtype))
