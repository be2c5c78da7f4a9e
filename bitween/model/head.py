"""The head and its loss in one: logits exist for a block of positions at a time, never for a whole text.

A row of logits takes four bytes a word of the vocabulary, so those of one window of 512 tokens may outweigh the layer
that made them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bitween.functional import cross_entropy, kl_divergence

__all__ = ["head_cross_entropy", "head_kl_divergence", "position_blocks"]

_POSITIONS = 256  # enough for a product at full speed
_LEAST = 32  # below it a product mostly waits for the head's weight
_LOGITS = 1 << 22  # held at once, about, where the vocabulary is known: several copies of them live beside each other


def position_blocks(count: int, vocabulary: int = 0) -> Iterator[slice]:
    """Positions 0 .. count-1 in blocks whose logits may be held at once; fewer positions of a large vocabulary."""
    step = max(_LEAST, min(_POSITIONS, _LOGITS // vocabulary)) if vocabulary else _POSITIONS
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


def head_cross_entropy(head: Callable[[Any], Any], states: Any, targets: Any, *, vocabulary: int = 0) -> np.ndarray:
    """Negative log-likelihood of each token, straight from what enters the head.

    Parameters
    ----------
    head : from states (n, width) to logits (n, vocabulary); a `QuantizedLinear`, an `nn.Linear`, any function
    states : (tokens, width)
    targets : (tokens,) integers, 0 .. vocabulary - 1
    vocabulary : of the head, if known: of a large one fewer positions are taken at once

    Returns
    -------
    float32 (tokens,), nats; the same as `cross_entropy(head(states), targets)`
    """
    _check(states, "targets", targets, 1)
    return _each(len(states), lambda part: cross_entropy(head(states[part]), targets[part]), vocabulary)


def head_kl_divergence(
    reference: Callable[[Any], Any], reference_states: Any, head: Callable[[Any], Any], states: Any
) -> np.ndarray:
    """KL(reference || candidate) of each token, straight from what enters either head.

    Parameters
    ----------
    reference, head : from states (n, width) to logits (n, vocabulary)
    reference_states, states : (tokens, width) of either model

    Returns
    -------
    float32 (tokens,), nats; the same as `kl_divergence(reference(reference_states), head(states))`
    """
    _check(states, "reference_states", reference_states, 2)
    return _each(len(states), lambda part: kl_divergence(reference(reference_states[part]), head(states[part])))


def _each(count: int, measure: Callable[[slice], np.ndarray], vocabulary: int = 0) -> np.ndarray:
    return np.concatenate([np.empty(0, np.float32), *map(measure, position_blocks(count, vocabulary))])


def _check(states: Any, name: str, other: Any, ndim: int) -> None:
    if states.ndim != 2:
        raise ValueError(f"states: expected shape (tokens, width); got {tuple(states.shape)}")
    if other.ndim != ndim or len(other) != len(states):
        raise ValueError(f"{name}: expected {len(states)} tokens; got shape {tuple(other.shape)}")
