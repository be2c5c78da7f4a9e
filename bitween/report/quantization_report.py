"""QuantizationReport: what was asked, done and measured, as an object that prints and serialises."""

from __future__ import annotations

import json
import math
import platform
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from bitween.model.memory import MemoryAnalysis

__all__ = ["QuantizationReport", "decision", "machine"]

SCHEMA_VERSION = 1


def machine() -> dict[str, Any]:
    """What the run was made on: CPU, instruction set, threads, BLAS, versions."""
    import numpy
    import torch

    from bitween.functional import info

    facts = info()
    return {
        "cpu": _cpu_name(),
        "isa": facts["isa"],
        "threads": facts["threads"],
        "blas": facts["blas"],
        "blas_core": facts["blas_core"],
        "bitween": facts["version"],
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def decision(stage: dict[str, Any]) -> str:
    """What became of a stage, in a few words."""
    if stage.get("delivered"):
        return "held: delivered" if stage["accepted"] else "broke the budget: delivered all the same"
    return "held" if stage["accepted"] else "broke the budget: rolled back"


@dataclass(frozen=True)
class QuantizationReport:
    """The outcome of a gradual quantization.

    Attributes
    ----------
    targets : what was asked: memory reduction and perplexity increase, relative; confidence; seed; ...
    memory : bytes before and after, by layer and block
    quality : measured on the selection text (KL in nats per token, perplexity)
    certificate : the proof on held-out text, or None
    plan : {layer: "4b g64 sym" or "kept"}
    stages : what was realised on the way, in order
    frontier : [(bytes of the layers, predicted damage in nats per token)]
    importance : block importance by method, or None
    text : where the text came from and how many windows each part got
    transforms : equivalent transforms applied, and those skipped with a reason
    conflict : None, or why both targets could not be met, with the nearest trade-offs
    uniform : the best uniform scheme of at most the same bytes, measured
    seconds : {stage: seconds}
    machine : what it ran on
    unreached_experts : experts that no calibration token was routed to; they were rounded by their weights alone
    routing : {module of experts: share of the selection text's tokens that go to another set of experts than in the
        original model}; empty where there are none
    full_precision : what no plan could change and holds a thousandth of the bytes or more: name, bytes, why
    """

    targets: dict[str, Any]
    memory: MemoryAnalysis
    quality: dict[str, float]
    certificate: dict[str, Any] | None
    plan: dict[str, str]
    stages: list[dict[str, Any]]
    frontier: list[tuple[int, float]]
    importance: dict[str, Any] | None
    text: dict[str, Any]
    transforms: dict[str, Any]
    conflict: dict[str, Any] | None
    uniform: dict[str, Any] | None
    seconds: dict[str, float]
    machine: dict[str, Any] = field(default_factory=machine)
    unreached_experts: list[str] = field(default_factory=list)
    routing: dict[str, float] = field(default_factory=dict)
    full_precision: list[dict[str, Any]] = field(default_factory=list)

    @property
    def average_bits(self) -> float:
        """8 * bytes of all quantizable layers / their weights, scales and zeros included."""
        return self.targets["average_bits"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; bytes, seconds and nats as the attributes say."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "memory"}
        return {"schema_version": SCHEMA_VERSION, **values, "memory": self.memory.to_dict()}

    def to_json(self) -> str:
        """The same as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        t, m = self.targets, self.memory
        lines = [
            "bitween gradual quantization",
            f"  asked     memory −{t['memory_reduction']:.0%}, {self._asked()}",
            *([f"  way       {t['way']}"] if "way" in t else []),
            f"  memory    {m.original_total / 2**20:,.1f} → {m.total / 2**20:,.1f} MiB (−{m.reduction:.1%}), "
            f"{self.average_bits:.2f} bits per weight over all layers, plain numbers in {m.dtype or 'their own dtype'}",
            f"  proof     {self.proof}",
            *self._domain_lines(),
            f"  selection {self._selection()}",
            f"  schemes   {self._schemes()}",
            *self._stage_lines(),
        ]
        if self.uniform:
            lines.append(f"  uniform   best of at most these bytes: {self.uniform['text']}")
        if self.conflict:
            lines.append(f"  conflict  {self.conflict['text']}")
        if self.unreached_experts:
            kind = "layers " if "budget" in t else "experts"
            lines.append(f"  {kind}   {len(self.unreached_experts)} were reached by no calibration text")
        if self.routing:
            worst = max(self.routing, key=self.routing.get)
            mean = sum(self.routing.values()) / len(self.routing)
            lines.append(f"  routing   {mean:.1%} of tokens go to other experts, {self.routing[worst]:.1%} in {worst}")
        for entry in self.full_precision:
            share = entry["bytes"] / m.original_total if m.original_total else 0.0
            lines.append(f"  kept      {entry['name']} ({share:.1%} of the bytes): {entry['why']}")
        if m.peak:
            lines.append(f"  peak      {m.peak / 2**20:,.0f} MiB of memory for this process")
        spent = ", ".join(f"{name} {value:.0f}" for name, value in self.seconds.items())
        lines.append(f"  seconds   {spent}")
        return "\n".join(lines)

    def _asked(self) -> str:
        budget = self.targets.get("budget")
        return budget["text"] if budget else f"perplexity at most +{self.targets['perplexity_increase']:.1%}"

    def _selection(self) -> str:
        q = self.quality
        if "text" in q:
            return f"{q['text']}, {q['tokens']:,} rows of output that steered the search"
        return (
            f"KL {q['damage']:.4f} nats/token, perplexity {q['reference_perplexity']:.2f} → "
            f"{q['perplexity']:.2f} ({q['perplexity_increase']:+.2%}), same first choice {q['agreement']:.1%} "
            f"({q['tokens']:,} tokens that steered the search)"
        )

    @property
    def perplexity_increase(self) -> float:
        """Relative, as the proof's held-out text has it; where none was asked for, as the selection text has it.

        NaN of a budget that is not of perplexity.
        """
        budget = self.targets.get("budget")
        if budget and budget["kind"] != "perplexity":
            return math.nan
        if self.certificate is None and budget:
            return self.quality["value"] / self.quality["reference"] - 1
        if self.certificate is None:
            return self.quality["perplexity_increase"]
        increase = self.certificate["increase"]  # None: not finite, as JSON has no infinity
        return math.inf if increase is None else math.expm1(min(increase, 700.0))

    @property
    def proof(self) -> str:
        """The certificate in one line."""
        return self.certificate["text_line"] if self.certificate else "none asked for"

    def _domain_lines(self) -> list[str]:
        """A row of the proof for each domain."""
        parts = (self.certificate or {}).get("domains") or {}
        lines = []
        for name, part in parts.items():
            found, bound, budget = (
                math.inf if part[f"perplexity_{key}"] is None else part[f"perplexity_{key}"]
                for key in ("increase", "bound", "budget")
            )
            lines.append(
                f"    {name:12s}{found:+7.2%}, at most {bound:+.2%} of {budget:+.1%}: {part['verdict']} "
                f"({part['tokens']:,} tokens)"
            )
        return lines

    def _schemes(self) -> str:
        counts = Counter(self.plan.values())
        return ", ".join(f"{n} × {scheme}" for scheme, n in sorted(counts.items(), key=lambda x: (-x[1], x[0])))

    def _stage_lines(self) -> list[str]:
        lines = []
        for stage in self.stages:
            if "text" in stage:  # of a model that runs as a whole
                told = f"{stage['name']:24s} {stage['nbytes'] / 2**20:7.1f} MiB   damage {stage['damage']:.4g} "
                told += f"(predicted {stage['predicted']:.4g})   {stage['text']}   "
                lines.append(f"  stage     {told}{decision(stage)}")
                continue
            lines.append(
                f"  stage     {stage['name']:24s} {stage['nbytes'] / 2**20:7.1f} MiB   KL {stage['damage']:.4f} "
                f"(predicted {stage['predicted']:.4f})   perplexity {stage['quality']['perplexity_increase']:+.2%}   "
                + decision(stage)
            )
        return lines

    def _repr_html_(self) -> str:
        """In notebooks: the same text, and the heat map of bits where matplotlib is installed."""
        from html import escape

        text = f"<pre>{escape(str(self))}</pre>"
        try:
            from bitween.report.page import picture
        except ImportError:
            return text
        return text + picture("bits", self.to_dict())
