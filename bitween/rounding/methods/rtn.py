from __future__ import annotations

from typing import Any

from bitween import _core
from bitween.rounding.methods import Needs, rounding_method
from bitween.scheme import Scheme


@rounding_method("rtn", Needs.NOTHING)
def rtn(weight: Any, scheme: Scheme, importance: Any, hessian: Any) -> tuple:
    """Round to nearest on the range of each group."""
    return _core.quantize_rtn(weight, scheme.key)
