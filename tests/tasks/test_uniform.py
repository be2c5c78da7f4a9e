"""Bitween on every task: what was delivered computes what its own unpacked numbers compute."""

import copy

import pytest
import torch
from torch import nn

from bitween import Bitween
from bitween.layers.packed import packed_layers
from bitween.model.outputs import tensors_of
from bitween.model.replay import settled
from tests.tasks.models import TASKS, make


def outputs(model: nn.Module, example: dict) -> dict[str, torch.Tensor]:
    with settled(model), torch.no_grad():
        return tensors_of(model(**example))


def unpacked(original: nn.Module, quantized: nn.Module) -> nn.Module:
    """A copy of the original in which quantized matrices hold what the packed ones stand for."""
    plain = copy.deepcopy(original)
    with torch.no_grad():
        for name, layer in packed_layers(quantized):
            weight = plain.get_submodule(name).weight
            weight.copy_(layer.dequantize(torch.float32).reshape(weight.shape))
    return plain


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest root mean square difference of an output, relative to its spread."""
    sizes = {n: x.std().item() if x.numel() > 1 else x.abs().max().item() for n, x in a.items()}
    return max((a[n] - b[n]).pow(2).mean().sqrt().item() / max(sizes[n], 1e-6) for n in a)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_uniform_model_computes_what_its_numbers_say(name, method):
    model, examples = make(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    quantizer = Bitween(model, bits=4, embeddings=True)
    quantized = quantizer.quantize(method=method, calibration_data=examples if method == "gptq" else None)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert len(packed_layers(quantized)) >= 2
    expected = unpacked(model, quantized)
    for example in examples[:3]:
        assert distance(outputs(expected, example), outputs(quantized, example)) < 1e-3
    assert distance(outputs(model, examples[0]), outputs(quantized, examples[0])) > 1e-4  # it is another model


@pytest.mark.parametrize("name", ["ViT, images", "T5, sequence to sequence", "Swin, images"])
def test_hessians_bring_more_than_rounding(name):
    model, examples = make(name)
    found = {}
    for method in ("rtn", "gptq+refine"):
        quantized = Bitween(model, bits=3).quantize(method=method, calibration_data=examples[:30])
        pairs = [(outputs(model, e), outputs(quantized, e)) for e in examples[30:]]
        found[method] = sum(distance(a, b) for a, b in pairs)
    assert found["gptq+refine"] < found["rtn"]
