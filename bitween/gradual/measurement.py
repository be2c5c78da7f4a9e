"""Measurement: one candidate on one set of windows, over all of them and over each domain of text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np

from bitween.gradual.utils import perplexity_increase

__all__ = ["Measurement", "summary"]

_NUMBERS = 7


@dataclass(frozen=True)
class Measurement:
    """One candidate on one set of windows.

    Attributes
    ----------
    damage : nats per token, mean KL(reference || candidate)
    standard_error : nats, of `damage`, over windows
    perplexity, reference_perplexity : of the next token
    perplexity_increase : perplexity / reference_perplexity - 1
    agreement : share of positions where both models rank the same token first
    tokens : positions measured
    domains : {domain: the same of its windows alone}; empty where all windows are of one
    """

    damage: float
    standard_error: float
    perplexity: float
    reference_perplexity: float
    perplexity_increase: float
    agreement: float
    tokens: int
    domains: Mapping[str, Measurement] = field(default_factory=dict)

    def nats(self, budget: float, budgets: Mapping[str, float] | None = None) -> float:
        """Rise of the log perplexity, nats per token, of the domain that takes most of its budget.

        Parameters
        ----------
        budget : nats per token, of domains that `budgets` leaves out
        budgets : {domain: nats per token}; a rise is scaled to `budget`, so that it can be compared with that alone
        """
        if not self.domains:
            return _log1p(self.perplexity_increase)
        rises = {name: _log1p(part.perplexity_increase) for name, part in self.domains.items()}
        return max(rise * budget / (budgets or {}).get(name, budget) for name, rise in rises.items())

    @property
    def spent(self) -> float:
        """What counts against a budget of perplexity: the rise of its log, nats per token, in the worst domain."""
        return self.nats(1.0)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**values, "domains": {name: part.to_dict() for name, part in self.domains.items()}}

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Float64 arrays that hold all of it, and keep all bits."""
        arrays = {"values": np.array(astuple(self)[:_NUMBERS], np.float64)}
        return arrays | {f"domain {name}": part.to_arrays()["values"] for name, part in self.domains.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Measurement:
        """What `to_arrays` was made from."""
        own = arrays["values"].tolist()
        parts = {
            name.removeprefix("domain "): cls.from_arrays({"values": values})
            for name, values in arrays.items()
            if name != "values"
        }
        return cls(*own[: _NUMBERS - 1], tokens=int(own[_NUMBERS - 1]), domains=parts)

    def __str__(self) -> str:
        line = (
            f"KL {self.damage:.4f} ± {self.standard_error:.4f} nats/token, perplexity {self.perplexity:.2f} "
            f"({self.perplexity_increase:+.2%} of {self.reference_perplexity:.2f}), "
            f"same first choice {self.agreement:.1%}, {self.tokens:,} tokens"
        )
        parts = ", ".join(f"{name} {part.perplexity_increase:+.2%}" for name, part in self.domains.items())
        return f"{line} ({parts})" if parts else line


def summary(
    divergence: np.ndarray, gain: np.ndarray, agree: np.ndarray, nll: np.ndarray, domain: Mapping[str, np.ndarray]
) -> Measurement:
    """The measurement of all windows, and of those of each domain.

    Parameters
    ----------
    divergence : float64 (windows, positions), KL in nats
    gain : float64 (windows, positions), ln p_reference - ln p_candidate of the next token
    agree : (windows, positions), 1 where the first choice is the same
    nll : float64 (windows, positions), -ln p_reference
    domain : {name: indices of its windows}, empty where there is one
    """
    per_window = divergence.mean(axis=1)
    spread = float(per_window.std(ddof=1)) if len(per_window) > 1 else math.nan
    base, increase = _mean(nll), _mean(gain)
    return Measurement(
        damage=_mean(divergence),
        standard_error=spread / math.sqrt(len(per_window)),
        perplexity=math.exp(min(base + increase, 700.0)),
        reference_perplexity=math.exp(base),
        perplexity_increase=perplexity_increase(increase),
        agreement=float(agree.mean()),
        tokens=int(divergence.size),
        domains={name: summary(divergence[i], gain[i], agree[i], nll[i], {}) for name, i in domain.items() if len(i)},
    )


def _mean(values: np.ndarray) -> float:
    """Mean in float64 by one thread, so that decisions do not depend on the number of threads."""
    return float(np.mean(values, dtype=np.float64))


def _log1p(increase: float) -> float:
    return math.log1p(increase) if increase > -1 else -math.inf
