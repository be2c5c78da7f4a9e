"""ImportanceAnalyzer: what each block and layer can bear, by four measured methods and one predicted score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitween._progress import Progress, no_progress
from bitween.gradual.scores.curvature import LayerCurvature, collect_curvature
from bitween.gradual.scores.fisher import LayerScores, candidate_schemes, score_layers
from bitween.gradual.scores.methods import METHODS
from bitween.gradual.scores.probe import Probe, Unit, block_units, layer_units
from bitween.gradual.scores.rerouting import corrected_for_routing, routed_units
from bitween.gradual.utils import budget_nats, check_share
from bitween.realise.context import RunContext
from bitween.scheme import Scheme

__all__ = ["ImportanceAnalyzer", "ImportanceReport"]


@dataclass(frozen=True)
class ImportanceReport:
    """Importance of units, by method and combined.

    Attributes
    ----------
    damage : {method: {unit: nats of KL per token}}
    combined : {unit: 0 .. 1}, weighted mean of each method's min-max normalised damage
    weights : {method: its share}
    agreement : {(method, method): Spearman rank correlation over the units}
    """

    damage: dict[str, dict[str, float]]
    combined: dict[str, float]
    weights: dict[str, float]
    agreement: dict[tuple[str, str], float]

    @property
    def order(self) -> list[str]:
        """Units from the least to the most important."""
        return sorted(self.combined, key=lambda name: (self.combined[name], name))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; infinite damage becomes None."""
        damage = {m: {u: v if np.isfinite(v) else None for u, v in d.items()} for m, d in self.damage.items()}
        agreement = {f"{a} / {b}": v for (a, b), v in self.agreement.items()}
        return {"damage": damage, "combined": self.combined, "weights": self.weights, "agreement": agreement}

    def __str__(self) -> str:
        methods = list(self.damage)
        lines = [f"{'unit':40s} combined  " + "  ".join(f"{m:>16s}" for m in methods) + "   (nats per token)"]
        for unit in self.order:
            values = "  ".join(f"{self.damage[m][unit]:16.5f}" for m in methods)
            lines.append(f"{unit:40s} {self.combined[unit]:8.3f}  {values}")
        lines += [f"rank correlation {a} / {b}: {v:.2f}" for (a, b), v in self.agreement.items()]
        return "\n".join(lines)


