"""Curvature for layers of which the calibration text says nothing: they are not free to damage.

An expert that no token was routed to, the vision tower of a model that was shown text, a table of positions: their
measured curvature is zero or missing, and a planner that believed it would give them the fewest bits. They take what
comparable layers have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["impute"]


def impute(found: Mapping[str, Any], layers: Mapping[str, Any], embedding: str) -> list[str]:
    """Fill in `rows`, `moment` and `conditional` where no token reached a layer; returns the names of those layers.

    A lookup table takes the word embedding's column curvature and counts each of its rows as often as any other. A
    matrix takes the mean over the layers that were reached, those of its own shape and kind if there are any: of the
    gradients' energy a row and of the inputs' variance a column.

    Parameters
    ----------
    found : {layer name: LayerCurvature}, changed in place
    layers : {layer name: Layer} of the same names
    embedding : name of the word embedding
    """
    missing = [name for name, curvature in found.items() if curvature.moment is None or curvature.tokens == 0]
    reached = [name for name in found if name not in missing and layers[name].kind != "embedding"]
    for name in missing:
        rows, cols = layers[name].shape
        if layers[name].kind == "table":
            columns = float(np.mean(found[embedding].moment)) if found[embedding].moment is not None else 0.0
            found[name].rows = np.full(rows, 1.0 / rows)
            found[name].moment = found[name].conditional = np.full(cols, columns)
            continue
        alike = [n for n in reached if (layers[n].shape, layers[n].kind) == (layers[name].shape, layers[name].kind)]
        alike = alike or reached
        if not alike:
            raise ValueError("model: expected calibration text to reach at least one layer; it reached none")
        found[name].rows = np.full(rows, np.mean([np.mean(found[n].rows) for n in alike]))
        found[name].moment = np.full(cols, np.mean([np.mean(found[n].moment) for n in alike]))
        found[name].conditional = np.full(cols, np.mean([np.mean(found[n].conditional) for n in alike]))
    return missing
