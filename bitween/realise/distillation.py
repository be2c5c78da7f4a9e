"""Distillation: what quantization moved, the few numbers that stay in full precision move back.

Two kinds of numbers are trained on KL(original || quantized) over calibration text, end to end, while all codes stay:
a factor for each output row of a quantized layer, which multiplies the row's stored scales, and the gains of the norms.
Neither costs a byte, and no gradient of a weight matrix is ever needed, so a step costs two thirds of a training step.
(Tuning norms alone: Norm Tweaking, arXiv 2309.02784; tuning scales end to end: EfficientQAT, arXiv 2407.11062.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from bitween.model.blocks import BlockRunner, Layer
from bitween.model.head import position_blocks
from bitween.quantized_tensor import QuantizedTensor

__all__ = ["Correction", "distill", "rescaled"]

# Adam's pace, relative (factors and gains are near 1). What has to be corrected grows like the square root of the
# damage: 2e-3 is best at 3 bits (.37 nats) and makes 5 bits (.02) worse, where 2.5e-4 still helps.
_PACE, _FASTEST = 3.4e-3, 2e-3
_WARM_UP = 4  # steps
_LARGEST = 1.5  # of a factor, and its inverse


@dataclass(frozen=True, eq=False)
class Correction:
    """What was learned.

    Attributes
    ----------
    rows : {layer name: float32 (rows,)}, factors of the stored scales
    gains : {module name: float32, shape of the module's weight}, new gains of norms
    losses : nats per token of each step, before it
    """

    rows: dict[str, torch.Tensor]
    gains: dict[str, torch.Tensor]
    losses: tuple[float, ...] = ()


def rescaled(tensor: QuantizedTensor, factors: torch.Tensor) -> QuantizedTensor:
    """A stored matrix whose rows are multiplied by factors > 0, as near as fp16 scales allow."""
    scales = np.asarray(tensor.scales).astype(np.float32) * factors.detach().numpy()[:, None]
    scales = np.clip(scales, np.float32(2.0**-24), np.float32(65504)).astype(np.float16)
    return QuantizedTensor(tensor.codes, scales, tensor.zeros, tensor.scheme, tensor.shape)


def distill(
    runner: BlockRunner,
    layers: Sequence[Layer],
    windows: torch.Tensor,
    reference: Callable[[int], tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]],
    *,
    steps: int,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> Correction:
    """Learn row factors and norm gains; the model is as it was afterwards.

    Parameters
    ----------
    runner : of the quantized model, its layers computing with plain numbers
    layers : quantized ones; those with a bias get no factor, which would have to reach the bias too
    windows : int64 (n, length); one is taken each step, in turn
    reference : window index -> (final states (length, width) of the original model, function from rows of final states
        to its logits)
    steps : of Adam (arXiv 1412.6980)
    progress : called with the number of steps done and the last loss in nats per token
    """
    model = runner.model
    rows = {x.name: torch.ones(x.shape[0], requires_grad=True) for x in layers if _has_no_bias(x)}
    norms = {name: module for name, module in model.named_modules() if _is_norm(module)}
    gains = {name: module.weight.detach().float().clone().requires_grad_() for name, module in norms.items()}
    optimizer = torch.optim.Adam([*rows.values(), *gains.values()], lr=1.0, betas=(0.9, 0.95))
    losses: list[float] = []
    with ExitStack() as undo, runner:
        for layer in layers:
            if layer.name in rows:
                handle = layer.module.register_forward_hook(_times(rows[layer.name]))
                undo.callback(handle.remove)
        for name, module in norms.items():
            undo.callback(module._parameters.__setitem__, "weight", module._parameters.pop("weight"))
            undo.callback(module.__dict__.pop, "weight")
            module.__dict__["weight"] = gains[name]
        for k in range(steps):
            window = windows[k % len(windows)], *reference(k % len(windows))
            losses.append(_backward(runner, *window, [*rows.values(), *gains.values()]))
            for group in optimizer.param_groups:
                group["lr"] = _pace(losses[0]) * min(1, (k + 1) / _WARM_UP) * (1 - k / steps)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for factors in rows.values():
                    factors.clamp_(1 / _LARGEST, _LARGEST)
            progress(k + 1, losses[-1])
    # Rounded so that a model in any 16-bit dtype holds the very gains that were measured.
    rounded = {name: gain.detach().bfloat16().float() for name, gain in gains.items()}
    return Correction({name: factors.detach() for name, factors in rows.items()}, rounded, tuple(losses))


def _pace(damage: float) -> float:
    return min(_FASTEST, _PACE * math.sqrt(max(damage, 0.0)))


def _has_no_bias(layer: Layer) -> bool:
    return layer.kind not in ("embedding", "table", "own", "conv") and getattr(layer.module, "bias", None) is None


def _is_norm(module: nn.Module) -> bool:
    """A module with a one-dimensional weight of its own: RMSNorm, LayerNorm."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 1 and weight.is_floating_point()


def _times(factors: torch.Tensor) -> Callable:
    return lambda _module, _inputs, output: output * factors.to(output.dtype)


def _backward(
    runner: BlockRunner, ids: torch.Tensor, target: torch.Tensor, logits_of: Callable, learned: list[torch.Tensor]
) -> float:
    """Gradients of the window's mean KL with regard to what is learned, added up; returns the mean.

    The head goes through in parts, then block after block from the last, each run again from what entered it: one
    block's graph exists at a time.
    """
    hidden, context = runner.embed(ids[None])
    states = [hidden]
    for i in range(len(runner.layout.blocks)):
        states.append(runner.run_block(i, states[-1], context))
    last = states.pop().detach().requires_grad_()
    final = runner.final(last, grad=True)
    leaf, total = final.detach().requires_grad_(), 0.0
    for part in position_blocks(len(ids), runner.layout.head.shape[0]):
        with torch.no_grad():
            expected = logits_of(target[part]).log_softmax(-1)
        with torch.enable_grad():
            found = runner.logits(leaf[0, part], grad=True).float().log_softmax(-1)
            loss = torch.nn.functional.kl_div(found, expected, reduction="sum", log_target=True) / len(ids)
        loss.backward(inputs=[leaf, *learned])
        total += loss.item()
    final.backward(leaf.grad, inputs=[last, *learned])
    gradient = last.grad
    for i in reversed(range(len(states))):
        entering = states.pop().detach().requires_grad_()
        runner.run_block(i, entering, context, grad=True).backward(gradient, inputs=[entering, *learned])
        gradient = entering.grad
    return total
