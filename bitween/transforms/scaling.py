"""Choose how far to even out the channels between two layers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_LARGEST_SCALE = 1e4

ErrorFunction = Callable[[torch.Tensor, torch.Tensor], float]
"""(weight (outputs, inputs) float32, importance (inputs,) float32) -> the error that quantizing it would make."""


@dataclass(frozen=True)
class ScaleChoice:
    """Exponents taken for one pair, and the predicted error relative to no scaling."""

    activation: float
    weight: float
    error: float


def group_range_error(weight: torch.Tensor, importance: torch.Tensor, group_size: int = 64) -> float:
    """Squared error of round to nearest, up to a factor: range² per group times its summed importance."""
    rows, columns = weight.shape
    padding = -columns % group_size
    if padding:  # repeating the last column changes no range
        weight = torch.cat([weight, weight[:, -1:].expand(rows, padding)], 1)
        importance = torch.nn.functional.pad(importance, (0, padding))
    low, high = torch.aminmax(weight.reshape(rows, -1, group_size), dim=2)
    return ((high - low).square() @ importance.reshape(-1, group_size).sum(1)).sum().item()


def choose_scales(
    weight: torch.Tensor, energy: torch.Tensor | None, error: ErrorFunction, merge: Callable
) -> tuple[torch.Tensor, ScaleChoice]:
    """Scales for the sink's channels that lower its quantization error the most.

    Scales are s = a^p / w^q for the channels' root mean square activation a, largest weight w and all p, q
    in `EXPONENTS`, as in AWQ (Lin et al., 2023), here with both exponents free. The source's own error
    relative to its size does not change, since its rows are scaled as a whole.

    Parameters
    ----------
    weight : Tensor (outputs, inputs)
        The sink's weight.
    energy : Tensor (inputs,) or None
        Mean square of each of the sink's inputs; None counts all alike.
    error : function
        (weight, importance) -> number to minimise.
    merge : function
        Maps a value for each of the sink's channels to one that the source can produce, by averaging over
        the heads that share it.

    Returns
    -------
    scales : float64 Tensor (inputs,)
        Multiplies the sink's columns; the source's channels are divided by it. Its geometric mean is 1.
    choice : ScaleChoice
    """
    weight = weight.float()
    energy = torch.ones(weight.shape[1]) if energy is None else energy.float()
    tiny = torch.finfo(torch.float32).tiny
    log_a = merge(energy.double().clamp_min(tiny).log() / 2)
    log_w = merge(weight.abs().amax(0).double().clamp_min(tiny).log())
    plain = error(weight, energy)
    best = torch.ones_like(log_a), ScaleChoice(0.0, 0.0, 1.0)
    for p in EXPONENTS if energy.unique().numel() > 1 else (0.0,):
        for q in EXPONENTS:
            log_s = p * log_a - q * log_w
            scales = (log_s - log_s.mean()).exp().clamp(1 / _LARGEST_SCALE, _LARGEST_SCALE)
            single = scales.float()
            now = error(weight * single, energy / single.square())
            if now < plain * best[1].error:
                best = scales, ScaleChoice(p, q, now / plain)
    return best
