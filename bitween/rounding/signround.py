"""Trained rounding: offsets and ranges learned by the sign of their gradient (SignRound, arXiv 2309.05516).

Training starts from a finished quantization, and a state is only taken over when its measured loss is lower.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bitween import _core
from bitween._threads import follow_torch
from bitween.quantized_tensor import QuantizedTensor
from bitween.scheme import Scheme

__all__ = ["TrainedRounding", "train_on_hessian"]

STEPS = 100
_EDGE = 0.49  # how near a start may lie to the next code: just inside, so that it rounds to its own
_RANGE_PACE = 0.1  # ranges move this much slower than offsets


class _Rounded(torch.autograd.Function):
    """Values on the grid, with the straight-through gradient."""

    @staticmethod
    def forward(ctx, weight, offset, low, high, scheme):
        out = torch.empty_like(weight)
        _core.train_forward(weight, offset.detach(), low.detach(), high.detach(), scheme.key, out)
        ctx.save_for_backward(weight, offset, low, high)
        ctx.scheme = scheme
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        weight, offset, low, high = (t.detach() for t in ctx.saved_tensors)
        into = [torch.zeros_like(t) for t in (offset, low, high)]
        _core.train_backward(weight, offset, low, high, ctx.scheme.key, grad.contiguous(), *into)
        return None, *into, None


class TrainedRounding:
    """One layer under training.

    Parameters
    ----------
    weight : float32 Tensor (rows, cols), what is approximated
    start : its quantization; the untrained state gives back exactly its codes, scales and zeros
    hessian : float32 Tensor (cols, cols), optional
        E[x xT]; tells how far each code is from the next better one. Without it the weight itself does.
    """

    def __init__(self, weight: torch.Tensor, start: QuantizedTensor, hessian: torch.Tensor | None = None):
        self.scheme: Scheme = start.scheme
        top = self.scheme.levels - 1
        scales = torch.as_tensor(np.asarray(start.scales).astype(np.float32))
        zeros = torch.from_numpy(start.unpack_zeros())
        values = start.dequantize(torch.float32)
        miss = weight.detach().float() - values
        if hessian is not None:
            diagonal = hessian.diagonal()
            miss = miss @ hessian / torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal))
        group = weight.shape[1] if self.scheme.group_size == -1 else self.scheme.group_size
        steps = scales.repeat_interleave(group, 1)[:, : weight.shape[1]]
        self.base = (values + (miss / steps).clamp(-_EDGE, _EDGE) * steps).contiguous()
        self._low, self._high = -zeros * scales, (top - zeros) * scales
        self.offset = torch.zeros_like(self.base, requires_grad=True)
        self.low_factor = torch.ones_like(scales, requires_grad=True)
        self.high_factor = torch.ones_like(scales, requires_grad=True)

    @property
    def parameters(self) -> tuple[torch.Tensor, ...]:
        """What is trained: offsets in codes, factors of each group's low and high end."""
        return self.offset, self.low_factor, self.high_factor

    def values(self) -> torch.Tensor:
        """The layer's weight as it would be stored, float32 (rows, cols), differentiable."""
        follow_torch()
        return _Rounded.apply(
            self.base, self.offset, self._low * self.low_factor, self._high * self.high_factor, self.scheme
        )

    @torch.no_grad()
    def step(self, pace: float) -> None:
        """Move each parameter by `pace` against the sign of its gradient, and forget the gradient."""
        paces, lows, highs = (pace, pace * _RANGE_PACE, pace * _RANGE_PACE), (-0.5, 0.5, 0.5), (0.5, 1.5, 1.5)
        for parameter, rate, low, high in zip(self.parameters, paces, lows, highs, strict=True):
            if parameter.grad is not None:
                parameter.sub_(parameter.grad.sign(), alpha=rate).clamp_(low, high)
                parameter.grad = None

    def state(self) -> list[torch.Tensor]:
        """Copies of the parameters."""
        return [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def load(self, state: Sequence[torch.Tensor], rows: torch.Tensor | slice = slice(None)) -> None:
        """Take parameters over, for some rows only if wanted."""
        for parameter, saved in zip(self.parameters, state, strict=True):
            parameter[rows] = saved[rows]

    @torch.no_grad()
    def quantized(self) -> QuantizedTensor:
        """The layer as it stands, stored."""
        low, high = (self._low * self.low_factor).numpy(), (self._high * self.high_factor).numpy()
        top = np.float32(self.scheme.levels - 1)
        if self.scheme.symmetric:
            steps, zeros = high / (top - np.float32(self.scheme.zero)), None
        else:
            steps = (high - low) / top
        scales = np.clip(steps, np.float32(2.0**-24), np.float32(65504)).astype(np.float16)
        if not self.scheme.symmetric:
            numbers = np.clip(np.rint(-low / scales.astype(np.float32)), 0, top).astype(np.uint8)
            zeros = _pack_zeros(numbers, self.scheme.levels)
        values = self.values()
        codes = _core.encode(values, scales, zeros, self.scheme.key)
        return QuantizedTensor(codes, scales, zeros, self.scheme, tuple(self.base.shape))


def train_on_hessian(
    weight: torch.Tensor, start: QuantizedTensor, hessian: torch.Tensor, *, steps: int = STEPS
) -> QuantizedTensor:
    """Train a layer on (w - q) H (w - q)T alone. No row ends with a larger error than it had.

    Parameters
    ----------
    weight : float32, float16 or bfloat16 Tensor (rows, cols)
    start : its quantization so far
    hessian : float32 Tensor (cols, cols)
    steps : gradient steps; the pace falls from 1/steps to 0
    """
    weight = weight.detach().float()
    rounding = TrainedRounding(weight, start, hessian)
    best, least = rounding.state(), None
    for k in range(steps + 1):
        with torch.no_grad():
            error = rounding.values() - weight
            slope = error @ hessian
            cost = (slope.double() * error).sum(1)
        better = torch.ones_like(cost, dtype=torch.bool) if least is None else cost < least
        for kept, now in zip(best, rounding.parameters, strict=True):
            kept[better] = now.detach()[better]
        least = cost if least is None else torch.minimum(cost, least)
        if k < steps:
            rounding.values().backward(slope)
            rounding.step((1 - k / steps) / steps)
    rounding.load(best)
    return rounding.quantized()


def _pack_zeros(zeros: np.ndarray, levels: int) -> np.ndarray:
    """Zeros (rows, n_groups), one a byte, as they are stored."""
    bits = (levels - 1).bit_length()
    stream = (zeros[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(stream.reshape(len(zeros), -1), axis=1, bitorder="little")
