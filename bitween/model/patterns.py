"""Patterns of layer names that a user gives: one that fits nothing is a mistake, not a wish."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable

from bitween.model.layout import ModelLayout
from bitween.model.whole import WholeLayout

__all__ = ["checked_patterns"]


def checked_patterns(
    argument: str, patterns: str | Iterable[str], layout: ModelLayout | WholeLayout
) -> tuple[str, ...]:
    """The patterns as a tuple.

    Raises
    ------
    ValueError
        One fits no layer and no matrix that stays as it is anyway; the message names the nearest layers.
    """
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    names = [name for layer in layout.layers for name in (layer.name, *layer.shared)]
    known = [*names, *(kept.name for kept in layout.kept), *(kept.name.rpartition(".")[0] for kept in layout.kept)]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument}: expected names or patterns of layers; got {pattern!r}")
        if not any(name == pattern or fnmatch.fnmatch(name, pattern) for name in known):
            near = ", ".join(_nearest(pattern, names))
            raise ValueError(
                f"{argument}: expected names or patterns of layers, the nearest are {near}; got {pattern!r}"
            )
    return patterns


def _nearest(pattern: str, names: list[str]) -> list[str]:
    """Three names: those that hold the pattern's own words first, then those that are spelled most like it."""
    plain = pattern.strip("*")
    holding = [name for name in names if plain and plain in name]
    return list(dict.fromkeys(holding + difflib.get_close_matches(plain, names, 3, 0.0)))[:3]
