from __future__ import annotations

from typing import Any

from bitween.rounding.methods import Needs, rounding_method
from bitween.scheme import Scheme


def _by_hessian(weight: Any, scheme: Scheme, importance: Any, hessian: Any, **options: Any) -> tuple:
    from bitween.rounding.gptq import gptq

    if hessian is None:
        raise ValueError("hessian: expected E[x xT] of the layer's inputs for this method; got None")
    if importance is not None:
        raise ValueError("importance: expected None for this method, which weighs errors by the hessian")
    q = gptq(weight, scheme, hessian, **options).quantized
    return q.codes, q.scales, q.zeros


@rounding_method("gptq", Needs.HESSIAN)
def without_refinement(weight: Any, scheme: Scheme, importance: Any, hessian: Any) -> tuple:
    """Columns rounded in order, each making up for the errors before it (arXiv 2210.17323)."""
    return _by_hessian(weight, scheme, importance, hessian, sweeps=0)


@rounding_method("gptq+refine", Needs.HESSIAN)
def with_refinement(weight: Any, scheme: Scheme, importance: Any, hessian: Any) -> tuple:
    """GPTQ, then groups rounded anew with all others fixed until the error stops falling."""
    return _by_hessian(weight, scheme, importance, hessian)
