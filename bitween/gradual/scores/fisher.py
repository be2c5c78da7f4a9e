"""Predicted damage of every (layer, scheme): curvature times the squared error that a quantizer will leave.

`search` gives each scheme's weighted squared error from a sample of rows, on ranges that are searched as the quantizer
will search them; `trellis_errors` gives that of trellis codes from a table. The weights say which quantizer: with error
feedback (GPTQ) column j counts with its `conditional` variance, or `blocked` for the trellis, which feeds back what a
block of columns leaves; without it with its plain second moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

import bitween
from bitween.gradual.scores.curvature import LayerCurvature
from bitween.gradual.scores.trellis_error import trellis_errors
from bitween.model import blocks
from bitween.scheme import TRELLIS_BITS, TRELLIS_WIDTHS, Scheme

__all__ = [
    "KEEP",
    "LayerScores",
    "candidate_schemes",
    "score_layer",
    "score_layers",
    "trellis_schemes",
    "turned_schemes",
]

KEEP = None  # the key of "leave this layer as it is"
_SAMPLED_WEIGHTS = 1 << 16  # of one layer: errors of thousands of groups are known to a percent


@dataclass(frozen=True)
class LayerScores:
    """What each scheme would do to one layer.

    Attributes
    ----------
    schemes : candidates
    damage : float64 (schemes,), predicted nats per token
    relative_error : standard error of the prediction over text, relative
    nbytes : int64 (schemes,), exact
    keep_nbytes : bytes of the layer as it is
    """

    name: str
    schemes: tuple[Scheme, ...]
    damage: np.ndarray
    relative_error: float
    nbytes: np.ndarray
    keep_nbytes: int


def candidate_schemes(
    bits: Sequence[float] = (2, 3, 4, 5, 6, 8),
    group_sizes: Sequence[int] = (128, 64, 32),
    symmetric: Sequence[bool] = (True, False),
) -> tuple[Scheme, ...]:
    """All combinations, widest groups first."""
    return tuple(Scheme(b, g, s) for b in bits for g in group_sizes for s in symmetric)


def trellis_schemes(bits: Sequence[float] = TRELLIS_BITS[1:], width: int = 12) -> tuple[Scheme, ...]:
    """Trellis codes of 1.5 to 5 bits in half steps: fewer do more harm than a plan can repair, and from 5 on grids
    lose as little."""
    return tuple(Scheme.trellis(b, width) for b in bits)


def turned_schemes(bits: Sequence[int] = (1, 2, 3, 4, 5)) -> tuple[Scheme, ...]:
    """Trellis codes between Hadamard transforms, in whole bits: all that EXL3 holds."""
    return tuple(Scheme.trellis(b, TRELLIS_WIDTHS[-1], turned=True) for b in bits)


def score_layers(
    layout: blocks.ModelLayout,
    curvature: dict[str, LayerCurvature],
    schemes: Sequence[Scheme],
    *,
    feedback: bool = True,
    ranges: str = "clip",
    done: Callable[[], None] = lambda: None,
) -> dict[str, LayerScores]:
    """Predicted damage of every scheme for every layer.

    Parameters
    ----------
    feedback : the quantizer compensates errors (GPTQ); False for round to nearest and clipping
    ranges : "clip" or "minmax", as the quantizer chooses ranges
    done : called after each layer, whose weights are not needed again
    """
    found = {}
    for layer in layout.layers:
        uses = [curvature[layer.name]]
        if layer.name == layout.embedding.name and layout.tied:
            uses.append(curvature[layout.head.name])
        found[layer.name] = score_layer(layer, uses, schemes, feedback=feedback, ranges=ranges)
        done()
    return found


def score_layer(
    layer: blocks.Layer,
    uses: Sequence[LayerCurvature],
    schemes: Sequence[Scheme],
    *,
    feedback: bool = True,
    ranges: str = "clip",
) -> LayerScores:
    """Predicted damage of every scheme for one matrix, by the curvature of each of its uses."""
    error = sum(_weighted_errors(layer, use, schemes, feedback, ranges) for use in uses)
    known = [use.relative_error for use in uses if not np.isnan(use.relative_error)]
    spread = float(max(known, default=np.nan))
    sizes = np.array([scheme.nbytes(*layer.shape) for scheme in schemes], np.int64)
    return LayerScores(layer.name, tuple(schemes), error / 2, spread, sizes, layer.nbytes)


def _weighted_errors(layer, curvature: LayerCurvature, schemes, feedback: bool, ranges: str) -> np.ndarray:
    """sum_o G_o sum_j D_j (dW_oj)^2 for each scheme, float64 (schemes,), extrapolated from evenly spaced rows."""
    coded = np.array([scheme.coding == "trellis" for scheme in schemes])
    errors = np.empty(len(schemes))
    for where, of in ((~coded, _grid_errors), (coded, _trellis_errors)):
        if where.any():
            chosen = [schemes[k] for k in np.flatnonzero(where)]
            errors[where] = of(layer, curvature, chosen, feedback, ranges)
    return errors


def _grid_errors(layer, curvature: LayerCurvature, schemes, feedback: bool, ranges: str) -> np.ndarray:
    columns = curvature.conditional if feedback else curvature.moment
    if not feedback and curvature.elementwise is not None:
        return np.asarray(bitween.search(layer.weight, schemes, curvature.elementwise, ranges=ranges))
    factor, weight = _sample(layer, curvature)
    importance = torch.from_numpy(np.ascontiguousarray(_reached(layer, columns), np.float32))
    factor = torch.from_numpy(np.ascontiguousarray(factor, np.float32))
    return np.asarray(bitween.search(weight, schemes, importance, row_importance=factor, ranges=ranges))


def _trellis_errors(layer, curvature: LayerCurvature, schemes, feedback: bool, _ranges: str) -> np.ndarray:
    if not feedback and curvature.elementwise is not None:
        weight, columns, factor = layer.weight, curvature.elementwise.numpy(), np.ones(layer.shape[0])
    else:
        factor, weight = _sample(layer, curvature)
        fed_back = curvature.conditional if curvature.blocked is None else curvature.blocked
        columns = _reached(layer, fed_back if feedback else curvature.moment)
    return trellis_errors(weight.detach().float().numpy(), schemes, columns, factor)


def _reached(layer, columns: np.ndarray | None) -> np.ndarray:
    """Costs of columns; where there is no layer to compare with, only a layer's own size can speak."""
    return np.full(layer.shape[1], 1e-6) if columns is None else columns


def _sample(layer, curvature: LayerCurvature) -> tuple[np.ndarray, torch.Tensor]:
    """Factors of some rows, and their weights."""
    rows, factor = _sample_rows(curvature.rows, max(1, _SAMPLED_WEIGHTS // layer.shape[1]))
    return factor, layer.weight[torch.from_numpy(rows)].contiguous()


def _sample_rows(weights: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `n` rows and their factors, such that a sum over them estimates the weighted sum over all.

    Rows are taken in proportion to their weight at equal distances of its running sum (systematic sampling, Madow
    1949): an embedding's and a head's weight lies in few rows, which evenly spaced rows would miss.
    """
    total = weights.sum()
    if n >= len(weights) or not total > 0:
        return np.arange(len(weights)), weights
    places = (np.arange(n) + 0.5) * (total / n)
    taken = np.minimum(np.searchsorted(np.cumsum(weights), places), len(weights) - 1)
    rows, times = np.unique(taken, return_counts=True)
    return rows, times * (total / n)
