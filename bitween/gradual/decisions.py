"""What is decided on the way down, for every kind of model and budget: which stage stands, and which is proven."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bitween.gradual.descent import Descent, Stage
from bitween.gradual.plan.planner import uniform_plans
from bitween.gradual.plan.sizes import Sizes
from bitween.scheme import Scheme

__all__ = ["BudgetConflict", "descend", "not_worse_than_uniform", "proven"]


FIRST = 0.8  # share of the error rate that the chosen stage's proof may use, where a safer one stands by


class BudgetConflict(ValueError):
    """Memory target and quality budget can't be met together; `.tradeoffs` holds the nearest choices."""

    def __init__(self, message: str, tradeoffs: dict[str, Any]):
        super().__init__(message)
        self.tradeoffs = tradeoffs


def descend(
    descent: Descent, sizes: Sizes, *, stages: int, on_conflict: str, budget: str, words: str
) -> tuple[Stage, str | None]:
    """The stage that stands, and why not both targets are met, if so.

    Parameters
    ----------
    budget : its name, as "perplexity budget"
    words : the same with its value, for the error
    """
    limit = sizes.layer_limit
    stage = descent.walk(max(sizes.uniform(Scheme(8, 128, True)), limit), limit, stages)
    if stage is not None and stage.accepted:
        return stage, None
    if on_conflict == "memory":
        stage = stage or descent.try_plan("memory target", descent.frontier.within_bytes(limit))
        return stage, None if stage.accepted else f"the memory target was kept, the {budget} was not"
    found = descent.smallest_within_budget(limit)
    if on_conflict == "error":
        needs = f"{found.nbytes / 2**20:.1f} MiB" if found else "more than 8 bits"
        raise BudgetConflict(
            f"at {limit / 2**20:.1f} MiB of layers the {words} does not hold; it needs {needs}",
            {"stages": _stages(descent)},
        )
    if found is None:
        safest = max(descent.stages, key=lambda s: s.nbytes)
        return safest, f"no plan tried holds the {budget}; this is the most careful one"
    return found, None if found.nbytes <= limit else f"the {budget} was kept, the memory target was not"


def not_worse_than_uniform(chosen: Stage, descent: Descent) -> tuple[Stage, dict[str, Any] | None]:
    """Measure the best uniform scheme of at most the same bytes, and take it should it be better."""
    plans = uniform_plans(descent.frontier.items)
    fitting = {key: plan for key, plan in plans.items() if key and plan.nbytes <= chosen.nbytes}
    if not fitting:
        return chosen, None
    key = min(fitting, key=lambda k: (fitting[k].damage, str(k)))
    stage = descent.try_plan(f"uniform {key}", fitting[key])
    better = stage.accepted >= chosen.accepted and stage.damage < chosen.damage
    text = f"{key}, {stage.nbytes / 2**20:.1f} MiB, KL {stage.damage:.4f}" + (" (taken)" if better else "")
    return (stage if better else chosen), {"scheme": str(key), **stage.to_dict(), "text": text}


def proven(
    chosen: Stage,
    conflict: str | None,
    descent: Descent,
    certify: Callable[[Stage, float], Any],
    *,
    on_conflict: str,
    budget: str,
    confidence: float,
) -> tuple[Stage, Any, str | None]:
    """Test the chosen stage on held-out examples and, should it not be accepted where quality goes first, a safer one.

    Both tests together accept a stage above the budget with probability at most 1 - confidence: the chosen stage gets
    four fifths of that, the safer one the rest (Bonferroni), which is plenty for what spends far less of the budget.
    Safer is what did less damage to the selection examples, so the pair is fixed before the proof's are seen. To test
    the safer stage first, and the chosen one at the full rate after it, would cost a pass over the text in every run.

    Parameters
    ----------
    certify : (stage, confidence) -> its certificate
    """
    safer = [s for s in descent.stages if s.accepted and s.nbytes > chosen.nbytes and s.damage < chosen.damage]
    second = max(safer, key=lambda s: s.damage) if safer and on_conflict == "quality" else None
    proof = certify(chosen, confidence if second is None else 1 - FIRST * (1 - confidence))
    if proof.verdict == "accepted":
        return chosen, proof, conflict
    if second is not None:
        other = certify(second, 1 - (1 - FIRST) * (1 - confidence))
        if other.verdict == "accepted":
            text = "the memory target's model could not be proven within the budget; this larger one could"
            return second, other, text
    if on_conflict == "error":
        raise BudgetConflict(f"the budget could not be proven: {proof}", {"stages": _stages(descent)})
    return chosen, proof, conflict or f"the {budget} could not be proven on held-out text"


def _stages(descent: Descent) -> list[dict[str, Any]]:
    return [stage.to_dict() for stage in descent.stages]
