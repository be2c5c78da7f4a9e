"""What the mean hides: the worst tokens, changed first choices, and tokens of control that are lost.

Upper bounds beside the certificate's, from the same held-out windows, each one-sided and with the confidence by itself.
None of them decides about a model; they are there to be read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from bitween.gradual.proof.certificate import TooLittleText, bound

__all__ = ["Tail", "changed_choices", "lost_control", "tails", "worst_tokens"]

QUANTILE = 0.99
_LEAST_MASS = 1e-4  # of control tokens, mean probability: where the text has less, there is nothing to lose


@dataclass(frozen=True)
class Tail:
    """One quantity with its upper bound.

    Attributes
    ----------
    name : what it is
    estimate, bound : nats ("token loss, 99th percentile") or shares
    unit : "nats" or "share"
    """

    name: str
    estimate: float
    bound: float
    unit: str

    def to_dict(self) -> dict[str, str | float | None]:
        """Plain values for JSON; what is not finite becomes None."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}

    def __str__(self) -> str:
        if self.unit == "nats":
            return f"{self.name} {self.estimate:.3f}, at most {self.bound:.3f} nats"
        return f"{self.name} {self.estimate:.2%}, at most {self.bound:.2%}"


def worst_tokens(
    gain: np.ndarray, documents: np.ndarray | None, confidence: float = 0.95, quantile: float = QUANTILE
) -> Tail:
    """The quantile of a token's loss increase.

    Parameters
    ----------
    gain : float (windows, tokens), ln p_reference - ln p_quantized of each token, nats
    documents : (windows,), as for `certificate.bound`

    Notes
    -----
    Inverts the bound of a mean: the bound of the quantile is the least of the values seen whose share of tokens above
    it is at most 1 - quantile, by that share's own upper bound. Infinite where no value seen is.
    """
    values = np.sort(gain, axis=None)
    size = np.full(len(gain), gain.shape[1])
    low, high = int(quantile * (len(values) - 1)), len(values) - 1

    def beyond(place: int) -> float:
        return bound((gain > values[place]).mean(axis=1), size, documents, confidence).bound

    estimate = float(values[low])
    if beyond(high) > 1 - quantile:
        return Tail(f"token loss, {quantile:.0%} quantile", estimate, math.inf, "nats")
    while low < high:
        middle = (low + high) // 2
        if beyond(middle) <= 1 - quantile:
            high = middle
        else:
            low = middle + 1
    return Tail(f"token loss, {quantile:.0%} quantile", estimate, float(values[high]), "nats")


def changed_choices(changed: np.ndarray, documents: np.ndarray | None, confidence: float = 0.95) -> Tail:
    """How often the first choice is another token; `changed` is (windows, tokens), 1 where it is."""
    found = bound(changed.mean(axis=1), np.full(len(changed), changed.shape[1]), documents, confidence)
    return Tail("first choice changed", found.increase, min(found.bound, 1.0), "share")


def lost_control(
    name: str, before: np.ndarray, after: np.ndarray, documents: np.ndarray | None, confidence: float = 0.95
) -> Tail | None:
    """The share of the probability of control tokens that is lost, where the reference gives any.

    Parameters
    ----------
    before, after : float (windows, tokens), probability of these tokens together, by the reference and the candidate.
        What the candidate gives beyond the reference in one place makes up for nothing in another.

    Returns
    -------
    None where the text has next to none of them.
    """
    mass = before.sum(axis=1)
    if mass.sum() < _LEAST_MASS * before.size or not (mass > 0).all():
        return None
    lost = np.maximum(before - after, 0.0).sum(axis=1)
    found = bound(lost / mass, mass, documents, confidence)
    return Tail(f"{name} lost", found.increase, min(found.bound, 1.0), "share")


def tails(
    gain: np.ndarray,
    changed: np.ndarray,
    control: Mapping[str, tuple[np.ndarray, np.ndarray]],
    documents: np.ndarray | None,
    confidence: float = 0.95,
) -> tuple[Tail, ...]:
    """All of them; none where the text is too little for a bound, or some token has no finite loss."""
    if not np.isfinite(gain).all():
        return ()
    try:
        found = [worst_tokens(gain, documents, confidence), changed_choices(changed, documents, confidence)]
        found += [lost_control(name, *pair, documents, confidence) for name, pair in control.items()]
    except TooLittleText:
        return ()
    return tuple(tail for tail in found if tail is not None)
