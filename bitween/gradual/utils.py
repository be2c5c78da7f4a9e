"""Small things that the gradual classes share: budgets, temporary weights, checked numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

__all__ = [
    "budget_nats",
    "check_at_least",
    "check_share",
    "perplexity_increase",
    "replaced_weights",
]


def budget_nats(max_perplexity_increase: float) -> float:
    """ln(1 + increase): the perplexity budget in nats per token."""
    return math.log1p(max_perplexity_increase)


def perplexity_increase(nats: float) -> float:
    """exp(nats) - 1: the relative perplexity increase of a mean log ratio."""
    return math.expm1(min(nats, 700.0))


def check_share(name: str, value: Any) -> float:
    """A number strictly between 0 and 1, or an error that names it and guesses at percentages."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number between 0 and 1; got {value!r}")
    if not 0 < value < 1:
        hint = f" (for {value:g} % write {value / 100:g})" if 1 <= value < 100 else ""
        raise ValueError(f"{name}: expected a number between 0 and 1; got {value!r}{hint}")
    return float(value)


@contextmanager
def replaced_weights(weights: Mapping[torch.nn.Module, torch.Tensor]) -> Iterator[None]:
    """Let modules compute with other weights for a while; the originals come back untouched.

    Parameters
    ----------
    weights : {module: tensor of the module's own weight shape and dtype}
    """
    originals = {module: module.weight.data for module in weights}
    try:
        for module, weight in weights.items():
            module.weight.data = weight
        yield
    finally:
        for module, original in originals.items():
            module.weight.data = original


def check_at_least(name: str, value: Any, least: float) -> float:
    """A number >= `least`, or the error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number; got {value!r}")
    if not value >= least:
        raise ValueError(f"{name}: expected at least {least:g}; got {value!r}")
    return value
