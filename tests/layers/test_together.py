"""Layers that are multiplied together give the bits that each gives alone."""

import pytest
import torch

import bitween
from bitween import QuantizedLinear, Scheme, _core, quantize
from bitween.layers import set_matmul_mode

SCHEMES = [Scheme(4, 32), Scheme(3, 16), Scheme(1.58, -1, True), Scheme(8, 128)]


def make_layers(count=3, bias=True):
    torch.manual_seed(0)
    found = []
    for i in range(count):
        weight = torch.randn(20 + 50 * i, 200)
        added = torch.randn(len(weight)) if bias else None
        found.append(QuantizedLinear(quantize(weight, SCHEMES[i % len(SCHEMES)]), added))
    return torch.nn.ModuleList(found)


@pytest.fixture
def calls(monkeypatch):
    """How often the core was asked for one product and for several."""
    found = {"matmul": 0, "matmul_together": 0}
    for name in found:
        original = getattr(_core, name)

        def counted(*args, name=name, original=original):
            found[name] += 1
            return original(*args)

        monkeypatch.setattr(_core, name, counted)
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("mode", ["exact", "int8", "int16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(200,), (3, 200), (2, 8, 200), (17, 200), (0, 200)])
def test_the_same_bits(count, mode, dtype, shape):
    layers, x = make_layers(count, bias=count != 2), torch.randn(shape).to(dtype)
    set_matmul_mode(layers, mode)
    with torch.no_grad():
        found, want = bitween.multiply_together(layers, x), [layer(x) for layer in layers]
    assert len(found) == count
    assert all(map(torch.equal, found, want))


def test_one_call(calls):
    layers = make_layers(4)
    with torch.no_grad():
        bitween.multiply_together(layers, torch.ones(1, 1, 200))
    assert calls == {"matmul": 0, "matmul_together": 1}


def test_what_one_call_would_change_goes_its_own_way(calls):
    layers, x = make_layers(2), torch.randn(2, 200)
    into = x.clone().requires_grad_()
    sum(y.sum() for y in bitween.multiply_together(layers, into)).backward()
    assert into.grad.abs().sum() > 0
    layers[0].mode = "exact"
    with torch.no_grad():
        found = bitween.multiply_together(layers, x)
        strided = bitween.multiply_together(layers, x.t().contiguous().t())
    assert all(map(torch.equal, found, strided))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert {y.dtype for y in bitween.multiply_together(layers, x)} == {torch.bfloat16}
    assert calls["matmul_together"] == 0


def test_bad_input_is_refused():
    layers = make_layers(2)
    layers.append(QuantizedLinear(quantize(torch.ones(4, 32), Scheme(4, 32))))
    with pytest.raises(ValueError, match=r"layers: expected as many input features each; got \[32, 200\]"):
        bitween.multiply_together(layers, torch.ones(1, 200))
    assert bitween.multiply_together([], torch.ones(1, 200)) == []
    with pytest.raises(ValueError, match=r"x: expected shape"):
        bitween.multiply_together(layers[:2], torch.ones(1, 100))


def test_bad_input_is_refused_by_the_core():
    stored = quantize(torch.ones(4, 32), Scheme(4, 32))
    x, out = torch.ones(1, 32), torch.empty(1, 4)
    layer = (stored.codes, stored.scales, stored.zeros, stored.scheme.key, 32, None)
    _core.matmul_together(x, (), (), 0)
    for layers, outs, error, match in [
        ([layer], (out,), TypeError, "layers: expected a tuple"),
        ((layer,), [out], TypeError, "outs: expected a tuple"),
        ((layer,) * 5, (out,) * 5, ValueError, "at most 4"),
        ((layer,), (), ValueError, "as many outs; got 1 and 0"),
        ((layer[:5],), (out,), TypeError, "tuples of 6"),
        ((layer, layer), (out, out), ValueError, "outs"),
        ((layer, layer), (out, torch.empty(1, 4, dtype=torch.bfloat16)), TypeError, "outs: expected one dtype"),
        ((layer,), (torch.empty(1, 5),), ValueError, r"out: expected shape \(1, 4\)"),
    ]:
        with pytest.raises(error, match=match):
            _core.matmul_together(x, layers, outs, 0)


@pytest.mark.parametrize("mode", ["int8", "int16"])
@pytest.mark.parametrize("group", [32, 128])
def test_widths_that_want_activations_in_another_order_do_not_share_them(mode, group):
    schemes = [Scheme(bits, group) for bits in (2, 4, 8, 3)] + [Scheme(1.58, group, True), Scheme(5, group)]
    layers = torch.nn.ModuleList(QuantizedLinear(quantize(torch.randn(24, 200), scheme)) for scheme in schemes)
    set_matmul_mode(layers, mode)
    x = torch.randn(3, 200)
    for chosen in (list(layers)[:4], list(layers)[2:], [layers[1], layers[1], layers[0]]):
        with torch.no_grad():
            found = bitween.multiply_together(chosen, x)
            plain = [x @ layer.dequantize(torch.float32).T for layer in chosen]
            assert all(map(torch.equal, found, [layer(x) for layer in chosen]))
        for got, want in zip(found, plain, strict=True):
            assert (got - want).abs().max() < (0.2 if mode == "int8" else 2e-3) * want.std()
