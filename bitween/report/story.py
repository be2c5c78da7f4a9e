"""What a run says on its way: what is tried and why, with bytes and damage, a sentence a step."""

from __future__ import annotations

from typing import Any

__all__ = [
    "analysis",
    "attempt",
    "attempt_whole",
    "begin",
    "begin_whole",
    "delivered",
    "distilled",
    "examples",
    "proof",
    "proving",
    "proving_whole",
    "result",
    "result_whole",
    "text",
    "transformed",
]


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"


def begin(layout: Any, sizes: Any, increase: float, budget: float) -> str:
    """What there is and what is asked."""
    dtype = str(sizes.dtype).removeprefix("torch.")
    return (
        f"{len(layout.layers)} matrices in {len(layout.blocks)} blocks, {_mib(sizes.original)} in {dtype}. Wanted: at "
        f"most {_mib(sizes.limit)} (−{sizes.reduction:.0%}) with perplexity up by at most {increase:.1%}, which is "
        f"{budget:.4f} nats a token."
    )


def text(splits: Any) -> str:
    """What each part of the text is for."""
    counts = {name: len(getattr(splits, name)) for name in ("calibration", "selection", "certification")}
    kinds = f" of {len(splits.domains)} domains ({', '.join(splits.domains)})" if len(splits.domains) > 1 else ""
    return (
        f"Text{kinds}: {counts['calibration']} windows to learn from, {counts['selection']} to steer by, and "
        f"{counts['certification']} that only the proof will see; no document is in two of them."
    )


def transformed(report: dict[str, Any]) -> str:
    """What was done to the basis of the weights."""
    if not report["steps"]:
        return "Weights stay in their own basis."
    change = report.get("logit_change")
    same = "" if change is None else f"; the function is the same to {change:.0e} of its logits"
    return f"Weights are in a basis that is easier to round ({', '.join(report['steps'])}){same}."


def analysis(schemes: int) -> str:
    """Why gradients are computed."""
    return (
        f"Which weights matter? Gradients of the model's own answers tell; from them comes the damage that each of "
        f"{schemes} schemes would do to each layer."
    )


def attempt(name: str, nbytes: int, damage: float, budget: float) -> str:
    """A plan before it is made real."""
    share = f"{damage:.4f} nats, {damage / budget:.0%} of the budget"
    if name.startswith("uniform"):
        return f"Would one scheme for all do as well? {name}, {_mib(nbytes)} of layers: predicted {share}."
    return (
        f"Trying {name}: {_mib(nbytes)} of layers, predicted {share}. Each block is rounded on what those before give."
    )


def result(measurement: Any, increase: float, held: bool) -> str:
    """What was measured, and what follows."""
    follows = "it holds" if held else "more than its budget, so it is taken back"
    if not measurement.domains:
        follows = "it holds" if held else f"more than {increase:.1%}, so it is taken back"
        found = f"perplexity {measurement.perplexity_increase:+.2%}"
    else:
        name, worst = max(measurement.domains.items(), key=lambda item: item[1].perplexity_increase)
        found = f"perplexity {measurement.perplexity_increase:+.2%}, {worst.perplexity_increase:+.2%} in {name}"
    return (
        f"Measured: {measurement.damage:.4f} nats, {found}, same first choice {measurement.agreement:.1%}: {follows}."
    )


def distilled(before: float, after: float, kept: bool) -> str:
    """What training scales and gains brought."""
    done = "kept" if kept else "no gain, so not kept"
    return f"Scales and gains trained towards the original, no byte more: {before:.4f} → {after:.4f} nats, {done}."


def proving(nbytes: int, windows: int) -> str:
    """What the proof is about to do."""
    return f"The proof of the plan of {_mib(nbytes)}, on up to {windows} windows that nothing has seen so far."


def proof(certificate: Any) -> str:
    """What it says."""
    return f"{certificate}."


def delivered(memory: Any, conflict: str | None) -> str:
    """The end."""
    told = "The delivered model computes what was measured. " + (f"But {conflict}. " if conflict else "")
    return f"{told}{_mib(memory.original_total)} → {_mib(memory.total)} (−{memory.reduction:.1%})."


def begin_whole(layout: Any, sizes: Any, budget: Any, reason: str) -> str:
    """What there is and what is asked, of a module without blocks that could be run one at a time."""
    dtype = str(sizes.dtype).removeprefix("torch.")
    return (
        f"{len(layout.layers)} matrices, {_mib(sizes.original)} in {dtype}. Every pass goes through the whole model, "
        f"which is slower than block by block, since {reason}. Wanted: at most {_mib(sizes.limit)} "
        f"(−{sizes.reduction:.0%}) with {budget}."
    )


def examples(splits: Any) -> str:
    """What each part of the examples is for."""
    return (
        f"Examples: {len(splits.calibration)} to learn from, {len(splits.selection)} to steer by, and "
        f"{len(splits.certification)} that only the proof will see."
    )


def attempt_whole(name: str, nbytes: int, damage: float, budget: Any) -> str:
    """A plan before it is made real."""
    asked = "Would one scheme for all do as well? " if name.startswith("uniform") else "Trying "
    return f"{asked}{name}: {_mib(nbytes)} of layers, predicted damage {damage:.4g} {budget.unit}."


def result_whole(measurement: Any, budget: Any) -> str:
    """What was measured, and what follows."""
    follows = "it holds" if measurement.spent <= budget.limit else f"not {budget}, so it is taken back"
    return f"Measured: {measurement.damage:.4g} {budget.unit}, {budget.said(measurement.spent)}: {follows}."


def proving_whole(nbytes: int, count: int) -> str:
    """What the proof is about to do."""
    return f"The proof of the plan of {_mib(nbytes)}, on up to {count} examples that nothing has seen so far."