class ImportanceAnalyzer:
    """Measures importance in nats of KL per token.

    Parameters
    ----------
    model, tokenizer
    weights : {method: share}, optional
        Shares of the methods in the combined ranking; default noise injection 15 %, RTN sensitivity 40 %, block
        disable 20 %, layer upgrade 25 %. Methods with share 0 are not run.
    probe_windows, probe_length, probe_stride
        Text of each trial: windows, tokens of each, and every how many-th position is scored.
    context : RunContext, optional
        Shared with the other gradual classes; built from **options otherwise.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        weights: Mapping[str, float] | None = None,
        probe_windows: int = 4,
        probe_length: int = 256,
        probe_stride: int = 4,
        context: RunContext | None = None,
        progress: Progress = no_progress,
        **options: Any,
    ):
        self.context = context or RunContext.build(model, tokenizer, progress=progress, **options)
        self.weights = _check_weights(weights)
        self.progress = progress
        self._probe_options = {"windows": probe_windows, "length": probe_length, "stride": probe_stride}
        self._probe: Probe | None = None
        self._curvature: dict[str, LayerCurvature] = {}
        self._blocks: ImportanceReport | None = None

    @property
    def probe(self) -> Probe:
        """The cached block inputs that the measured methods share."""
        if self._probe is None:
            self._probe = Probe(self.context, **self._probe_options)
            self._probe.progress = self.progress
        return self._probe

    def analyze_block_importance(self) -> ImportanceReport:
        """Damage of each block by every measured method, and the combined ranking."""
        if self._blocks is None:
            self._blocks = self._measure(block_units(self.context.layout))
        return self._blocks

    def analyze_layer_importance(self, layers: Sequence[str] | None = None) -> ImportanceReport:
        """The same for single layers of the blocks; all of them, or those named."""
        units = layer_units(self.context.layout)
        if layers is not None:
            known = {unit.name for unit in units}
            if unknown := sorted(set(layers) - known):
                raise ValueError(f"layers: expected layers of the model's blocks; got {unknown[0]!r}")
            units = [unit for unit in units if unit.name in set(layers)]
        return self._measure(units)

    def analyze_curvature(
        self, *, elementwise: bool = False, blocked: bool = False, **options: Any
    ) -> dict[str, LayerCurvature]:
        """Fisher information of every layer; see `curvature.collect_curvature` for the options."""
        known = self._curvature.values()
        missing = (elementwise and any(c.elementwise is None for c in known)) or (
            blocked and any(c.blocked is None for c in known if c.conditional is not None)
        )
        if not self._curvature or missing:
            options.setdefault("progress", self.progress)
            self._curvature = collect_curvature(self.context, elementwise=elementwise, blocked=blocked, **options)
        return self._curvature

    def predict_damage(
        self, schemes: Sequence[Scheme] | None = None, *, feedback: bool = True, ranges: str = "clip"
    ) -> dict[str, LayerScores]:
        """Predicted damage, with its error, of every candidate scheme for every layer; of a model with routers
        corrected by what its blocks were found to do (`scores.rerouting`)."""
        schemes = tuple(schemes or candidate_schemes())
        blocked = feedback and any(scheme.coding == "trellis" for scheme in schemes)
        curvature = self.analyze_curvature(blocked=blocked)
        rest = self.context.spill.let_go
        layout = self.context.layout
        scores = score_layers(layout, curvature, schemes, feedback=feedback, ranges=ranges, done=rest)
        return corrected_for_routing(scores, curvature, self.probe) if routed_units(layout) else scores

    def get_block_thresholds(self, global_budget: float = 0.05) -> dict[str, float]:
        """Damage in nats that each block may cause, so that all together stay within a perplexity increase.

        Less important blocks get more: the budget ln(1 + global_budget) is shared in inverse
        proportion to combined importance, floored at a tenth of the range so that no block gets it all.
        """
        budget = budget_nats(check_share("global_budget", global_budget))
        combined = self.analyze_block_importance().combined
        room = {name: 1.0 / (0.1 + value) for name, value in combined.items()}
        return {name: budget * value / sum(room.values()) for name, value in room.items()}

    def _measure(self, units: Sequence[Unit]) -> ImportanceReport:
        damage = {m: METHODS[m].compute(self.probe, units) for m, share in self.weights.items() if share > 0}
        return ImportanceReport(damage, _combine(damage, self.weights), dict(self.weights), _agreement(damage))


def _check_weights(weights: Mapping[str, float] | None) -> dict[str, float]:
    default = {name: method.weight for name, method in METHODS.items() if method.weight > 0}
    if weights is None:
        return default
    if unknown := sorted(set(weights) - set(METHODS)):
        raise ValueError(f"weights: expected methods {', '.join(METHODS)}; got {unknown[0]!r}")
    if any(not value >= 0 for value in weights.values()) or not sum(weights.values()) > 0:
        raise ValueError(f"weights: expected shares >= 0 that do not all vanish; got {dict(weights)}")
    total = sum(weights.values())
    return {name: value / total for name, value in weights.items()}


def _combine(damage: dict[str, dict[str, float]], weights: Mapping[str, float]) -> dict[str, float]:
    names = list(next(iter(damage.values())))
    combined = np.zeros(len(names))
    for method, values in damage.items():
        x = np.array([values[name] for name in names])
        finite = x[np.isfinite(x)]
        x = np.where(np.isfinite(x), x, finite.max() if len(finite) else 1.0)  # an overflow ranks at the top
        span = x.max() - x.min()
        combined += weights[method] * ((x - x.min()) / span if span > 0 else np.zeros_like(x))
    return dict(zip(names, (float(v) for v in combined), strict=True))


def _agreement(damage: dict[str, dict[str, float]]) -> dict[tuple[str, str], float]:
    from scipy.stats import spearmanr

    found = {}
    methods = list(damage)
    for i, a in enumerate(methods):
        for b in methods[i + 1 :]:
            if len(damage[a]) > 2:
                found[a, b] = float(spearmanr(list(damage[a].values()), list(damage[b].values())).statistic)
    return found
