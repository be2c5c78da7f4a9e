"""GradualEvaluator against the model's own logits and torch's losses."""

from __future__ import annotations

import math

import pytest
import torch

import bitween
from bitween import Scheme
from bitween.gradual import GradualEvaluator
from bitween.realise.candidate import Candidate
from bitween.realise.context import RunContext


@pytest.fixture
def context(tiny_model, tiny_tokenizer):
    return RunContext.build(
        tiny_model, tiny_tokenizer, calibration_samples=4, selection_samples=3, evaluation_samples=12, length=64
    )


def rounded(context, scheme):
    candidate = Candidate(context.model, context.layout)
    for layer in context.layout.layers:
        candidate.put(layer, bitween.quantize(layer.weight, scheme))
    return candidate.model


def plain_measure(model, candidate, windows):
    """(KL, ln ratio) by torch in float64, from whole logits."""
    with torch.no_grad():
        p = model(windows).logits.double().log_softmax(-1)[:, :-1]
        q = candidate(windows).logits.double().log_softmax(-1)[:, :-1]
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    target = windows[:, 1:, None]
    return kl, (p.gather(-1, target) - q.gather(-1, target)).mean().item()


def test_measure_equals_torch(context, tiny_model, tiny_tokenizer):
    candidate = rounded(context, Scheme(4, 32))
    found = GradualEvaluator(tiny_model, tiny_tokenizer, context=context).measure(candidate)
    kl, ratio = plain_measure(tiny_model, candidate, context.text.selection.ids)
    assert found.damage == pytest.approx(kl, rel=0.05)
    assert math.log1p(found.perplexity_increase) == pytest.approx(ratio, abs=0.1 * kl + 1e-3)
    assert found.tokens == 3 * 63


def test_reference_against_itself_is_zero(context, tiny_model, tiny_tokenizer):
    found = GradualEvaluator(tiny_model, tiny_tokenizer, context=context).measure()
    assert found.damage == 0
    assert found.perplexity_increase == 0
    assert found.agreement == 1


def test_certificate_accepts_the_harmless_and_refuses_the_harmful(context, tiny_model, tiny_tokenizer):
    evaluator = GradualEvaluator(tiny_model, tiny_tokenizer, context=context)
    assert evaluator.certify(rounded(context, Scheme(8, 32)), 0.05).verdict == "accepted"
    assert evaluator.certify(rounded(context, Scheme(2, 64)), 0.01).verdict == "refused"


def test_evaluation_reports_memory_and_proof(context, tiny_model, tiny_tokenizer):
    evaluator = GradualEvaluator(tiny_model, tiny_tokenizer, context=context)
    result = evaluator.comprehensive_evaluation(rounded(context, Scheme(8, 64)), max_perplexity_increase=0.05)
    plain = result.to_dict()
    assert plain["quality"]["tokens"] == 6 * 8 * 63  # of each domain as many as a bound needs
    assert plain["certificate"]["verdict"] == "accepted"
    assert "nats/token" in str(result)
