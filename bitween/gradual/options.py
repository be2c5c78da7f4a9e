"""Options of a gradual run, checked on their own: what is wrong with them is told before a model is even loaded."""

from __future__ import annotations

from operator import index
from typing import Any

from bitween.export.targets import find_target
from bitween.gradual.utils import check_at_least, check_share

__all__ = ["ON_CONFLICT", "check_options"]

ON_CONFLICT = ("quality", "memory", "error")
TRANSFORMS = ("auto", "none")
_SHARES = ("target_memory_reduction", "max_perplexity_increase", "confidence")
_LIMITS = ("max_damage", "max_metric_drop")
_LEAST = {  # whole numbers
    "calibration_samples": 1,
    "evaluation_samples": 1,
    "sequence_length": 8,
    "stages": 1,
    "distillation_steps": 0,
    "max_memory": 1,
}


def check_options(**options: Any) -> dict[str, Any]:
    """Keywords of `GradualQuantizer` as it keeps them.

    Raises
    ------
    TypeError, ValueError
        naming the argument, what was expected and what came.
    """
    if (options.get("metric") is None) != (options.get("max_metric_drop") is None):
        given, missing = ("metric", "max_metric_drop")[:: 1 if options.get("metric") is not None else -1]
        raise ValueError(f"{missing}: expected together with {given}; got None")
    return {name: _checked(name, value) for name, value in options.items()}


def _checked(name: str, value: Any) -> Any:
    if name in _SHARES:
        return check_share(name, value)
    if name == "safety_multiplier":
        return check_at_least(name, value, 1.0)
    if name in _LEAST:
        return None if value is None and name == "max_memory" else int(check_at_least(name, value, _LEAST[name]))
    if name in _LIMITS:
        return None if value is None else _limit(name, value)
    if name == "damage" and value not in (None, "kl", "error"):
        raise ValueError(f'damage: expected "kl", "error" or None; got {value!r}')
    if name == "metric" and value is not None and not callable(value):
        raise TypeError(f"metric: expected a function of a model; got {type(value).__name__}")
    if name == "on_conflict" and value not in ON_CONFLICT:
        raise ValueError(f"on_conflict: expected one of {', '.join(ON_CONFLICT)}; got {value!r}")
    if name == "transforms" and value not in TRANSFORMS:
        raise ValueError(f'transforms: expected "auto" or "none"; got {value!r}')
    if name == "trellis" and not isinstance(value, bool):
        raise TypeError(f"trellis: expected True or False; got {value!r}")
    if name == "export_target":
        find_target(value)
    if name == "seed":
        return _seed(value)
    return _patterns(value) if name == "ignore_layers" else value


def _limit(name: str, value: Any) -> float:
    """A number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number above 0; got {value!r}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a number above 0; got {value!r}")
    return float(value)


def _seed(value: Any) -> int:
    try:
        seed = index(value)
    except TypeError:
        raise TypeError(f"seed: expected a whole number; got {value!r}") from None
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 to {2**63 - 1}; got {seed}")
    return seed


def _patterns(value: Any) -> tuple[str, ...]:
    """One name or pattern, or several."""
    if isinstance(value, str):
        return (value,)
    try:
        found = tuple(value)
    except TypeError:
        raise TypeError(f"ignore_layers: expected names or patterns of layers; got {value!r}") from None
    for pattern in found:
        if not isinstance(pattern, str):
            raise TypeError(f"ignore_layers: expected names or patterns of layers; got {pattern!r} among them")
    return found
