"""Row factors and norm gains: what they fold into, and that training them brings the model nearer to the original."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bitween
from bitween import Scheme
from bitween.gradual import PrecisionOptimizer
from bitween.realise.context import RunContext
from bitween.realise.distillation import distill, rescaled


@pytest.mark.parametrize("scheme", [Scheme(4, 64), Scheme(3, 32, True), Scheme(1.58, -1)], ids=str)
def test_factors_fold_into_scales(scheme):
    tensor = bitween.quantize(torch.randn(7, 100), scheme)
    factors = torch.linspace(0.7, 1.4, 7)
    changed = rescaled(tensor, factors)
    np.testing.assert_allclose(
        changed.dequantize(), tensor.dequantize() * factors.numpy()[:, None], rtol=6e-4, atol=1e-7
    )
    assert changed.nbytes == tensor.nbytes
    assert np.shares_memory(changed.codes, tensor.codes)
    least = rescaled(tensor, torch.full((7,), 1e-9))
    assert np.isfinite(least.dequantize()).all()


@pytest.fixture
def optimizer(tiny_model, tiny_tokenizer):
    context = RunContext.build(tiny_model, tiny_tokenizer, length=64, calibration_samples=32, selection_samples=16)
    return PrecisionOptimizer(tiny_model, tiny_tokenizer, context=context)


def test_distillation_lowers_the_damage_and_restores(optimizer):
    weights = {name: p.clone() for name, p in optimizer.candidate.model.named_parameters()}
    layers = [layer for block in optimizer.context.layout.blocks for layer in block.layers]
    before = optimizer.realise({layer.name: Scheme(2, 32) for layer in layers})
    after = optimizer.distill(before, 40)
    assert all(p.grad is None for p in optimizer.candidate.model.parameters())
    assert after.measurement.damage < 0.985 * before.measurement.damage
    assert after.nbytes == before.nbytes
    assert all(np.array_equal(after.stored[name].codes, before.stored[name].codes) for name in before.stored)
    again = optimizer.evaluator.measure(optimizer.runner)
    assert again == after.measurement
    optimizer.restore(before)
    assert optimizer.evaluator.measure(optimizer.runner) == before.measurement
    optimizer.restore(after)
    assert optimizer.evaluator.measure(optimizer.runner) == after.measurement
    model = optimizer.candidate.install(torch.float32)
    bitween.set_matmul_mode(model, "exact")
    packed = optimizer.evaluator.measure(model)
    assert packed.damage == pytest.approx(after.measurement.damage, rel=0.02)
    optimizer.candidate.restore_all()
    for name, parameter in optimizer.context.model.named_parameters():
        assert torch.equal(parameter, weights[name])


def test_the_model_is_as_it_was_after_a_failure(optimizer):
    runner, model = optimizer.runner, optimizer.candidate.model
    layers = [layer for block in runner.layout.blocks for layer in block.layers]
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}

    def reference(i):
        raise RuntimeError("no text")

    with pytest.raises(RuntimeError, match="no text"):
        distill(runner, layers, optimizer.context.text.calibration.ids, reference, steps=3)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(id(after[name]) == place and torch.equal(after[name], p) for name, (place, p) in before.items())
    assert not any(module._forward_hooks for module in model.modules())
