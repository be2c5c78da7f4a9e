"""JSON as the journal keeps it: one spelling per value, and nothing that a reader would have to guess about."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

__all__ = ["dumps", "loads", "plain"]

_LARGEST = 2**63 - 1
_DEEPEST = 64


def plain(value: Any, path: str = "record", depth: int = 0) -> Any:
    """The value as JSON gives it back: lists for tuples, Python numbers for NumPy ones.

    TypeError or ValueError, naming the place inside the value, for what JSON cannot hold without loss: keys that are
    not strings, NaN and infinity, integers beyond 64 bits, other types.
    """
    if depth > _DEEPEST:
        raise ValueError(f"{path}: expected at most {_DEEPEST} levels")
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        if abs(value) > _LARGEST:
            raise ValueError(f"{path}: expected an integer of 64 bits; got one of {value.bit_length()}")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{path}: expected a finite number; got {value}")
        return float(value)
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{path}: expected keys that are strings; got {key!r}")
        return {key: plain(item, f"{path}.{key}", depth + 1) for key, item in value.items()}
    raise TypeError(f"{path}: expected numbers, strings, lists and dicts; got {type(value).__name__}")


def dumps(value: Any) -> str:
    """One line of ASCII, the keys sorted, the same text for the same value."""
    return json.dumps(value, allow_nan=False, sort_keys=True, separators=(",", ":"))


def loads(text: str | bytes) -> Any:
    """The value of a JSON text. ValueError for NaN, infinity, huge integers, doubled keys or bottomless nesting."""
    try:
        return json.loads(text, parse_constant=_no_constant, parse_int=_integer, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def _no_constant(text: str) -> Any:
    raise ValueError(f"JSON holds {text}")


def _integer(text: str) -> int:
    if len(text) > 20 or abs(int(text)) > _LARGEST:
        raise ValueError("JSON holds an integer beyond 64 bits")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("JSON holds a key twice")
    return found
