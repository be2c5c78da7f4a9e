"""One scheme for the matrices of any module, on a copy of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

import bitween
from bitween._progress import Progress, no_progress
from bitween.model.whole import describe
from bitween.realise.stacks import method_below_8_bits
from bitween.realise.whole_context import WholeContext, float32_copy
from bitween.realise.whole_examples import find_examples
from bitween.realise.whole_model import WholeCandidate, WholeRealiser, check_method
from bitween.rounding.methods import METHODS, Needs
from bitween.scheme import Scheme

__all__ = ["quantize_whole"]


def quantize_whole(
    model: nn.Module,
    plan: Mapping[str, Scheme],
    method: str,
    *,
    tokenizer: Any = None,
    calibration_data: Any = None,
    calibration_samples: int = 48,
    length: int = 512,
    seed: int = 0,
    stage: str = "quantizing",
    progress: Progress = no_progress,
) -> nn.Module:
    """A new module of packed layers.

    Methods that look at weights alone need no examples; given some, the result is still compared on one of them.

    Parameters
    ----------
    model : any module; stays as it is
    plan : {layer: Scheme}
    method : of `bitween.quantize`; none that trains blocks
    calibration_data : see `bitween.realise.whole_examples.find_examples`
    """
    check_method(method)
    base = float32_copy(model)
    needs = any(METHODS[method_below_8_bits(scheme, method)].needs > Needs.IMPORTANCE for scheme in plan.values())
    if not needs and calibration_data is None:
        candidate = WholeCandidate(base, describe(base))
        for done, (name, scheme) in enumerate(plan.items()):
            layer = candidate.original.layer(name)
            how = method if method in ("rtn", "clip") else method_below_8_bits(scheme, method)
            candidate.put(layer, bitween.quantize(layer.weight, scheme, method=how))
            progress(stage, done + 1, len(plan), name)
        return candidate.deliver(model, None)
    sizes = {"calibration_samples": calibration_samples, "evaluation_samples": 1}
    examples, causal = find_examples(base, tokenizer, calibration_data, **sizes, length=length, seed=seed)
    context = WholeContext.build(base, examples, shifted=causal, seed=seed, progress=progress)
    realiser = WholeRealiser(context, method=method, progress=progress)
    realiser.realise(plan, stage=stage)
    return realiser.candidate.deliver(model, examples.selection[0])
