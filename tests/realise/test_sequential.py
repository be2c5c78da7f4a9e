"""Layers quantized in order, on inputs from the prefix as it was quantized."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import bitween
from bitween import Scheme
from bitween.model.blocks import BlockRunner, inspect
from bitween.realise.sequential import SequentialQuantizer
from tests import tiny_models


def prepared(family="llama", **options):
    model = tiny_models.make(family)
    runner = BlockRunner(model, inspect(model), products="fp32")
    return model, runner, SequentialQuantizer(runner, **options)


def plan_for(runner, scheme):
    return {layer.name: scheme for block in runner.layout.blocks for layer in block.layers}


def windows(n=6, length=24):
    return tiny_models.tokens(n, length)


def inputs_of(model, layers, ids):
    """{layer: float64 (tokens, features)} that one forward pass of the whole model feeds each layer."""
    seen = {}
    handles = [
        layer.module.register_forward_pre_hook(lambda _m, args, name=layer.name: seen.update({name: args[0].clone()}))
        for layer in layers
    ]
    tiny_models.logits(model, ids)
    for handle in handles:
        handle.remove()
    return {name: x.reshape(-1, x.shape[-1]).double() for name, x in seen.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("batch", [6, 2])
def test_inputs_come_from_the_quantized_prefix(family, batch):
    """What a layer reads depends only on what runs before it, so the finished model shows what it was fitted to."""
    model, runner, quantizer = prepared(family, share=0)
    ids = windows()
    batches = quantizer.embed(ids.split(batch))
    results = list(quantizer.run(plan_for(runner, Scheme(3, 16)), batches))
    assert sorted(r.layer.name for r in results) == sorted(plan_for(runner, None))
    inputs = inputs_of(model, [r.layer for r in results], ids)
    for result in results:
        original = result.original.T if result.layer.kind == "conv1d" else result.original
        missed = inputs[result.layer.name] @ (original - result.quantized.dequantize(torch.float32)).double().T
        assert result.error == pytest.approx(missed.square().sum(1).mean().item(), rel=5e-3)
    with runner:
        last = torch.cat([hidden for hidden, _ in batches])
        assert torch.allclose(runner.logits(runner.final(last)), tiny_models.logits(model, ids), atol=1e-3)


@pytest.mark.parametrize("batch", [6, 2])
def test_restoring_is_exact(batch):
    model, runner, quantizer = prepared()
    ids = windows()
    before = tiny_models.logits(model, ids)
    results = list(quantizer.run(plan_for(runner, Scheme(2, 16)), quantizer.embed(ids.split(batch))))
    assert not torch.equal(before, tiny_models.logits(model, ids))
    for result in results:
        result.restore()
    assert torch.equal(before, tiny_models.logits(model, ids))


@pytest.mark.parametrize("batch", [6, 2])
def test_each_layer_by_its_own_method_and_scheme(batch):
    _, runner, quantizer = prepared()
    plan = plan_for(runner, Scheme(4, 16))
    names = list(plan)
    methods = dict.fromkeys(plan, "gptq")
    methods[names[0]], methods[names[1]] = "rtn", "clip"
    plan[names[2]], plan[names[3]] = Scheme(2, 32, True), None
    kept = runner.layout.layer(names[3]).module.weight
    quantizer.method = methods
    results = {r.layer.name: r for r in quantizer.run(plan, quantizer.embed(windows().split(batch)))}
    assert names[3] not in results
    assert runner.layout.layer(names[3]).module.weight is kept
    for name, result in results.items():
        assert result.quantized.scheme == plan[name]
        assert result.method == methods[name]
        assert (result.error is None) == (methods[name] in ("rtn", "clip"))
        values = result.quantized.dequantize(torch.float32)
        assert torch.equal(values, result.layer.module.weight)
    original = results[names[0]].original.detach()
    rounded = bitween.quantize(original, Scheme(4, 16))
    np.testing.assert_array_equal(rounded.codes, results[names[0]].quantized.codes)


def test_token_weights_select_the_tokens():
    """Tokens of weight 0 might as well not be there."""
    found = []
    for keep in (None, 48):
        _, runner, quantizer = prepared(method="gptq")
        if keep:
            mask = torch.cat([torch.ones(keep), torch.zeros(144 - keep)])
            quantizer.token_weights = lambda _name, _batch, mask=mask: mask
        ids = windows() if keep else windows()[:2]
        first = quantizer.run_block(0, plan_for(runner, Scheme(3, 16)), quantizer.embed([ids]))
        found.append({r.layer.name: r.quantized.unpack_codes() for r in first})
    for name, codes in found[0].items():
        assert (codes == found[1][name]).mean() > 0.95, name


def test_row_14_experts_that_no_token_reaches_are_clipped():
    _, runner, quantizer = prepared("mixtral")
    results = list(quantizer.run(plan_for(runner, Scheme(4, 16)), quantizer.embed([windows(1, 3)])))
    assert len(results) == sum(len(block.layers) for block in runner.layout.blocks)
    assert {r.method for r in results} <= {"gptq+refine", "clip"}


def test_progress_names_every_layer():
    steps = []
    _, runner, quantizer = prepared(method="rtn", progress=lambda *step: steps.append(step))
    plan = plan_for(runner, Scheme(4, 16))
    list(quantizer.run(plan, quantizer.embed([windows()])))
    assert [layer for stage, _, layer, _ in steps if stage == "quantize"] == list(plan)
    assert all(seconds >= 0 for *_, seconds in steps)


def test_bad_arguments_change_nothing():
    model, runner, quantizer = prepared()
    before = tiny_models.logits(model, windows())
    with pytest.raises(ValueError, match="plan: expected layers of the model's blocks; got 'nowhere'"):
        next(quantizer.run({"nowhere": Scheme(4)}, quantizer.embed([windows()])))
    quantizer.method = {}
    with pytest.raises(ValueError, match="method: expected one for every layer"):
        next(quantizer.run(plan_for(runner, Scheme(4, 16)), quantizer.embed([windows()])))
    with pytest.raises(ValueError, match="method: expected one of"):
        SequentialQuantizer(runner, method="magic")
    assert torch.equal(before, tiny_models.logits(model, windows()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch", [6, 2])
def test_training_brings_the_model_closer(family, batch):
    ids, logits = windows(), {}
    for method in ("gptq+refine", "signround"):
        model, runner, quantizer = prepared(family, method=method, steps=60, share=0)
        before = tiny_models.logits(model, ids)
        batches = quantizer.embed(ids.split(batch))
        results = list(quantizer.run(plan_for(runner, Scheme(2, 16)), batches))
        logits[method] = tiny_models.logits(model, ids)
        assert {r.method for r in results} == {method}
        for result in results:  # what is stored is what the model computes with
            values = result.layer.as_weight(result.quantized.dequantize(torch.float32))
            assert torch.equal(result.layer.module.weight, values)
        with runner:
            last = torch.cat([hidden for hidden, _ in batches])
            assert torch.allclose(runner.logits(runner.final(last)), logits[method], atol=1e-3)
        for result in results:
            result.restore()
        assert torch.equal(before, tiny_models.logits(model, ids))
    wrong = {method: (x - before).square().mean().item() for method, x in logits.items()}
    assert wrong["signround"] < 0.9 * wrong["gptq+refine"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch", [6, 2])
def test_layers_aim_at_what_the_untouched_model_gives(family, batch):
    """Each layer's target is the damped least squares answer to W* x = W y, y what the untouched model feeds it."""
    model, runner, quantizer = prepared(family, share=1.0, method="gptq")
    ids = windows()
    exact = inputs_of(model, [x for block in runner.layout.blocks for x in block.layers], ids)
    results = list(quantizer.run(plan_for(runner, Scheme(3, 16)), quantizer.embed(ids.split(batch))))
    current = inputs_of(model, [r.layer for r in results], ids)
    moved = 0.0
    for result in results:
        original = (result.original.T if result.layer.kind == "conv1d" else result.original).double()
        x, y = current[result.layer.name], exact[result.layer.name]
        hessian, cross = x.T @ x / len(x), y.T @ x / len(x)
        damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(len(hessian))
        target = original + original @ (cross - hessian) @ damped.inverse()
        missed = x @ (target - result.quantized.dequantize(torch.float32)).T
        assert result.error == pytest.approx(missed.square().sum(1).mean().item(), rel=2e-2)
        moved = max(moved, ((target - original).norm() / original.norm()).item())
    assert moved > 0.01


def test_aiming_at_the_untouched_model_does_less_damage(tiny_model, tiny_tokenizer):
    from bitween.text.calibration import prepare

    text = prepare(tiny_tokenizer, None, length=128, calibration=24, selection=8, certification=1)
    before = tiny_models.logits(tiny_model, text.selection.ids).log_softmax(-1)
    damage = {}
    for share in (0.0, 0.5):
        model = copy.deepcopy(tiny_model)
        runner = BlockRunner(model, inspect(model), products="fp32")
        quantizer = SequentialQuantizer(runner, share=share)
        list(quantizer.run(plan_for(runner, Scheme(2, 32)), quantizer.embed([text.calibration.ids])))
        after = tiny_models.logits(model, text.selection.ids).log_softmax(-1)
        damage[share] = (before.exp() * (before - after)).sum(-1).mean().item()
    assert damage[0.5] < 0.97 * damage[0.0]
