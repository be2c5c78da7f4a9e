"""Scores of a mixture of experts, corrected by measured damage, against rounding and running it in plain torch."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import bitween
from bitween import Scheme
from bitween.gradual import ImportanceAnalyzer
from bitween.gradual.scores.fisher import score_layers
from bitween.gradual.scores.rerouting import MEASURED, corrected_for_routing, routed_units
from bitween.model.experts import unfolded
from bitween.realise.context import RunContext

TRAINED = Path(__file__).parents[1] / "tiny" / "experts"
ROUNDED = {"feedback": False, "ranges": "minmax"}  # round to nearest is what the trials do


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TRAINED, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def analyzer(model, tiny_tokenizer):
    base = unfolded(model)
    text = {"calibration_samples": 8, "evaluation_samples": 1, "selection_samples": 8, "length": 128}
    context = RunContext.build(base, tiny_tokenizer, **text)
    return ImportanceAnalyzer(base, tiny_tokenizer, context=context, probe_windows=4, probe_length=128, probe_stride=1)


def divergence(model, changed, ids):
    """Mean KL over all positions, nats a token."""
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits.double().log_softmax(-1) for m in (model, changed))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def rounded(model, ids, part, block, scheme):
    """KL of the model with the experts of one block, or its attention, rounded to nearest."""
    changed = copy.deepcopy(model)
    layer = changed.model.layers[block]
    with torch.no_grad():
        if part == "experts":
            for stack in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                for matrix in stack:
                    matrix.copy_(bitween.quantize(matrix.contiguous(), scheme).dequantize(torch.float32))
        else:
            for name in "qkvo":
                weight = getattr(layer.self_attn, f"{name}_proj").weight
                weight.copy_(bitween.quantize(weight, scheme).dequantize(torch.float32))
    return divergence(model, changed, ids)


def test_units_are_experts_and_the_layers_beside_them(analyzer, tiny_model):
    units = routed_units(analyzer.context.layout)
    assert [unit.name for unit in units[:2]] == ["experts of model.layers.0", "other layers of model.layers.0"]
    assert [len(unit.layers) for unit in units] == [16, 4] * 4
    assert {layer.kind for unit in units for layer in unit.layers} == {"expert", "linear"}
    assert routed_units(bitween.model.blocks.inspect(tiny_model)) == []


@pytest.mark.parametrize("part", ["experts", "other layers"])
def test_scores_of_a_unit_add_up_to_what_rounding_it_does(model, analyzer, part):
    schemes = MEASURED
    curvature = analyzer.analyze_curvature()
    plain = score_layers(analyzer.context.layout, curvature, schemes, **ROUNDED)
    found = corrected_for_routing(plain, curvature, analyzer.probe)
    ids = analyzer.context.text.calibration.ids[:4, :128]
    for unit in routed_units(analyzer.context.layout):
        if not unit.name.startswith(part):
            continue
        for k, scheme in enumerate(schemes):
            total = sum(found[layer.name].damage[k] for layer in unit.layers)
            assert total == pytest.approx(rounded(model, ids, part, unit.block, scheme), rel=0.02)


@pytest.mark.parametrize("bits", [2, 5, 6])
def test_predictions_of_uniform_plans_come_nearer(analyzer, bits):
    """On text that taught neither: all experts and attention layers of one width, rounded to nearest."""
    scheme = Scheme(bits, 32)
    curvature = analyzer.analyze_curvature()
    plain = score_layers(analyzer.context.layout, curvature, [scheme], **ROUNDED)
    found = corrected_for_routing(plain, curvature, analyzer.probe)
    layers = [layer for unit in routed_units(analyzer.context.layout) for layer in unit.layers]
    changed = copy.deepcopy(analyzer.context.model)
    with torch.no_grad():
        for layer in layers:
            weight = changed.get_submodule(layer.name).weight
            weight.copy_(bitween.quantize(weight, scheme).dequantize(torch.float32))
    measured = divergence(analyzer.context.model, changed, analyzer.context.text.selection.ids)
    before, after = (sum(s[layer.name].damage[0] for layer in layers) for s in (plain, found))
    assert abs(np.log(after / measured)) < 0.5 * abs(np.log(before / measured))


def test_a_dense_model_keeps_its_scores(tiny_model, tiny_tokenizer):
    context = RunContext.build(tiny_model, tiny_tokenizer, calibration_samples=2, evaluation_samples=1, length=64)
    analyzer = ImportanceAnalyzer(tiny_model, tiny_tokenizer, context=context)
    curvature = analyzer.analyze_curvature()
    plain = score_layers(context.layout, curvature, [Scheme(4, 64)])
    assert all(np.array_equal(analyzer.predict_damage([Scheme(4, 64)])[n].damage, s.damage) for n, s in plain.items())
    assert analyzer._probe is None  # no trial was run
