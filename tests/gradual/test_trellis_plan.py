"""Trellis codes as candidates: their predicted error, what the planner does with them, and who may have them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import bitween
from bitween import Scheme, _core
from bitween.gradual import GradualQuantizer, PrecisionOptimizer
from bitween.gradual.scores.curvature import block_variances, collect_curvature
from bitween.gradual.scores.fisher import candidate_schemes, score_layers, trellis_schemes
from bitween.gradual.scores.trellis_error import error_table, trellis_errors
from bitween.layers import packed_layers
from bitween.realise.context import RunContext
from bitween.report import plots

FAST = {
    "calibration_samples": 16,
    "evaluation_samples": 40,
    "sequence_length": 64,
    "importance": False,
    "stages": 2,
    "distillation_steps": 2,
}


def correlated(n, samples=4000, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, n)) @ (np.eye(n) + 0.3 * rng.standard_normal((n, n)) / np.sqrt(n))
    x *= np.exp(0.3 * rng.standard_normal(n))
    return x.T @ x / samples


def test_error_table_is_the_cores_error():
    normal = np.random.default_rng(5).standard_normal((32, 512)).astype(np.float32)
    for rate, most in ((1, 0.282), (2, 0.0755), (3, 0.0197), (4, 0.0052), (5, 0.0015)):
        stored = bitween.quantize(normal, Scheme.trellis(rate), method="trellis")
        found = ((normal - stored.dequantize()) ** 2).mean()
        table = error_table(rate, 12)
        assert table(np.abs(normal)).mean() == pytest.approx(found, rel=0.05)
        assert 4.0**-rate < table.mean < most  # above the rate-distortion bound of a Gaussian
        assert table(np.array([9.0])) > table(np.array([3.0])) > table(np.array([0.1]))


def test_block_variances_are_schur_complements():
    h = correlated(40)
    damped = h + 0.01 * np.trace(h) / 40 * np.eye(40)
    active = [np.diagonal(h)[k : k + 16].mean() for k in (0, 16, 32)]
    blocks = [np.arange(16 * k, min(40, 16 * k + 16)) for k in np.argsort(active)[::-1]]
    for place, own in enumerate(blocks):
        later = np.concatenate([*blocks[place + 1 :], np.array([], int)]).astype(int)
        schur = damped[np.ix_(own, own)]
        if len(later):
            across = damped[np.ix_(own, later)]
            schur = schur - across @ np.linalg.solve(damped[np.ix_(later, later)], across.T)
        np.testing.assert_allclose(block_variances(h)[own], np.diagonal(schur), rtol=1e-8)


@pytest.mark.parametrize("bits", [1.5, 2, 2.5, 3, 4, 4.5])
def test_predicted_error_is_what_the_quantizer_leaves(bits):
    """Within 15 %, feedback, order and shared-out rates included."""
    h, scheme = correlated(200), Scheme.trellis(bits)
    weight = np.random.default_rng(1).standard_normal((64, 200)).astype(np.float32)
    stored = bitween.quantize(weight, scheme, method="trellis", hessian=h.astype(np.float32))
    error = weight - stored.dequantize().astype(np.float64)
    real = np.einsum("ri,ij,rj->", error, h, error)
    predicted = trellis_errors(weight, [scheme], block_variances(h), np.ones(64))[0]
    assert predicted == pytest.approx(real, rel=0.15)


def test_outliers_and_zeros_are_predicted_finite():
    weight = np.zeros((3, 40), np.float32)
    weight[1, 7] = 1.0
    weight[2] = np.random.default_rng(0).standard_normal(40)
    schemes = trellis_schemes()
    alone = [trellis_errors(weight[k : k + 1], schemes, np.ones(40), np.ones(1)) for k in range(3)]
    assert (alone[0] == 0).all()
    assert all((errors >= 0).all() and np.isfinite(errors).all() for errors in alone)
    assert alone[1][-1] > alone[2][-1] * weight[1].var() / weight[2].var()  # one outlier is worse than its like spread
    np.testing.assert_allclose(trellis_errors(weight, schemes, np.ones(40), np.ones(3)), sum(alone))


def test_predicted_damage_of_a_whole_plan(tiny_model, tiny_tokenizer):
    context = RunContext.build(tiny_model, tiny_tokenizer, length=64, calibration_samples=64, selection_samples=16)
    curvature = collect_curvature(context, gradient_windows=16, hessian_windows=64, blocked=True)
    schemes = [Scheme.trellis(3), Scheme(3, 64), Scheme.trellis(4)]
    predicted = score_layers(context.layout, curvature, schemes)
    sums = np.sum([score.damage for score in predicted.values()], axis=0)
    assert sums[2] < sums[0] < sums[1]
    optimizer = PrecisionOptimizer(tiny_model, tiny_tokenizer, context=context)
    real = optimizer.realise(dict.fromkeys(predicted, schemes[2]))
    assert 0.5 < sums[2] / real.measurement.damage < 1.8


def test_less_damage_at_equal_bytes(tiny_model, tiny_tokenizer):
    """Both choices of candidates under one memory target: planned, realised, reported, drawn."""
    found = {}
    for trellis in (False, True):
        quantizer = GradualQuantizer(
            tiny_model, tiny_tokenizer, 0.85, 0.9, trellis=trellis, on_conflict="memory", **FAST
        )
        model = quantizer.quantize()
        found[trellis] = report = quantizer.get_quantization_report()
        assert report.memory.reduction >= 0.85
        schemes = {module.scheme for _, module in packed_layers(model)}
        assert any(scheme.coding == "trellis" for scheme in schemes) == trellis
    assert found[True].quality["damage"] < 0.9 * found[False].quality["damage"]
    assert "trellis L12" in str(found[True])
    figure = plots.bits_per_layer(found[True].to_dict())
    assert "T" in {text.get_text() for text in figure.axes[0].texts}


def test_a_stopped_run_goes_on_to_the_same_bytes(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    from bitween.gradual.journal.journal import Journal

    def quantize(journal):
        return GradualQuantizer(
            copy.deepcopy(tiny_model), tiny_tokenizer, 0.85, 0.9, trellis=True, certify=False, journal=journal, **FAST
        ).quantize()

    class Stopped(Exception):
        pass

    put, left = Journal.put, [6]

    def limited(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise Stopped
        return put(self, *arguments)

    whole = quantize(None).state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "put", limited)
        with pytest.raises(Stopped):
            quantize(tmp_path / "journal")
    resumed = quantize(tmp_path / "journal").state_dict()
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("target", ["vllm", "marlin", "gguf", "auto-round"])
def test_targets_that_hold_none_never_see_them(tiny_model, tiny_tokenizer, target):
    options = {"export_target": target, **FAST}
    with pytest.raises(ValueError, match=f"trellis: expected False for {target}"):
        GradualQuantizer(tiny_model, tiny_tokenizer, 0.6, 0.1, trellis=True, **options)
    both = (*candidate_schemes(), *trellis_schemes())
    quantizer = GradualQuantizer(tiny_model, tiny_tokenizer, 0.6, 0.1, schemes=both, **options)
    assert {scheme.coding for scheme in quantizer.schemes} == {"grid"}


def test_a_flag_that_is_none(tiny_model, tiny_tokenizer):
    with pytest.raises(TypeError, match="trellis: expected True or False; got 'yes'"):
        GradualQuantizer(tiny_model, tiny_tokenizer, trellis="yes")


def tile_rates(needs, bits):
    """The rule of csrc/core/trellis_rates.c in NumPy: bits move as long as one saves a tenth more than it costs."""
    errors = np.array([1, 0.277, 0.0743, 0.0192, 0.0050, 0.00135, 0])
    order = np.argsort(-needs, kind="stable")
    cost, half = needs[order], int(2 * bits)
    rates = half // 2 + (half % 2) * (np.arange(len(cost)) < (len(cost) + 1) // 2)
    while True:
        more = np.where(rates < 5, cost * (errors[rates] - errors[rates + 1]), 0)
        less = np.where(rates > 1, cost * (errors[rates - 1] - errors[rates]), np.inf)
        up, down = int(more.argmax()), len(cost) - 1 - int(less[::-1].argmin())
        if up == down or not more[up] > 1.1 * less[down]:
            found = np.empty_like(rates)
            found[order] = rates
            return found
        rates[up] += 1
        rates[down] -= 1


@pytest.mark.parametrize("bits", [1, 2, 2.5, 3, 4, 4.5, 5])
def test_bits_of_tiles_are_shared_out_alike_everywhere(bits):
    generator = np.random.default_rng(int(2 * bits))
    weight = generator.standard_normal((16, 600)).astype(np.float32)
    importance = (2.0 ** generator.uniform(-6, 6, 38).round()).astype(np.float32).repeat(16)[:600]
    scheme = Scheme.trellis(bits)
    stored = bitween.quantize(weight, scheme, method="trellis", importance=importance)
    needs = np.add.reduceat(importance.astype(np.float64), np.arange(0, 600, 16))
    rates = tile_rates(needs, bits)
    assert np.array_equal(np.asarray(stored.zeros), rates)
    assert np.array_equal(_core.trellis_rates(needs, float(bits)), rates)
    assert len({*_core.trellis_rates(needs, float(bits), True).tolist()}) == (1 if bits == int(bits) else 2)
    assert len(set(rates.tolist())) > (2 if 1 < bits < 5 else 0)
    columns, rows = importance.astype(np.float64), np.ones(16)
    predicted = float(trellis_errors(weight, [scheme], columns, rows)[0])
    real = float(((weight - stored.dequantize()).astype(np.float64) ** 2 @ columns).sum())
    assert 0.85 < predicted / real < 1.15


def test_bits_are_not_shared_out_by_what_is_no_importance():
    for wrong in ([1.0, -1.0], [1.0, np.nan], [np.inf], []):
        with pytest.raises(ValueError, match="importance: expected "):
            _core.trellis_rates(np.array(wrong), 3.0)
