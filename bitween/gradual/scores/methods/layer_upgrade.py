"""Layer upgrade: what the unit costs inside a model that is already quantized."""

from __future__ import annotations

from bitween.gradual.scores.methods import importance_method
from bitween.gradual.scores.probe import rounded_weight
from bitween.scheme import Scheme

BASE, UPGRADE = Scheme(4, 64), Scheme(8, 64)


@importance_method("layer_upgrade", weight=0.25)
def layer_upgrade(probe, units):
    """Damage saved when the unit goes from 4 to 8 bits while all other units stay at 4.

    Together with RTN sensitivity it gives each unit's Shapley value of a game with pairwise
    interactions: (alone + last) / 2.
    """
    modules = {layer.module: layer for unit in units for layer in unit.layers}
    keep = probe.context.spill.keep  # of a whole model, as rounded, one block is in use at a time
    base = {module: keep(rounded_weight(layer, BASE)) for module, layer in modules.items()}
    originals = {module: module.weight.data for module in modules}
    runner, states = probe.runner, [probe.states[0]]
    try:
        for module, weight in base.items():
            module.weight.data = weight
        with runner:
            for i in range(len(probe.context.layout.blocks)):
                states.append(keep(runner.run_block(i, states[-1], probe.call)))
        whole = probe.divergence(states[-1])

        def saved(unit):
            better = {}
            for layer in unit.layers:
                layer.module.weight.data = originals[layer.module]
                better[layer.module] = probe.rounded([layer], UPGRADE)[layer.module]
                layer.module.weight.data = base[layer.module]
            return whole - probe.damage(better, unit.block, states)

        return probe.each("layer upgrade", units, saved)
    finally:
        for module, weight in originals.items():
            module.weight.data = weight
