"""Rounding methods: each turns one matrix into codes of a scheme.

A method is one file here with a function under `@rounding_method`. It takes (weight, scheme, importance, hessian) and
returns what `QuantizedTensor` holds: codes, scales, zeros. Importing this package imports every file in it, so a new
method needs no other edit; what loads torch is imported inside the function.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from bitween.scheme import Scheme

__all__ = ["METHODS", "Needs", "RoundingMethod", "rounding_method"]


class Needs(IntEnum):
    """What a method must know beside the weight; each includes what stands before it."""

    NOTHING = 0
    IMPORTANCE = 1  # a weight for each squared error: the second moments of the layer's inputs
    HESSIAN = 2  # E[x xT] of the layer's inputs
    BLOCK = 3  # the block that the layer stands in, run forward and backward


@dataclass(frozen=True)
class RoundingMethod:
    """A registered method.

    Attributes
    ----------
    name : how options and reports spell it
    needs : what it must know; see `Needs`
    round : (weight, scheme, importance, hessian) -> (codes, scales, zeros)
    """

    name: str
    needs: Needs
    round: Callable[[Any, Scheme, Any, Any], tuple]


_FOUND: dict[str, RoundingMethod] = {}


def rounding_method(name: str, needs: Needs) -> Callable:
    """Register a function as the rounding method `name`."""

    def register(function: Callable) -> Callable:
        _FOUND[name] = RoundingMethod(name, needs, function)
        return function

    return register


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

METHODS: dict[str, RoundingMethod] = {m.name: m for m in sorted(_FOUND.values(), key=lambda m: (m.needs, m.name))}
