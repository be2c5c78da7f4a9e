"""Scored layers as items of the plan: what each scheme of a layer takes and costs."""

from __future__ import annotations

from bitween.gradual.plan.items import Item, Option
from bitween.gradual.scores.fisher import KEEP, LayerScores

__all__ = ["to_items"]


def to_items(scores: dict[str, LayerScores], *, keep: bool = True) -> list[Item]:
    """One planner item a layer: every scheme, and with `keep` the layer as it is at no damage."""
    items = []
    for score in scores.values():
        options = [
            Option(scheme, int(size), float(damage))
            for scheme, size, damage in zip(score.schemes, score.nbytes, score.damage, strict=True)
        ]
        if keep:
            options.append(Option(KEEP, score.keep_nbytes, 0.0))
        items.append(Item(score.name, tuple(options)))
    return items
