"""The gradual descent: stages down the frontier, each realised and measured, taken back when it breaks the budget.

Prediction is corrected by what was measured at each stage, so that the next one aims better. The walk is loosened
by the safety multiplier (a stage predicted at up to that many budgets is still tried), acceptance never is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bitween.gradual.plan.damage_model import DamageModel, learned
from bitween.gradual.plan.items import Plan
from bitween.gradual.plan.planner import Frontier
from bitween.gradual.precision_optimizer import Realisation

__all__ = ["Descent", "Stage"]

CLOSE = 0.92  # of the budget: near enough below it to stop searching
TRIES = 3  # plans realised in search of the fewest bytes within the budget


@dataclass(frozen=True)
class Stage:
    """One plan that was realised and measured.

    Attributes
    ----------
    name : what it was for
    nbytes : of all layers
    predicted : damage predicted before, nats per token
    damage : measured on the selection text, nats per token
    increase : what counts against the budget, measured on the selection text: ln perplexity ratio, nats per token, with
        several domains that of the one that takes most of its budget; or damage, or the drop of a metric, where the
        budget is of these
    accepted : within the budget
    """

    name: str
    nbytes: int
    predicted: float
    damage: float
    increase: float
    accepted: bool
    realisation: Realisation = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for reports and the journal."""
        values = {key: getattr(self, key) for key in ("name", "nbytes", "predicted", "damage", "increase", "accepted")}
        return {**values, "seconds": self.realisation.seconds, "quality": self.realisation.measurement.to_dict()}


class Descent:
    """Walks one frontier.

    Parameters
    ----------
    frontier : over all layers
    realise : (name, plan) -> Realisation
    budget : nats per token of ln perplexity ratio, or in the unit of what else a measurement spends
    ratios : least and largest that a nat of damage is taken to spend
    safety_multiplier : >= 1, how far beyond the budget a prediction may lie and still be tried
    budgets : {domain: nats per token} of domains that have a budget of their own
    """

    def __init__(
        self,
        frontier: Frontier,
        realise: Callable[[str, Plan], Realisation],
        budget: float,
        safety_multiplier: float = 2.0,
        ratios: tuple[float, float] = (0.2, 4.0),
        budgets: Mapping[str, float] | None = None,
    ):
        self._ratios = ratios
        self.frontier, self.budget, self.safety = frontier, budget, safety_multiplier
        self.budgets = dict(budgets or {})
        self._realise = realise
        self.stages: list[Stage] = []
        self.model = DamageModel()
        self._pairs: list[tuple[float, float]] = []  # sum of single damages, measured damage of the whole

    def predicted(self, plan: Plan) -> float:
        """Damage of a plan as a whole, corrected by the stages so far; nats per token."""
        return float(self.model.total(plan.damage))

    def predicted_increase(self, plan: Plan) -> float:
        """ln perplexity ratio expected of a plan, nats per token."""
        return self.predicted(plan) * self._ratio()

    def walk(self, start: int, target: int, steps: int) -> Stage | None:
        """Stages from `start` bytes down to `target` bytes, evenly in ratio; the target's stage if it was reached."""
        start = max(start, target)
        for nbytes in _spaced(start, target, steps):
            plan = self.frontier.within_bytes(nbytes)
            if self.stages and self.predicted_increase(plan) > self.safety * self.budget:
                return None
            last = nbytes == target
            stage = self.try_plan(f"{nbytes / 2**20:.1f} MiB" + (" (target)" if last else ""), plan)
            if last:
                return stage
            if not stage.accepted and stage.increase > self.safety * self.budget:
                return None
        return None

    def try_plan(self, name: str, plan: Plan) -> Stage:
        """Realise and measure one plan, and learn from it."""
        predicted = self.predicted(plan)
        stage = self._judged(name, plan.nbytes, predicted, self._realise(name, plan))
        self._pairs.append((plan.damage, stage.damage))
        self.model = learned(self._pairs)
        return stage

    def add(self, name: str, realisation: Realisation, like: Stage) -> Stage:
        """List a stage that was made from another one of the same plan; predictions learn nothing from it."""
        return self._judged(name, like.nbytes, like.predicted, realisation)

    def _judged(self, name: str, nbytes: int, predicted: float, realisation: Realisation) -> Stage:
        quality = realisation.measurement
        increase = quality.nats(self.budget, self.budgets) if self.budgets else quality.spent
        accepted = math.isfinite(quality.damage) and increase <= self.budget
        stage = Stage(name, nbytes, predicted, quality.damage, increase, accepted, realisation)
        self.stages.append(stage)
        return stage

    def smallest_within_budget(self, least: int) -> Stage | None:
        """Search the fewest bytes whose measured increase is within the budget, between what held and what did not."""
        for _ in range(TRIES):
            held = min((s for s in self.stages if s.accepted), key=lambda s: s.nbytes, default=None)
            broke = max((s.nbytes + 1 for s in self.stages if not s.accepted), default=least)
            if held is not None and (held.increase >= CLOSE * self.budget or held.nbytes <= max(least, broke * 1.01)):
                return held
            nbytes = self._aim(held, broke)
            if nbytes is None or any(abs(s.nbytes - nbytes) <= 0.003 * nbytes for s in self.stages):
                return held
            self.try_plan(f"{nbytes / 2**20:.1f} MiB (search)", self.frontier.within_bytes(nbytes))
        return min((s for s in self.stages if s.accepted), key=lambda s: s.nbytes, default=None)

    def _aim(self, held: Stage | None, lowest: int) -> int | None:
        """Bytes, at least `lowest`, at which the increase should be just under the budget, as predicted by now."""
        sums = float(self.model.inverse(0.97 * self.budget / self._ratio()))
        if sums < self.frontier.least_damage:
            return None
        nbytes = self.frontier.within_damage(sums).nbytes
        top = held.nbytes if held is not None else int(self.frontier.nbytes[-1])
        return int(np.clip(nbytes, lowest, top)) if lowest < top else None

    def _ratio(self) -> float:
        """ln perplexity ratio per nat of KL, from the stage whose increase is nearest the budget."""
        known = [s for s in self.stages if s.damage > 1e-3 and s.increase > 0 and math.isfinite(s.increase)]
        if not known:
            return 1.0
        nearest = min(known, key=lambda s: abs(math.log(s.increase / self.budget)))
        return float(np.clip(nearest.increase / nearest.damage, *self._ratios))


def _spaced(start: int, target: int, steps: int) -> Sequence[int]:
    if start <= target or steps < 2:
        return [target]
    inner = np.geomspace(start, target, steps)[:-1]
    return [*(int(x) for x in inner), target]
