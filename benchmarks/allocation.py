"""Where the bits go: whole plans of equal bytes from different scores, all realised by the same quantizer and measured.

    python benchmarks/allocation.py MODEL_DIR --text FILE [--bits 5 4.25 3.5 3] [--rows bitween uniform ...]

All linear layers of the decoder are planned; embedding and head stay as they are and are not counted. "bits" are bytes
of codes, scales and zeros times 8 over weights. KL (nats a token) and the rise of perplexity are measured on the first
12 windows of 512 tokens of the text; what is learned comes from its last --windows windows. "predicted" is the damage
that the plan's own score promises, where it is one in nats; "corrected" is what a descent makes of it, which has
measured bitween's plans of more bits before (from the second on).

AutoScheme (of auto-round, run by peers.py with the interpreter that --python names) allocates by its own score and
rounds in its own way, to nearest or trained; it may miss the bits that it was asked for, so its row tells what it took.

Rows are merged into results/allocation.json, so that long runs can be split; results/allocation.md shows all of them.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import common
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitween
from bitween import Scheme
from bitween.gradual import ImportanceAnalyzer, PrecisionOptimizer
from bitween.gradual.plan.damage_model import learned
from bitween.gradual.plan.items import Item, Option
from bitween.gradual.plan.planner import frontier
from bitween.gradual.scores.fisher import candidate_schemes
from bitween.model.experts import shared_copy
from bitween.realise.context import RunContext
from bitween.text.calibration import TokenWindows

LENGTH, SCORED = 512, 12
NAME = "allocation"


class Subject:
    """A model in context: calibration from the end of the text, measurement on its start."""

    def __init__(self, path: str, text: str, windows: int):
        self.path, self.name = path, Path(path).name
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        ids = tokenizer(text, return_tensors="pt").input_ids[0]
        cut = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
        context = RunContext.build(model, tokenizer, calibration_data=cut, length=LENGTH)
        parts = (("calibration", cut[-windows:]), ("selection", cut[:SCORED]))
        splits = {split: TokenWindows(ids, torch.arange(len(ids))) for split, ids in parts}
        context.text = replace(context.text, **splits)
        self.context = context
        self.schemes = candidate_schemes()
        self.analyzer = ImportanceAnalyzer(model, tokenizer, context=context, probe_windows=2)
        self.layers = [layer for block in context.layout.blocks for layer in block.layers]
        self.weights = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        self.optimizers = {
            method: PrecisionOptimizer(model, tokenizer, method=method, calibration_windows=windows, context=context)
            for method in ("gptq+refine", "gptq")
        }

    def limit(self, bits: float) -> int:
        """Bytes at `bits` a weight."""
        return int(bits * self.weights / 8)

    def errors(self, schemes, importance=None, rows=None) -> np.ndarray:
        """Weighted squared error of rounding to nearest on clipped ranges, (layers, schemes)."""
        found = []
        for layer in self.layers:
            columns = torch.ones(layer.shape[1]) if importance is None else importance(layer)
            found.append(bitween.search(layer.weight, schemes, columns, row_importance=rows and rows(layer)))
        return np.array(found)

    def items(self, damage: np.ndarray, schemes) -> list[Item]:
        return [
            Item(
                layer.name,
                tuple(Option(s, s.nbytes(*layer.shape), float(d)) for s, d in zip(schemes, row, strict=True)),
            )
            for layer, row in zip(self.layers, damage, strict=True)
        ]


# ---- scores: (subject) -> (damage (layers, schemes), schemes) --------------------------------------


def score_bitween(s: Subject, schemes=None):
    """Fisher times the conditional variance: what GPTQ will leave."""
    schemes = schemes or s.schemes
    scores = s.analyzer.predict_damage(schemes)
    return np.array([scores[layer.name].damage for layer in s.layers]), schemes


def score_bits_only(s: Subject):
    """The same, with groups of 64 for all."""
    return score_bitween(s, tuple(scheme for scheme in s.schemes if scheme.group_size == 64 and not scheme.symmetric))


def score_fisher_rtn(s: Subject):
    """Elementwise Fisher times the error of rounding, as if nothing compensated it."""
    s.analyzer.analyze_curvature(elementwise=True)
    scores = s.analyzer.predict_damage(s.schemes, feedback=False)
    return np.array([scores[layer.name].damage for layer in s.layers]), s.schemes


def score_trace_mse(s: Subject):
    """One Fisher trace a layer times the mean squared error (PrismaQuant's score)."""
    curvature = s.analyzer.analyze_curvature(elementwise=True)
    trace = np.array([curvature[layer.name].elementwise.double().mean().item() for layer in s.layers])
    return 0.5 * trace[:, None] * s.errors(s.schemes), s.schemes


def score_gradient(s: Subject):
    """Sum of |g dW|, first order (AutoScheme's score), with g the root of the elementwise Fisher."""
    curvature = s.analyzer.analyze_curvature(elementwise=True)
    found = np.zeros((len(s.layers), len(s.schemes)))
    for i, layer in enumerate(s.layers):
        slope = curvature[layer.name].elementwise.sqrt()
        for j, scheme in enumerate(s.schemes):
            wrong = bitween.quantize(layer.weight, scheme).dequantize(torch.float32) - layer.weight
            found[i, j] = (slope * wrong.abs()).sum().item()
    return found, s.schemes


def score_methods(s: Subject):
    """The four measured methods, 15/40/20/25 %, by block, times each layer's relative error."""
    combined = s.analyzer.analyze_block_importance().combined
    worth = [0.05 + combined[block.name] for block in s.context.layout.blocks for _ in block.layers]
    size = np.array([layer.weight.square().sum().item() for layer in s.layers])
    return np.array(worth)[:, None] * s.errors(s.schemes) / size[:, None], s.schemes


SCORES = {
    "bitween": score_bitween,
    "bits only, groups of 64": score_bits_only,
    "Fisher x RTN error": score_fisher_rtn,
    "trace x mean squared error": score_trace_mse,
    "sum |g dW|": score_gradient,
    "four measured methods": score_methods,
}
DISTILLED = ", distilled"
IN_NATS = ("bitween", "bits only, groups of 64", "Fisher x RTN error", "trace x mean squared error")
PEERS = {"AutoScheme, RTN": 0, "AutoScheme, 200 steps": 200}
UNIFORM = {"uniform GPTQ": "gptq", "uniform GPTQ + refinement": "gptq+refine"}


# ---- rows ------------------------------------------------------------------------------------------


def planned(s: Subject, name: str, sizes: list[float], steps: int):
    started = time.monotonic()
    front = frontier(s.items(*SCORES[name](s)))
    seconds = time.monotonic() - started
    for bits in sizes:
        plan = front.within_bytes(s.limit(bits))
        yield from row(s, name, plan.schemes, plan.damage if name in IN_NATS else None, "gptq+refine", seconds, steps)


def uniform(s: Subject, name: str, sizes: list[float], _: int):
    for bits in sizes:
        scheme = Scheme(int(bits), 64)
        yield from row(s, name, {layer.name: scheme for layer in s.layers}, None, UNIFORM[name], 0.0, 0)


def peer(s: Subject, name: str, sizes: list[float], pythons: list[str]):
    windows = s.context.text.calibration.ids
    for bits in sizes:
        found = common.run_peer("AutoScheme", pythons, s.path, windows, bits, PEERS[name])
        if found is None:
            raise SystemExit("AutoScheme: not installed; --python AutoScheme=PATH names an interpreter with auto-round")
        weights, told = found
        model = shared_copy(s.context.model)
        for layer in s.layers:
            model.get_submodule(layer.name).weight = torch.nn.Parameter(weights[layer.name], requires_grad=False)
        quality = s.optimizers["gptq"].evaluator.measure(model)
        yield _told(s, name, float(told["bits"]), None, quality, 0.0, float(told["seconds"]))


def row(s: Subject, name: str, plan, predicted, method: str, analysis: float, steps: int):
    """A row for the plan as realised, and with steps another after distillation."""
    nbytes = sum(plan[layer.name].nbytes(*layer.shape) for layer in s.layers)
    optimizer = s.optimizers[method]
    found = {name: optimizer.realise(plan)}
    if steps:
        found[name + DISTILLED] = optimizer.distill(found[name], steps)
    for kind, realised in found.items():
        yield _told(s, kind, 8 * nbytes / s.weights, predicted, realised.measurement, analysis, realised.seconds)


def _told(s: Subject, plan: str, bits: float, predicted, quality, analysis: float, seconds: float) -> dict[str, object]:
    return {
        "model": s.name,
        "plan": plan,
        "bits": round(bits, 3),
        "predicted": predicted,
        "corrected": None,  # filled in once all rows are there
        "KL": quality.damage,
        "perplexity %": 100 * quality.perplexity_increase,
        "analysis s": round(analysis, 1),
        "realise s": round(seconds, 1),
    }


def correct(rows: list[dict[str, object]]) -> None:
    """Fill "corrected", as a descent through bitween's own plans would have predicted them; rows fall in bits."""
    pairs: dict[object, list[tuple[float, float]]] = {}
    for r in rows:
        own = r["plan"] == "bitween"
        before = pairs.setdefault(r["model"], [])
        r["corrected"] = float(learned(before).total(r["predicted"])) if own and before else None
        if own:
            before.append((r["predicted"], r["KL"]))


def merge(found: dict[str, object], settings: dict[str, object]) -> None:
    """Put one row into the JSON in place of its like, and write the table."""
    path = common.RESULTS / f"{NAME}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    key = ("model", "plan", "bits")
    rows = [r for r in rows if any(r[k] != found[k] for k in key)] + [found]
    rows.sort(key=lambda r: (r["model"], -r["bits"], r["KL"]))
    correct(rows)
    common.save(NAME, rows, **settings)
    machine = common.machine()
    facts = ("cpu", "threads", "isa", "blas_core", "date")
    head = ", ".join(f"{fact.replace('_', ' ')} {machine[fact]}" for fact in facts)
    (common.RESULTS / f"{NAME}.md").write_text(f"{head}\n\n{common.show(rows)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory of a causal language model")
    parser.add_argument("--text", required=True, help="text file")
    parser.add_argument("--bits", type=float, nargs="+", default=[5.0, 4.25, 3.5, 3.0])
    parser.add_argument("--rows", nargs="+", default=[*SCORES, *UNIFORM], choices=[*SCORES, *UNIFORM, *PEERS])
    parser.add_argument("--windows", type=int, default=48, help="of calibration")
    parser.add_argument("--distill", type=int, default=40, help="steps after realising bitween's own plan; 0 for none")
    parser.add_argument("--python", nargs="+", default=[], metavar="AutoScheme=PATH", help="interpreter that has it")
    options = parser.parse_args()
    subject = Subject(options.model, Path(options.text).read_text(), options.windows)
    for name in options.rows:
        steps = options.distill if name == "bitween" else 0
        if name in PEERS:
            rows = peer(subject, name, options.bits, options.python)
        else:
            rows = (planned if name in SCORES else uniform)(subject, name, options.bits, steps)
        for found in rows:
            merge(found, {"windows": options.windows})
            print(common.show([found]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
