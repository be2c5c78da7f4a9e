"""Predicted and measured damage of a mixture of experts rounded to nearest at one width, before and after correction.

    python benchmarks/routing.py [MODEL_DIR] [--bits 2 3 4 5 6] [--group-size 32] [--windows 24]

All experts and the other layers beside them in each block are rounded; measured is the KL in nats a token on windows of
the shipped text that taught neither prediction. By default the tests' own model.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import common
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitween
from bitween import Scheme
from bitween.gradual import ImportanceAnalyzer
from bitween.gradual.scores.fisher import score_layers
from bitween.gradual.scores.rerouting import corrected_for_routing, routed_units
from bitween.model.experts import unfolded
from bitween.realise.context import RunContext

TINY = Path(__file__).parents[1] / "tests" / "tiny"


def measured(context: RunContext, layers: list, scheme: Scheme) -> float:
    """KL of the model with all these layers rounded."""
    changed, total = copy.deepcopy(context.model), 0.0
    with torch.no_grad():
        for layer in layers:
            weight = changed.get_submodule(layer.name).weight
            weight.copy_(bitween.quantize(weight, scheme).dequantize(weight.dtype))
        for ids in context.text.selection.ids:
            p, q = (m(input_ids=ids[None]).logits.double().log_softmax(-1) for m in (context.model, changed))
            total += (p.exp() * (p - q)).sum(-1).mean().item()
    return total / len(context.text.selection.ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", default=str(TINY / "experts"))
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4, 5, 6])
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--windows", type=int, default=24)
    options = parser.parse_args()
    model = unfolded(AutoModelForCausalLM.from_pretrained(options.directory, dtype=torch.float32).eval())
    own = (Path(options.directory) / "tokenizer.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(options.directory if own else TINY / "model")
    text = {"calibration_samples": options.windows, "evaluation_samples": 1, "selection_samples": 8, "length": 128}
    context = RunContext.build(model, tokenizer, **text)
    analyzer = ImportanceAnalyzer(model, tokenizer, context=context, probe_length=128, probe_stride=1)
    curvature = analyzer.analyze_curvature()
    layers = [layer for unit in routed_units(context.layout) for layer in unit.layers]
    rows = []
    for bits in options.bits:
        scheme = Scheme(bits, options.group_size)
        plain = score_layers(context.layout, curvature, [scheme], feedback=False, ranges="minmax")
        found = corrected_for_routing(plain, curvature, analyzer.probe)
        sums = (sum(float(scores[x.name].damage[0]) for x in layers) for scores in (plain, found))
        row = dict(zip(("sum of scores", "corrected"), sums, strict=True)) | {
            "measured": measured(context, layers, scheme)
        }
        rows.append({"scheme": str(scheme)} | {key: float(f"{value:.3g}") for key, value in row.items()})
    print(common.show(rows))


if __name__ == "__main__":
    main()
