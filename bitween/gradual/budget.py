"""What a quantized model may cost: a rise of perplexity, damage, or a drop of the user's own metric."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Budget", "choose_budget"]

_UNITS = {"kl": "nats of KL", "error": "of the outputs' variance"}


@dataclass(frozen=True)
class Budget:
    """One limit.

    Attributes
    ----------
    kind : "perplexity", "damage" or "metric"
    limit : nats of ln perplexity ratio, damage, or the metric's own unit
    damage : "kl" or "error", in which damage is told
    metric : for kind "metric", from a model to a number, or one a test example; more is better
    """

    kind: str
    limit: float
    damage: str = "kl"
    metric: Callable[[Any], Any] | None = None

    @property
    def unit(self) -> str:
        """Of damage."""
        return _UNITS[self.damage]

    def said(self, spent: float) -> str:
        """A value of what counts against the budget, in words."""
        if self.kind == "perplexity":
            return f"perplexity {math.expm1(min(spent, 700.0)):+.2%}"
        if self.kind == "damage":
            return f"damage {spent:.4g} {self.unit}"
        return f"metric {-spent:+.4g}"

    def __str__(self) -> str:
        if self.kind == "metric":
            return f"the metric down by at most {self.limit:.4g}"
        return f"at most {self.said(self.limit)}"


def choose_budget(
    *,
    max_perplexity_increase: float,
    max_damage: float | None,
    metric: Callable[[Any], Any] | None,
    max_metric_drop: float | None,
    damage: str,
    has_perplexity: bool,
    task: str,
) -> Budget:
    """The limit that the options name; the metric before damage, and damage before perplexity.

    Raises
    ------
    ValueError
        Nothing is given, and the model has no perplexity: an output that is no text, or examples without labels.
    """
    if metric is not None:
        return Budget("metric", float(max_metric_drop), damage, metric)
    if max_damage is not None:
        return Budget("damage", float(max_damage), damage)
    if has_perplexity:
        return Budget("perplexity", math.log1p(max_perplexity_increase), damage)
    raise ValueError(
        f"max_damage: expected a budget, since {task} has no perplexity on these examples (no labels of a text); got "
        f"None. Give max_damage ({_UNITS[damage]}), or metric with max_metric_drop, or examples with labels"
    )
