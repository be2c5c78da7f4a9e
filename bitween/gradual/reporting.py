"""The report of a gradual run on a causal language model: what was asked, what was delivered, and what it took."""

from __future__ import annotations

from typing import Any

from bitween.model.memory import analyze_memory
from bitween.report.quantization_report import QuantizationReport

__all__ = ["make_report"]


def make_report(
    run: Any,
    model: Any,
    chosen: Any,
    descent: Any,
    front: Any,
    importance: Any,
    context: Any,
    transforms: dict[str, Any],
    conflict: str | None,
    uniform: dict[str, Any] | None,
    proof: Any,
    experts: tuple[list[str], dict[str, float]],
) -> QuantizationReport:
    """The report of `run`, a GradualQuantizer.

    Parameters
    ----------
    model : delivered
    chosen : the Stage that was delivered, one of those of `descent`
    front : the Frontier
    importance : of the four methods; None where it was not measured
    context : RunContext
    transforms, conflict, uniform : what was done to the weights' basis, why not both targets are met, and how the
        best uniform plan does
    proof : the certificate; None where none was asked for
    experts : those that no calibration text reached, and the share of tokens that go to others than in the original
    """
    weights = sum(x.shape[0] * x.shape[1] for x in context.layout.layers)
    targets = {
        "memory_reduction": run.target_memory_reduction,
        "perplexity_increase": run.max_perplexity_increase,
        "confidence": run.confidence,
        "on_conflict": run.on_conflict,
        "export_target": run.target.name,
        "domains": {n: run.text.budgets.get(n, run.max_perplexity_increase) for n in run.text.sources},
        "method": run.method,
        "seed": run.seed,
        "average_bits": 8 * chosen.nbytes / weights,
    }
    certificate = None if proof is None else {**proof.to_dict(), "text_line": str(proof)}
    near = None
    if conflict:
        points = [{"nbytes": s.nbytes, "damage": s.damage, "increase": s.increase} for s in descent.stages]
        near = {"text": conflict, "measured": points}
    return QuantizationReport(
        targets=targets,
        memory=analyze_memory(model, run.model),
        quality=chosen.realisation.measurement.to_dict(),
        certificate=certificate,
        plan={x.name: str(chosen.realisation.plan.get(x.name) or "kept") for x in context.layout.layers},
        stages=[{**stage.to_dict(), "delivered": stage is chosen} for stage in descent.stages],
        frontier=front.points(200),
        importance=None if importance is None else importance.to_dict(),
        text=context.text.report,
        transforms=transforms,
        conflict=near,
        uniform=uniform,
        seconds=dict(run._seconds),
        unreached_experts=experts[0],
        routing=experts[1],
        full_precision=run.sizes.full_precision(),
    )
