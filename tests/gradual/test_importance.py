"""Importance methods, curvature and predicted damage, against what really happens to the tiny model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import bitween
from bitween import Scheme
from bitween.gradual import ImportanceAnalyzer, PrecisionOptimizer
from bitween.gradual.scores.curvature import _sample, block_variances, collect_curvature, conditional_variances
from bitween.gradual.scores.fisher import _sample_rows, score_layers
from bitween.gradual.scores.methods import METHODS
from bitween.gradual.scores.probe import block_units, layer_units
from bitween.realise.context import RunContext
from tests.tiny_models import make, tokens

OPTIONS = {"calibration_samples": 16, "selection_samples": 2, "evaluation_samples": 8, "length": 64}
SEED_WEIGHTS = {"noise_injection": 0.15, "rtn_sensitivity": 0.40, "block_disable": 0.20, "layer_upgrade": 0.25}


@pytest.fixture
def analyzer(tiny_model, tiny_tokenizer):
    return ImportanceAnalyzer(tiny_model, tiny_tokenizer, probe_windows=8, probe_length=64, probe_stride=1, **OPTIONS)


def state_bytes(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_default_weights_are_the_documented_ones():
    assert {name: method.weight for name, method in METHODS.items() if method.weight} == SEED_WEIGHTS


def test_block_importance_leaves_the_model_untouched(analyzer, tiny_model):
    before = state_bytes(tiny_model)
    report = analyzer.analyze_block_importance()
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_model.state_dict().items())
    assert set(report.damage) == set(SEED_WEIGHTS)
    assert len(report.combined) == len(analyzer.context.layout.blocks)
    assert all(0 <= value <= 1 for value in report.combined.values())
    assert report.order[0] == min(report.combined, key=report.combined.get)
    assert "rank correlation" in str(report)


def test_rtn_sensitivity_is_the_real_damage(analyzer, tiny_model):
    unit = block_units(analyzer.context.layout)[1]
    found = METHODS["rtn_sensitivity"].compute(analyzer.probe, [unit])[unit.name]
    ids = analyzer.context.text.calibration.ids[:8, :64]
    with torch.no_grad():
        p = tiny_model(ids).logits.double().log_softmax(-1)
        for layer in unit.layers:
            layer.module.weight.copy_(bitween.quantize(layer.weight, Scheme(4, 64)).dequantize(torch.float32))
        q = tiny_model(ids).logits.double().log_softmax(-1)
    assert found == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=0.1)


def test_weights_are_checked_and_normalised(tiny_model, tiny_tokenizer):
    analyzer = ImportanceAnalyzer(tiny_model, tiny_tokenizer, weights={"rtn_sensitivity": 2.0}, **OPTIONS)
    assert analyzer.weights == {"rtn_sensitivity": 1.0}
    with pytest.raises(ValueError, match="weights: expected methods"):
        ImportanceAnalyzer(tiny_model, tiny_tokenizer, weights={"magic": 1.0}, **OPTIONS)


def test_thresholds_share_the_budget(analyzer):
    thresholds = analyzer.get_block_thresholds(global_budget=0.05)
    combined = analyzer.analyze_block_importance().combined
    assert sum(thresholds.values()) == pytest.approx(np.log(1.05))
    assert max(thresholds, key=thresholds.get) == min(combined, key=combined.get)


def test_curvature_leaves_no_gradients_behind(analyzer, tiny_model):
    """Those of a head are as large as the head, and somebody may be training the model."""
    own = {name: torch.randn(p.shape) for name, p in tiny_model.named_parameters() if p.requires_grad}
    assert own
    for name, gradient in own.items():
        tiny_model.get_parameter(name).grad = gradient.clone()
    collect_curvature(analyzer.context, gradient_windows=1, hessian_windows=1)
    assert all(torch.equal(tiny_model.get_parameter(name).grad, gradient) for name, gradient in own.items())


@pytest.mark.parametrize("n", [1, 15, 100, 577])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_variances_are_those_of_a_cholesky_factor(n, dtype):
    rng = np.random.default_rng(n)
    x = rng.standard_normal((2 * n, n)) @ rng.standard_normal((n, n))
    h = (x.T @ x / n).astype(dtype)
    given = h.copy()
    exact = h.astype(np.float64)
    exact = (exact + exact.T) / 2
    exact += 0.01 * np.trace(exact) / n * np.eye(n)
    factor = np.linalg.cholesky(exact[::-1, ::-1])[::-1, ::-1]
    np.testing.assert_allclose(conditional_variances(h), np.diagonal(factor) ** 2, rtol=1e-12)
    parts = sorted(np.split(np.arange(n), range(16, n, 16)), key=lambda k: -h[k, k].mean())
    order, ends = np.concatenate(parts), np.cumsum([len(k) for k in parts])
    factor = np.linalg.cholesky(exact[np.ix_(order, order)][::-1, ::-1])[::-1, ::-1]
    expected = [(factor[b - len(k) : b, b - len(k) : b] ** 2).sum(1) for k, b in zip(parts, ends, strict=True)]
    np.testing.assert_allclose(block_variances(h)[order], np.concatenate(expected), rtol=1e-12)
    assert np.array_equal(h, given)


def test_a_matrix_without_a_factor_is_an_error():
    with pytest.raises(np.linalg.LinAlgError, match="positive definite"):
        conditional_variances(np.diag([1.0, -1.0, 1.0, -1.0]))


def test_conditional_variances_are_gptqs_own():
    x = np.random.default_rng(0).standard_normal((500, 24)) @ np.random.default_rng(1).standard_normal((24, 24))
    h = x.T @ x / 500
    damped = h + 0.01 * np.trace(h) / 24 * np.eye(24)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T  # the factor that GPTQ walks along
    np.testing.assert_allclose(conditional_variances(h), 1 / np.diagonal(upper) ** 2, rtol=1e-6)


def test_predicted_damage_ranks_and_scales_like_real_damage(analyzer, tiny_model):
    """Fisher times error without feedback predicts the real KL of rounding single layers, without a fit."""
    analyzer.analyze_curvature(elementwise=True, gradient_windows=16)
    scheme = Scheme(3, 64)
    predicted = analyzer.predict_damage([scheme], feedback=False, ranges="minmax")
    units = layer_units(analyzer.context.layout)
    real = [analyzer.probe.damage(analyzer.probe.rounded(u.layers, scheme), u.block) for u in units]
    guess = [predicted[unit.name].damage[0] for unit in units]
    assert spearmanr(real, guess).statistic > 0.9
    assert 0.6 < sum(guess) / sum(real) < 1.6
    assert all(np.isfinite(score.relative_error) for score in predicted.values())


def test_predicted_damage_of_a_whole_plan_with_feedback(tiny_model, tiny_tokenizer):
    """Embedding and head included: what the planner adds up is what GPTQ leaves, without a fit."""
    context = RunContext.build(tiny_model, tiny_tokenizer, length=64, calibration_samples=64, selection_samples=16)
    scheme = Scheme(4, 64)
    curvature = collect_curvature(context, gradient_windows=16, hessian_windows=64)
    predicted = score_layers(context.layout, curvature, [scheme])
    real = PrecisionOptimizer(tiny_model, tiny_tokenizer, context=context).realise(dict.fromkeys(predicted, scheme))
    assert 0.5 < sum(score.damage[0] for score in predicted.values()) / real.measurement.damage < 1.8


def test_sampled_rows_estimate_the_sum():
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, 5001) ** 1.2  # few rows hold most of the weight, as tokens do
    rng.shuffle(weights)
    values = rng.random(5000)
    rows, factors = _sample_rows(weights, 500)
    assert len(rows) <= 500
    assert factors.sum() == pytest.approx(weights.sum())
    assert factors @ values[rows] == pytest.approx(weights @ values, rel=0.02)
    rows, factors = _sample_rows(weights, 5000)
    assert (rows == np.arange(5000)).all()
    assert (factors == weights).all()


def test_labels_are_drawn_from_the_models_distribution():
    p = torch.tensor([0.5, 0.0, 0.3, 0.2]).expand(20000, 4)
    labels = _sample(p, torch.rand(len(p), 1, generator=torch.Generator().manual_seed(0)))
    frequencies = torch.bincount(labels, minlength=4) / len(labels)
    torch.testing.assert_close(frequencies, p[0], atol=0.015, rtol=0)
    assert frequencies[1] == 0


class Scaled(torch.nn.Embedding):
    """A table whose rows count sixteen times, as Gemma's do."""

    def forward(self, ids):
        return super().forward(ids) * 16


