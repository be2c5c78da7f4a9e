"""bitween.info: what bitween runs on, and which path a model's steps take."""

from __future__ import annotations

from typing import Any

from bitween import functional

__all__ = ["info"]


def info(model: Any = None) -> dict[str, Any]:
    """What bitween runs on: version, isa (in use), isas (that this CPU has), threads, blas, blas_core.

    With a model also `decoding`, which says how its steps are taken while it generates: {"path": "core" or
    "transformers", "reason": why not by the core, or None, "checked": steps that were computed both ways and compared}.
    """
    facts = functional.info()
    if model is not None:
        from bitween.decode.attaching import path_of

        facts["decoding"] = path_of(model)
    return facts
