"""Importance methods: each answers, in nats of KL per token, what a unit of the model is worth.

A method is one file here with one function under `@importance_method`. It takes a `Probe` and a list of
`Unit`s (whole blocks, or single layers) and returns {unit name: damage in nats}. Importing this
package imports every file in it, so a new method needs no other edit.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitween.gradual.scores.probe import Probe, Unit

__all__ = ["METHODS", "ImportanceMethod", "importance_method"]


@dataclass(frozen=True)
class ImportanceMethod:
    """A registered method.

    Attributes
    ----------
    name : how options and reports spell it
    weight : its share in the `combined` ranking; 0 for methods that stand beside it
    compute : (probe, units) -> {unit name: damage in nats per token}
    summary : the first line of its documentation
    """

    name: str
    weight: float
    compute: Callable[[Probe, Sequence[Unit]], dict[str, float]]
    summary: str


METHODS: dict[str, ImportanceMethod] = {}


def importance_method(name: str, *, weight: float = 0.0) -> Callable:
    """Register a function as the importance method `name`."""

    def register(function: Callable) -> Callable:
        METHODS[name] = ImportanceMethod(name, weight, function, (function.__doc__ or "").strip().split("\n")[0])
        return function

    return register


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
