"""The model that is delivered is the one that was measured: compared on a window before anything is reported."""

from __future__ import annotations

import torch
from torch import nn

from bitween.model.precision import in_float32
from bitween.model.replay import logits_of, settled

__all__ = ["ALLOWED", "check_delivered", "default_window", "in_float32", "logits_in_float32"]

# Largest root mean square difference of the logits, relative to theirs around each token's mean. Both models compute
# in float32, so that what is left is the rounding of what stayed unquantized to the model's own dtype (2^-24, 2^-11
# and 2^-8 of each number, some of it amplified from block to block). A lost bias or a lost basis is 0.1 and more.
ALLOWED = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}

_TOKENS = 64


def default_window(vocabulary: int, seed: int = 0) -> torch.Tensor:
    """Token ids (1, 64) for a run that has no text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (1, _TOKENS), generator=generator)


def logits_in_float32(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The model's own logits of a window, weights and products in float32."""
    with settled(model), in_float32(model), torch.no_grad():
        return logits_of(model(ids[:, :_TOKENS])).float()


def check_delivered(expected: torch.Tensor, got: torch.Tensor, dtype: torch.dtype) -> float:
    """Compare the delivered model's logits with the candidate's.

    Returns
    -------
    The root mean square difference relative to that of the logits around their mean.

    Raises
    ------
    RuntimeError
        It is above `ALLOWED` of the dtype, or not finite where the candidate is.
    """
    if not bool(torch.isfinite(expected).all()):  # a candidate that overflowed proves nothing and is told as such
        return float("nan")
    size = (expected - expected.mean(-1, keepdim=True)).pow(2).mean().sqrt().item()
    change = (got - expected).pow(2).mean().sqrt().item() / max(size, 1e-30)
    if not change <= ALLOWED[dtype]:
        raise RuntimeError(
            f"model: expected the delivered model to compute what was measured, within {ALLOWED[dtype]:g} of its "
            f"logits; got a difference of {change:.2g}. Nothing was reported or saved; please report this model"
        )
    return change
