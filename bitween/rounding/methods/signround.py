from __future__ import annotations

from typing import Any

from bitween.quantized_tensor import QuantizedTensor
from bitween.rounding.methods import Needs, rounding_method
from bitween.rounding.methods.gptq import with_refinement
from bitween.scheme import Scheme


@rounding_method("signround", Needs.BLOCK)
def signround(weight: Any, scheme: Scheme, importance: Any, hessian: Any) -> tuple:
    """Rounding and ranges trained by the sign of their gradient (arXiv 2309.05516); without a block on the Hessian."""
    import torch

    from bitween.rounding.hessian import Hessian
    from bitween.rounding.signround import train_on_hessian

    stored = QuantizedTensor(*with_refinement(weight, scheme, importance, hessian), scheme, tuple(weight.shape))
    matrix = torch.as_tensor(hessian.matrix() if isinstance(hessian, Hessian) else hessian)
    q = train_on_hessian(torch.as_tensor(weight), stored, matrix)
    return q.codes, q.scales, q.zeros
