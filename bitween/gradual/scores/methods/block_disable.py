"""Block disable: what the model loses without the unit; a cap on any damage to it."""

from __future__ import annotations

import torch

from bitween.gradual.scores.methods import importance_method


@importance_method("block_disable", weight=0.20)
def block_disable(probe, units):
    """Damage when the unit's layers give zero, so that a residual block passes its input on."""

    def silent(unit):
        return {layer.module: torch.zeros_like(layer.module.weight.data) for layer in unit.layers}

    return probe.each("block disable", units, lambda unit: probe.damage(silent(unit), unit.block))
