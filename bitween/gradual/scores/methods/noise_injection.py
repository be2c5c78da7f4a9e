"""Noise injection: the curvature of the output in the unit's weights."""

from __future__ import annotations

import torch

from bitween.gradual.scores.methods import importance_method

SIGMA = 0.05  # of the weight's standard deviation


@importance_method("noise_injection", weight=0.15)
def noise_injection(probe, units):
    """Damage when Gaussian noise of 5 % of each weight's standard deviation is added.

    White noise has no structure, so this measures the curvature alone; the linearity theorem of HIGGS
    (arXiv 2411.17525) extrapolates it to any scheme by squared relative error.
    """
    generator = torch.Generator().manual_seed(probe.seed)

    def noisy(layer):
        weight = layer.module.weight.data
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
        spread = layer.weight.float().pow(2).mean(1).mean().sqrt()
        return (weight.float() + SIGMA * spread * noise).to(weight.dtype)

    return probe.each(
        "noise injection", units, lambda unit: probe.damage({x.module: noisy(x) for x in unit.layers}, unit.block)
    )
