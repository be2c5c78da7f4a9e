"""The fused rounding and its gradient against torch autograd, and training that never ends worse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bitween
from bitween import Scheme, _core, gptq
from bitween.model.blocks import BlockRunner, inspect
from bitween.realise.block_training import train_block
from bitween.rounding.signround import TrainedRounding, _Rounded, train_on_hessian
from bitween.scheme import BITS
from tests import tiny_models
from tests.core.reference_gptq import row_errors
from tests.core.test_gptq import problem

ISAS = bitween.info()["isas"]


@pytest.fixture(params=ISAS)
def isa(request):
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(None)


def through(x, rounded):
    """Straight-through: the value of `rounded`, the gradient of x."""
    return x + (rounded - x).detach()


def by_torch(weight, offset, low, high, scheme):
    """The same function written with torch operations, so that autograd differentiates it."""
    cols = weight.shape[1]
    group = cols if scheme.group_size == -1 else scheme.group_size
    top = scheme.levels - 1
    step = high / (top - scheme.zero) if scheme.symmetric else (high - low) / top
    scale = through(step, step.half().float())
    zero = torch.full_like(scale, scheme.zero)
    if not scheme.symmetric:
        zero = -low / scale
        zero = through(zero, zero.round()).clamp(0, top)
    scale, zero = (t.repeat_interleave(group, 1)[:, :cols] for t in (scale, zero))
    t = weight / scale + zero + offset
    return (through(t, t.round()).clamp(0, top) - zero) * scale


def inputs(rows, cols, scheme, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.layout(rows, cols)["n_groups"]
    weight = torch.randn(rows, cols, generator=generator)
    offset = torch.rand(rows, cols, generator=generator) - 0.5
    low = -0.3 - torch.rand(rows, groups, generator=generator)
    high = 0.3 + torch.rand(rows, groups, generator=generator)
    if groups > 1:
        low[0, 0], high[0, 0] = 0.2, 1.1  # a range beside 0 holds the zero at an end
    return weight, offset.requires_grad_(), low.requires_grad_(), high.requires_grad_()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("cols", "group"), [(128, 64), (77, 32), (5, 16), (130, -1)])
def test_values_and_gradients_equal_autograd(isa, bits, symmetric, cols, group):
    scheme = Scheme(bits, group, symmetric)
    mine, other = inputs(6, cols, scheme), inputs(6, cols, scheme)
    value, expected = _Rounded.apply(*mine, scheme), by_torch(*other, scheme)
    same = (value - expected).abs() < 1e-5
    assert same.float().mean() > 0.99  # a product with 1/scale and a quotient may fall on two sides of a tie
    grad = torch.randn(6, cols, generator=torch.Generator().manual_seed(5)) * same
    value.backward(grad)
    expected.backward(grad)
    for got, wanted in zip(mine[1:], other[1:], strict=True):
        if wanted.grad is not None:
            assert torch.allclose(got.grad, wanted.grad, rtol=1e-3, atol=1e-4 * wanted.grad.abs().max().item() + 1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_untrained_state_is_the_start(bits, symmetric):
    weight, hessian = problem(12, 161)
    for h in (None, torch.from_numpy(hessian)):
        start = gptq(weight, Scheme(bits, 64, symmetric), hessian).quantized
        rounding = TrainedRounding(torch.from_numpy(weight), start, h)
        again = rounding.quantized()
        np.testing.assert_array_equal(again.scales, start.scales)
        np.testing.assert_array_equal(again.unpack_zeros(), start.unpack_zeros())
        np.testing.assert_array_equal(again.codes, start.codes)
        np.testing.assert_array_equal(rounding.values().detach().numpy(), start.dequantize())


@pytest.mark.parametrize("method", ["rtn", "gptq+refine"])
@pytest.mark.parametrize("scheme", [Scheme(2), Scheme(3, 32, True), Scheme(4), Scheme(1.58, -1)], ids=str)
def test_training_never_raises_a_rows_error(method, scheme):
    weight, hessian = problem(24, 128)
    start = bitween.quantize(weight, scheme, method=method, hessian=hessian)
    trained = train_on_hessian(torch.from_numpy(weight), start, torch.from_numpy(hessian), steps=40)
    before, after = (row_errors(weight, q.dequantize(), hessian) for q in (start, trained))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() <= (0.99 if method == "rtn" else 1) * before.sum()  # refined codes may be past improving


def test_quantize_knows_it():
    weight, hessian = problem(10, 128)
    refined, trained = (
        bitween.quantize(weight, Scheme(2), method=m, hessian=hessian) for m in ("gptq+refine", "signround")
    )
    before, after = (row_errors(weight, q.dequantize(), hessian).sum() for q in (refined, trained))
    assert after <= before


def test_row_22_a_step_without_a_loss_is_dropped(monkeypatch):
    model = tiny_models.make("llama")
    runner = BlockRunner(model, inspect(model), products="fp32")
    calls, plain = [0], BlockRunner.run_block

    def sometimes_nan(self, i, hidden, context, *, grad=False):
        out = plain(self, i, hidden, context, grad=grad)
        calls[0] += grad
        return out * float("nan") if grad and calls[0] == 3 else out

    with runner:
        batches = [runner.embed(tiny_models.tokens(4, 16))]
        targets = [runner.run_block(0, h, c) for h, c in batches]
        layers = runner.layout.blocks[0].layers
        stored = {x.name: (x, x.weight, bitween.quantize(x.weight, Scheme(2, 16))) for x in layers}
        monkeypatch.setattr(BlockRunner, "run_block", sometimes_nan)
        trained, before, after = train_block(runner, 0, stored, batches, targets, steps=40)
    assert calls[0] == 40
    assert after < 0.8 * before
    assert all(torch.isfinite(q.dequantize(torch.float32)).all() for q in trained.values())


def test_block_training_lowers_the_output_error():
    model = tiny_models.make("llama")
    runner = BlockRunner(model, inspect(model), products="fp32")
    layers = {x.name: x for x in runner.layout.blocks[0].layers}
    with runner:
        batches = [runner.embed(ids) for ids in tiny_models.tokens(4, 16).split(2)]
        targets = [runner.run_block(0, h, c) for h, c in batches]
        stored = {name: (x, x.weight, bitween.quantize(x.weight, Scheme(2, 16))) for name, x in layers.items()}
        parameters = {name: x.module.weight for name, x in layers.items()}
        trained, before, after = train_block(runner, 0, stored, batches, targets, steps=40)
        assert all(x.module.weight is parameters[name] for name, x in layers.items())
        for name, x in layers.items():
            x.module.weight = torch.nn.Parameter(trained[name].dequantize(torch.float32))
        errors = [(runner.run_block(0, h, c) - t).square().mean() for (h, c), t in zip(batches, targets, strict=True)]
        assert after < 0.8 * before
        assert sum(errors).item() / 2 == pytest.approx(after, rel=1e-4)
        same, first, last = train_block(runner, 0, stored, batches, targets, steps=0)
        assert first == last
        assert all(same[name] is stored[name][2] for name in layers)