def test_a_scaled_table_is_as_dear_as_the_same_table_without_a_scale(tiny_model):
    tiny_model.config.tie_word_embeddings = False
    own = tiny_model.get_input_embeddings().weight.detach()
    tiny_model.get_output_embeddings().weight = torch.nn.Parameter(own.clone())
    predicted = []
    for kind, factor in ((torch.nn.Embedding, 1), (Scaled, 16)):
        table = kind(*own.shape)
        table.weight = torch.nn.Parameter(own / factor)
        tiny_model.set_input_embeddings(table)
        options = {"calibration_data": torch.arange(3, 643).reshape(20, 32) % len(own), **OPTIONS, "length": 32}
        context = RunContext.build(tiny_model, None, products="fp32", bounded=False, **options)
        curvature = collect_curvature(context, gradient_windows=2, hessian_windows=2)
        scores = score_layers(context.layout, curvature, [Scheme(4, 64)])
        predicted.append(scores[context.layout.embedding.name].damage[0])
    assert predicted[0] > 0
    assert predicted[1] == pytest.approx(predicted[0], rel=1e-3)


def test_a_table_narrower_than_the_blocks_is_scored():
    model = make("electra", embedding_size=16, is_decoder=True)
    options = {"calibration_data": tokens(20, 24), **OPTIONS, "length": 24}
    context = RunContext.build(model, None, products="fp32", bounded=False, **options)
    curvature = collect_curvature(context, gradient_windows=2, hessian_windows=2)
    found = score_layers(context.layout, curvature, [Scheme(4, 16)])[context.layout.embedding.name]
    assert curvature[context.layout.embedding.name].moment.shape == (16,)
    assert found.damage[0] > 0
