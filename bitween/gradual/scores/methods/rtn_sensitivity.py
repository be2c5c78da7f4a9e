"""RTN sensitivity: the damage of really rounding the unit, alone."""

from __future__ import annotations

from bitween.gradual.scores.methods import importance_method
from bitween.scheme import Scheme

SCHEME = Scheme(4, 64)


@importance_method("rtn_sensitivity", weight=0.40)
def rtn_sensitivity(probe, units):
    """Damage when the unit alone is rounded to nearest at 4 bits, groups of 64."""
    return probe.each(
        "RTN sensitivity", units, lambda unit: probe.damage(probe.rounded(unit.layers, SCHEME), unit.block)
    )
