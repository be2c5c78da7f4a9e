"""Layers that are multiplied together give the bits that each gives alone."""

import copy
import pickle
import threading

import pytest
import torch

from bitween import QuantizedLinear, Scheme, _core, quantize
from bitween.layers import set_matmul_mode
from bitween.together import multiply_together
from tests import quantized_models

SCHEMES = [Scheme(4, 32), Scheme(3, 16), Scheme(2, 64, True), Scheme(1.58, -1, True), Scheme(8, 128), Scheme(5, 64)]


@pytest.fixture
def model():
    return quantized_models.llama(SCHEMES).eval()


def logits(model, n):
    with torch.no_grad():
        return model(torch.arange(n).reshape(1, n) % 60).logits


@pytest.mark.parametrize("mode", ["exact", "int8", "int16"])
@pytest.mark.parametrize("n", [1, 3, 16, 17])
def test_the_same_bits(model, n, mode):
    set_matmul_mode(model, mode)
    alone = logits(model, n)
    assert multiply_together(model) == 2 * model.config.num_hidden_layers
    assert torch.equal(logits(model, n), alone)
    assert torch.equal(logits(model, n), alone)


def count_calls(monkeypatch):
    calls = {"matmul": 0, "matmul_together": 0}
    for name in calls:
        original = getattr(_core, name)

        def counted(*args, name=name, original=original):
            calls[name] += 1
            return original(*args)

        monkeypatch.setattr(_core, name, counted)
    return calls


def test_one_call_for_each_group(model, monkeypatch):
    multiply_together(model)
    calls, blocks = count_calls(monkeypatch), model.config.num_hidden_layers
    logits(model, 1)
    assert calls["matmul_together"] == 2 * blocks
    assert calls["matmul"] == 2 * blocks  # o and down; the head is not quantized
    for layer in model.modules():
        assert getattr(layer, "_together", None) is None or not layer._together._waiting


def test_layers_with_other_inputs_leave(monkeypatch):
    parent = torch.nn.Module()
    weights = torch.randn(3, 20, 64, generator=torch.Generator().manual_seed(1))
    for name, weight in zip(("q_proj", "k_proj", "v_proj"), weights, strict=True):
        setattr(parent, name, QuantizedLinear(quantize(weight, Scheme(4, 32)), torch.ones(20)))
    x, y = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = [parent.q_proj(x), parent.k_proj(y), parent.v_proj(y)]
        multiply_together(parent)
        calls = count_calls(monkeypatch)
        for _ in range(3):
            found = [parent.q_proj(x), parent.k_proj(y), parent.v_proj(y)]
            assert all(map(torch.equal, found, expected))
    assert calls["matmul_together"] == 1
    assert parent.k_proj._together is None


def test_an_input_that_changed_is_multiplied_again(model):
    multiply_together(model)
    attention, x = model.model.layers[0].self_attn, torch.ones(1, model.config.hidden_size)
    with torch.no_grad():
        attention.q_proj(x)
        x.mul_(2)
        k = attention.k_proj(x)
    assert torch.equal(k, attention.k_proj.multiply(x))


def test_gradients_go_the_usual_way(model):
    multiply_together(model)
    attention, x = model.model.layers[0].self_attn, torch.ones(1, model.config.hidden_size, requires_grad=True)
    (attention.q_proj(x).sum() + attention.k_proj(x).sum()).backward()
    assert x.grad.abs().sum() > 0


def test_copies_are_without_it(model):
    multiply_together(model)
    expected = logits(model, 2)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(getattr(layer, "_together", None) is None for layer in other.modules())
        assert torch.equal(logits(other, 2), expected)
    assert len(pickle.dumps(model.model.layers[0].self_attn.q_proj)) < 20_000


def test_threads_do_not_mix(model):
    multiply_together(model)
    expected, wrong = {n: logits(model, n) for n in (1, 2, 3, 4)}, []

    def work(n):
        for _ in range(20):
            if not torch.equal(logits(model, n), expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_bad_input_is_refused():
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
