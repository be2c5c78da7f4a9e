"""Scores of models with routers, corrected by the measured damage of all experts of a block, and of its other layers.

Curvature is smooth: it does not see that a changed hidden state can send a token to other experts, here or in a later
block. The layers of a block that move the routers together are therefore rounded together for a moment, the KL of the
whole model is measured, and what their predictions add up to is mapped to what was found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from bitween.gradual.scores.curvature import LayerCurvature
from bitween.gradual.scores.fisher import LayerScores, score_layer
from bitween.gradual.scores.probe import Probe, Unit
from bitween.model import blocks
from bitween.scheme import Scheme

__all__ = ["corrected_for_routing", "routed_units"]

MEASURED = (Scheme(4, 64), Scheme(2, 64))  # errors of the planner's usual range
LARGEST = 8.0  # a correction beyond this is the noise of a unit that does next to nothing


def routed_units(layout: blocks.ModelLayout) -> list[Unit]:
    """Of each block its experts, and its other layers; none in a model without experts. Routers stay out."""
    if not any(layer.kind == "expert" for layer in layout.layers):
        return []
    found = []
    for i, block in enumerate(layout.blocks):
        experts = tuple(layer for layer in block.layers if layer.kind == "expert")
        others = tuple(layer for layer in block.layers if layer.kind not in ("expert", "router") and layer.plain)
        found += [Unit(f"experts of {block.name}", i, experts)] if experts else []
        found += [Unit(f"other layers of {block.name}", i, others)] if others else []
    return found


def corrected_for_routing(
    scores: Mapping[str, LayerScores], curvature: Mapping[str, LayerCurvature], probe: Probe
) -> dict[str, LayerScores]:
    """Scores whose sum over a unit of `routed_units` is what rounding the unit as a whole was found to do.

    Parameters
    ----------
    scores : {layer name: LayerScores}
    curvature : {layer name: LayerCurvature} that they were made from
    probe : trials are measured on its text

    Returns
    -------
    {layer name: LayerScores}; of a model without experts the scores given.
    """
    found, units = dict(scores), routed_units(probe.context.layout)
    measured = {k: probe.each(f"routing at {s.bits} bits", units, _trial(probe, s)) for k, s in enumerate(MEASURED)}
    for unit in units:
        pairs = [(_predicted(unit, curvature, s), measured[k][unit.name]) for k, s in enumerate(MEASURED)]
        known = sorted((p, m / p) for p, m in pairs if p > 0 and 0 < m < math.inf)
        if known:
            for layer, factor in _factors(unit, found, *zip(*known, strict=True)):
                found[layer] = replace(found[layer], damage=found[layer].damage * factor)
    return found


def _trial(probe: Probe, scheme: Scheme):
    return lambda unit: probe.damage(probe.rounded(unit.layers, scheme), unit.block)


def _predicted(unit: Unit, curvature: Mapping[str, LayerCurvature], scheme: Scheme) -> float:
    """What the trial is predicted to do: round to nearest, nothing fed back, nothing clipped."""
    options = {"feedback": False, "ranges": "minmax"}
    return float(sum(score_layer(x, [curvature[x.name]], [scheme], **options).damage[0] for x in unit.layers))


def _factors(unit: Unit, scores: Mapping[str, LayerScores], sums: Sequence[float], ratios: Sequence[float]):
    """(layer, factor of each of its schemes): by what the scheme would do to the whole unit; `ratios` of measured to
    predicted damage are known at `sums`, between them they are interpolated on logarithmic scales."""
    whole: dict[Scheme, float] = {}
    for layer in unit.layers:
        for scheme, damage in zip(scores[layer.name].schemes, scores[layer.name].damage, strict=True):
            whole[scheme] = whole.get(scheme, 0.0) + float(damage)
    for layer in unit.layers:
        x = np.array([whole[scheme] for scheme in scores[layer.name].schemes])
        with np.errstate(divide="ignore"):
            factor = np.exp(np.interp(np.log(x), np.log(sums), np.log(ratios)))
        yield layer.name, np.clip(factor, 1 / LARGEST, LARGEST)
