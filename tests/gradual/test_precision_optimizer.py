"""Plans made real, single blocks walked down, and exact rollback."""

from __future__ import annotations

import pytest
import torch

from bitween import Scheme
from bitween.gradual import PrecisionOptimizer

OPTIONS = {"calibration_samples": 8, "selection_samples": 2, "evaluation_samples": 8, "length": 64}


@pytest.fixture
def optimizer(tiny_model, tiny_tokenizer):
    return PrecisionOptimizer(tiny_model, tiny_tokenizer, **OPTIONS)


def block_plan(optimizer, scheme):
    return {layer.name: scheme for block in optimizer.context.layout.blocks for layer in block.layers}


def test_realise_quantizes_what_the_plan_says(optimizer, tiny_model):
    before = {name: t.clone() for name, t in tiny_model.state_dict().items()}
    plan = block_plan(optimizer, Scheme(4, 32))
    done = optimizer.realise(plan)
    assert set(done.stored) == set(plan)
    for name, tensor in done.stored.items():
        weight = optimizer.candidate.model.get_submodule(name).weight
        assert torch.equal(weight.data, tensor.dequantize(torch.float32))
    assert 0 < done.measurement.damage < 1
    assert all(torch.equal(before[n], t) for n, t in tiny_model.state_dict().items())


def test_gptq_is_better_than_rounding(optimizer, tiny_model, tiny_tokenizer):
    rounding = PrecisionOptimizer(tiny_model, tiny_tokenizer, method="rtn", context=optimizer.context)
    plan = block_plan(optimizer, Scheme(3, 64))
    assert optimizer.realise(plan).measurement.damage < rounding.realise(plan).measurement.damage


def test_restore_is_exact(optimizer, tiny_model):
    first = optimizer.realise(block_plan(optimizer, Scheme(4, 64)))
    optimizer.realise(block_plan(optimizer, Scheme(2, 64)))
    optimizer.restore(first)
    again = optimizer.evaluator.measure(optimizer.runner)
    assert again.damage == first.measurement.damage
    optimizer.candidate.restore_all()
    for layer in optimizer.context.layout.layers:
        module = optimizer.candidate.model.get_submodule(layer.name)
        assert module.weight.data_ptr() == layer.module.weight.data_ptr()


def test_walk_stops_where_the_threshold_says(optimizer):
    name = optimizer.context.layout.blocks[1].name
    steps = optimizer.progressive_block_quantization(name, 0.02)
    last = steps[-1]
    assert last.accepted
    assert last.damage <= 0.02
    assert last.nbytes == min(step.nbytes for step in steps if step.accepted)
    assert steps[0].target_bits == 8
    for layer in optimizer.context.layout.blocks[1].layers:
        assert optimizer.candidate.stored[layer.name].scheme.bits == last.target_bits


def test_walk_that_holds_nowhere_leaves_the_block_alone(optimizer):
    name = optimizer.context.layout.blocks[0].name
    steps = optimizer.progressive_block_quantization(name, 1e-12)
    assert steps[-1].target_bits == 16
    assert not any(step.accepted for step in steps[:-1])
    assert not optimizer.candidate.stored


@pytest.mark.parametrize("threshold", [0, -1, float("nan")])
def test_bad_threshold(optimizer, threshold):
    with pytest.raises(ValueError, match="threshold: expected nats > 0"):
        optimizer.progressive_block_quantization(optimizer.context.layout.blocks[0].name, threshold)


def test_unknown_names(optimizer):
    with pytest.raises(ValueError, match="block_name: expected one of"):
        optimizer.progressive_block_quantization("model.layers.99", 0.1)
    with pytest.raises(ValueError, match="plan: expected layers"):
        optimizer.realise({"nothing": Scheme(4)})
