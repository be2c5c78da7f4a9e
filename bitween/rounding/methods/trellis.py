from __future__ import annotations

from typing import Any

from bitween.rounding.methods import Needs, rounding_method
from bitween.scheme import Scheme


@rounding_method("trellis", Needs.HESSIAN)
def of_trellis(weight: Any, scheme: Scheme, importance: Any, hessian: Any) -> tuple:
    """Tiles coded by their best path through a trellis, with error feedback; without a Hessian by importance."""
    from bitween.rounding.trellis import trellis

    if importance is not None and hessian is not None:
        raise ValueError("importance: expected None beside a hessian, which weighs errors itself")
    q = trellis(weight, scheme, hessian, importance=importance).quantized
    return q.codes, q.scales, q.zeros
