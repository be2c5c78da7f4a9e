"""Rounding and ranges of one block's layers trained together on the output of the block (arXiv 2309.05516)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from bitween.model.blocks import BlockRunner, Context, Layer
from bitween.quantized_tensor import QuantizedTensor
from bitween.rounding.signround import STEPS, TrainedRounding

__all__ = ["train_block"]


def train_block(
    runner: BlockRunner,
    i: int,
    layers: Mapping[str, tuple[Layer, torch.Tensor, QuantizedTensor]],
    batches: Sequence[tuple[torch.Tensor, Context]],
    targets: Sequence[torch.Tensor],
    *,
    steps: int = STEPS,
) -> tuple[dict[str, QuantizedTensor], float, float]:
    """Train layers of block `i` together so that its output comes close to `targets`.

    Parameters
    ----------
    layers : {name: (layer, weight that was rounded (rows, cols), quantization so far)}
    batches : hidden states that enter the block, with their contexts; each step takes one, in turn
    targets : what should leave the block, one a batch
    steps : gradient steps; the pace falls from 1/steps to 0

    Returns
    -------
    {name: QuantizedTensor}, mean squared output error before, and after
        After is never larger: a state is kept only if it does better on all batches.
    """
    rounding = {name: TrainedRounding(weight, start) for name, (_, weight, start) in layers.items()}

    def loss(k: int, grad: bool) -> torch.Tensor:
        with torch.set_grad_enabled(grad):
            weights = {layers[name][0]: r.values() for name, r in rounding.items()}
            with _computing_with(weights):
                out = runner.run_block(i, batches[k][0], batches[k][1], grad=grad)
            return (out.float() - targets[k].float()).square().mean()

    def measure() -> float:
        return sum(loss(k, False).item() for k in range(len(batches))) / len(batches)

    before = least = measure()
    best = {name: r.state() for name, r in rounding.items()}
    checks = {max(1, steps * part // 4) for part in (2, 3, 4)}
    with torch.enable_grad():
        for k in range(steps):
            error = loss(k % len(batches), True)
            if error.isfinite():  # what a broken step says about the gradient would spoil every later one
                error.backward()
                for r in rounding.values():
                    r.step((1 - k / steps) / steps)
            if k + 1 in checks and (now := measure()) < least:
                least, best = now, {name: r.state() for name, r in rounding.items()}
    if least < before:
        for name, r in rounding.items():
            r.load(best[name])
        return {name: r.quantized() for name, r in rounding.items()}, before, least
    return {name: start for name, (_, _, start) in layers.items()}, before, before


@contextmanager
def _computing_with(weights: Mapping[Layer, torch.Tensor]) -> Iterator[None]:
    """Let modules compute with tensors that are no Parameters, so that gradients pass through them."""
    kept: list[tuple[Any, torch.nn.Parameter]] = []
    try:
        for layer, values in weights.items():
            kept.append((layer.module, layer.module._parameters.pop("weight")))
            layer.module.weight = values.T if layer.kind == "conv1d" else values
        yield
    finally:
        for module, parameter in kept:
            module.__dict__.pop("weight", None)
            module._parameters["weight"] = parameter
