"""Equivalent transforms: the same function, with weights that are easier to quantize.

A language model computes the same when the channels between two of its layers are rotated or scaled and
the layers are changed to match. Rotating the residual stream (SliceGPT, QuaRot) spreads outlier channels
over all others; scaling the channels between two layers (AWQ, SmoothQuant) evens them out. The model stays
an ordinary one of its architecture, so nothing has to be undone.

    layout = bitween.model.blocks.inspect(model)
    plan = plan_transforms(model, layout)     # what is possible, and why the rest is not
    report = apply(model, layout, plan)       # in place, checked on logits, all or nothing
"""

from bitween.transforms.apply import TransformReport, apply
from bitween.transforms.plan import DEFAULT_STEPS, STEPS, TransformPlan, Untie, plan_transforms
from bitween.transforms.scaling import ScaleChoice, group_range_error

__all__ = [
    "DEFAULT_STEPS",
    "STEPS",
    "ScaleChoice",
    "TransformPlan",
    "TransformReport",
    "Untie",
    "apply",
    "group_range_error",
    "plan_transforms",
]
