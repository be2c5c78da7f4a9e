"""Gradual runs on every task: half of the bytes saved, within a budget of damage, with its proof."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from bitween import Scheme, set_matmul_mode
from bitween.gradual import GradualQuantizer
from bitween.layers.packed import packed_layers
from bitween.model.outputs import tensors_of
from tests.tasks.models import TASKS, make
from tests.tasks.test_uniform import distance, outputs, unpacked

SCHEMES = tuple(Scheme(bits, 32) for bits in (3, 4, 8))
FAST = {"stages": 1, "calibration_samples": 16, "evaluation_samples": 12, "schemes": SCHEMES}


def quantizer(model: nn.Module, examples, *, tokenizer=None, target: float = 0.5, **options) -> GradualQuantizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GradualQuantizer(model, tokenizer, target, calibration_data=examples, **{**FAST, **options})


@pytest.mark.parametrize("name", [name for name in TASKS if name != "nn.Sequential"])
def test_half_of_the_bytes_go(name):
    model, examples = make(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    run = quantizer(model, examples, max_damage=0.2)
    quantized = run.quantize()
    report = run.get_quantization_report()
    assert report.memory.reduction >= 0.5
    assert report.conflict is None
    assert report.certificate["verdict"] == "accepted"
    assert 0 < report.quality["damage"] <= 0.2
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    expected = unpacked(model, quantized)
    for example in examples[:2]:
        assert distance(outputs(expected, example), outputs(quantized, example)) < 1e-3
    assert "runs as a whole" in str(report)


def test_the_damage_reported_is_the_damage_there_is():
    """KL of the selection examples, computed here by torch alone."""
    model, examples = make("BERT, sequence classes")
    run = quantizer(model, examples, max_damage=0.2)
    quantized = run.quantize()
    set_matmul_mode(quantized, "exact")
    chosen = run._whole.context.examples.selection
    found = []
    for example in chosen:
        ref, cand = (outputs(m, example.kwargs)["logits"].double().log_softmax(-1) for m in (model, quantized))
        found.append((ref.exp() * (ref - cand)).sum(-1).mean().item())
    assert run.get_quantization_report().quality["damage"] == pytest.approx(sum(found) / len(found), rel=1e-3)


def test_a_plain_module_is_judged_by_the_error_of_its_outputs():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(48, 96), nn.ReLU(inplace=True), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 8)
    ).eval()
    x = torch.randn(80, 48)
    run = quantizer(model, DataLoader(x, batch_size=16), max_damage=0.05, target=0.7)
    quantized = run.quantize()
    assert run.get_quantization_report().memory.reduction >= 0.7
    assert len(packed_layers(quantized)) == 3
    with torch.no_grad():
        error = ((quantized(x) - model(x)).pow(2).mean() / model(x).var()).item()
    assert 0 < error < 0.05


def test_predicted_damage_is_near_what_is_measured():
    """The curvature's promise, before any stage has corrected it."""
    for name in ("ViT, images", "BERT, masked LM"):
        model, examples = make(name, count=60)
        run = quantizer(model, examples, max_damage=1.0, method="rtn", calibration_samples=30, target=0.7)
        run.quantize()
        stage = run.get_quantization_report().stages[0]
        assert 0.25 < stage["damage"] / stage["predicted"] < 4


def test_a_metric_is_the_budget():
    model, examples = make("ViT, images", count=60)
    pictures = torch.cat([e["pixel_values"] for e in examples])
    truth = model(pixel_values=pictures).logits.argmax(-1)

    def accuracy(candidate: nn.Module) -> torch.Tensor:
        return (candidate(pixel_values=pictures).logits.argmax(-1) == truth).float()

    run = quantizer(model, examples, metric=accuracy, max_metric_drop=0.3)
    quantized = run.quantize()
    report = run.get_quantization_report()
    assert accuracy(quantized)[::2].mean().item() == pytest.approx(report.quality["value"], abs=1e-6)
    assert report.quality["reference"] == 1.0
    assert report.certificate["of"] == "metric down by"
    assert "metric" in str(report)
    alone = quantizer(model, examples, metric=lambda m: accuracy(m).mean(), max_metric_drop=0.3)
    alone.quantize()
    assert alone.get_quantization_report().certificate is None  # one number has no spread


@pytest.mark.parametrize("name", ["BERT, masked LM", "T5, sequence to sequence"])
def test_labels_give_a_perplexity(name):
    model, examples = make(name)
    run = quantizer(model, examples, max_perplexity_increase=0.2)
    run.quantize()
    report = run.get_quantization_report()
    assert report.targets["budget"]["kind"] == "perplexity"
    assert report.quality["value"] / report.quality["reference"] - 1 <= 0.2
    assert abs(report.perplexity_increase) < 0.2


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    model, examples = make("BERT, sequence classes")
    first = quantizer(model, examples, max_damage=0.2, journal=tmp_path / "j").quantize()
    again = quantizer(model, examples, max_damage=0.2, journal=tmp_path / "j")
    second = again.quantize()
    assert again._whole.seconds.get("curvature") is None  # taken from the journal
    for (_, a), (_, b) in zip(packed_layers(first), packed_layers(second), strict=True):
        assert torch.equal(a.codes, b.codes)
    assert tensors_of(first(**examples[0])).keys() == tensors_of(second(**examples[0])).keys()
