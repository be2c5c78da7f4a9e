"""The main job on the tiny model: both targets, conflicts, errors before any work, and the user's model untouched."""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import pytest
import torch

from bitween.gradual import GradualQuantizer
from bitween.gradual.gradual_quantizer import BudgetConflict
from bitween.gradual.plan.planner import InfeasibleTarget
from bitween.model.memory import model_bytes

FAST = {
    "calibration_samples": 16,
    "evaluation_samples": 40,
    "sequence_length": 64,
    "importance": False,
    "stages": 2,
}


def run(model, tokenizer, reduction, increase, **options):
    quantizer = GradualQuantizer(model, tokenizer, reduction, increase, **{**FAST, **options})
    return quantizer, quantizer.quantize()


def test_both_targets_hold(tiny_model, tiny_tokenizer):
    before = {name: t.clone() for name, t in tiny_model.state_dict().items()}
    mode = tiny_model.training
    quantizer, model = run(tiny_model, tiny_tokenizer, 0.75, 0.05)
    report = quantizer.get_quantization_report()
    assert report.conflict is None, str(report)
    assert report.certificate["verdict"] == "accepted"
    assert model_bytes(model) <= 0.25 * model_bytes(tiny_model)
    assert model_bytes(model) == report.memory.total
    assert report.memory.reduction >= 0.75
    assert report.quality["damage"] <= report.uniform["damage"]
    ids = torch.arange(20)[None] % tiny_model.config.vocab_size
    assert torch.isfinite(model(ids).logits).all()
    assert tiny_model.training == mode
    assert all(torch.equal(before[n], t) for n, t in tiny_model.state_dict().items())
    json.loads(report.to_json())
    assert "memory" in str(report)
    assert quantizer.get_memory_analysis().total == model_bytes(model)


def test_same_seed_same_bytes(tiny_model, tiny_tokenizer):
    states = [run(tiny_model, tiny_tokenizer, 0.7, 0.1, certify=False)[1].state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_conflict_keeps_quality_by_default(tiny_model, tiny_tokenizer):
    quantizer, _ = run(tiny_model, tiny_tokenizer, 0.90, 0.02)
    report = quantizer.get_quantization_report()
    assert report.conflict is not None
    assert report.memory.reduction < 0.90
    assert report.quality["perplexity_increase"] <= 0.02


def test_conflict_memory(tiny_model, tiny_tokenizer):
    quantizer, model = run(tiny_model, tiny_tokenizer, 0.90, 0.02, on_conflict="memory")
    report = quantizer.get_quantization_report()
    assert report.conflict is not None
    assert model_bytes(model) <= 0.10 * model_bytes(tiny_model)


def test_conflict_error(tiny_model, tiny_tokenizer):
    with pytest.raises(BudgetConflict, match="perplexity budget") as caught:
        run(tiny_model, tiny_tokenizer, 0.90, 0.02, on_conflict="error")
    assert caught.value.tradeoffs["stages"]


def test_ignored_layers_stay(tiny_model, tiny_tokenizer):
    quantizer, model = run(
        tiny_model, tiny_tokenizer, 0.5, 0.2, ignore_layers=["*down_proj", "lm_head"], transforms="none", certify=False
    )
    plan = quantizer.get_quantization_report().plan
    assert all(scheme == "kept" for name, scheme in plan.items() if name.endswith("down_proj") or name == "lm_head")
    name = next(name for name in plan if name.endswith("down_proj"))
    assert torch.equal(model.get_submodule(name).weight, tiny_model.get_submodule(name).weight)


def test_vllm_gets_what_it_runs(tiny_model, tiny_tokenizer):
    quantizer, model = run(tiny_model, tiny_tokenizer, 0.4, 0.3, export_target="vllm", certify=False)
    plan = quantizer.get_quantization_report().plan
    assert all(scheme == "kept" or (scheme.endswith("sym") and "asym" not in scheme) for scheme in plan.values())
    assert plan["model.embed_tokens"] == "kept"
    assert any(scheme != "kept" for scheme in plan.values())
    for i in range(len(model.model.layers)):
        block = f"model.layers.{i}."
        assert len({plan[f"{block}self_attn.{x}_proj"] for x in "qkv"}) == 1
        assert plan[block + "mlp.gate_proj"] == plan[block + "mlp.up_proj"]


def test_unreachable_target_is_refused_at_once(tiny_model, tiny_tokenizer):
    with pytest.raises(InfeasibleTarget, match="expected at most 0"):
        GradualQuantizer(tiny_model, tiny_tokenizer, 0.99, 0.05)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_memory_reduction": 60}, ValueError, "write 0.6"),
        ({"target_memory_reduction": 0}, ValueError, "between 0 and 1"),
        ({"max_perplexity_increase": float("nan")}, ValueError, "between 0 and 1"),
        ({"max_perplexity_increase": "a lot"}, TypeError, "expected a number"),
        ({"safety_multiplier": 0.5}, ValueError, "at least 1"),
        (
            {"export_target": "toaster"},
            ValueError,
            "export_target: expected one of any, vllm, marlin, gguf, exl3, auto-round",
        ),
        ({"on_conflict": "panic"}, ValueError, "quality, memory, error"),
        ({"tokenizer": None}, TypeError, "tokenizer"),
        ({"calibration_samples": 0}, ValueError, "at least 1"),
    ],
)
def test_bad_arguments(tiny_model, tiny_tokenizer, options, error, message):
    arguments = {"model": tiny_model, "tokenizer": tiny_tokenizer, **options}
    with pytest.raises(error, match=message):
        GradualQuantizer(**arguments)


def test_non_finite_weights_name_the_layer(tiny_model, tiny_tokenizer):
    with torch.no_grad():
        tiny_model.model.layers[1].mlp.up_proj.weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj"):
        GradualQuantizer(tiny_model, tiny_tokenizer)


def test_memory_is_told_before_the_run(tiny_model, tiny_tokenizer, monkeypatch):
    from bitween.gradual.plan import memory_need

    quantizer = GradualQuantizer(tiny_model, tiny_tokenizer, 0.7, 0.1, **FAST)
    sizes = quantizer.preflight()
    if sizes["memory_available"] is None:
        pytest.skip("the system does not tell")
    more = GradualQuantizer(tiny_model, tiny_tokenizer, 0.7, 0.1, **{**FAST, "sequence_length": 4096}).preflight()
    assert sizes["memory_needed"] > 0
    assert more["memory_needed"] > sizes["memory_needed"]
    monkeypatch.setattr(memory_need, "available_bytes", lambda: 1 << 20)
    with pytest.warns(ResourceWarning, match=r"memory: about .* GiB needed; .* GiB are there"):
        quantizer.memory_need.warn()


def test_max_memory_works_in_batches_or_says_what_would_do(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("bitween.gradual.plan.memory_need.resident_bytes", lambda: 10**9)  # it varies by itself
    text = {**FAST, "calibration_samples": 200}
    whole = GradualQuantizer(tiny_model, tiny_tokenizer, 0.7, 0.1, **text).preflight()["memory_needed"]
    with pytest.raises(ValueError, match=r"max_memory: expected at least about [\d,]+ bytes .*; got 1,000"):
        GradualQuantizer(tiny_model, tiny_tokenizer, 0.7, 0.1, max_memory=1000, **text)
    batched = GradualQuantizer(tiny_model, tiny_tokenizer, 0.7, 0.1, max_memory=whole - 1, **text)
    assert not batched.memory_need.one_pass
    assert batched.preflight()["memory_needed"] < whole
    found = batched.quantize()
    assert found(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("fails", [False, True])
def test_row_18_the_process_is_as_it_was(tiny_model, tiny_tokenizer, fails, monkeypatch):
    """Random numbers, the default dtype, threads, and the model's mode, hooks and gradients' flags."""
    if fails:
        monkeypatch.setattr("bitween.gradual.evaluator.GradualEvaluator.certify", lambda *_, **__: 1 / 0)
    model = copy.deepcopy(tiny_model).train()
    model.model.layers[0].requires_grad_(False)
    calls = []
    model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))

    def state():
        flags = [(n, p.requires_grad, p.grad is None) for n, p in model.named_parameters()]
        hooks = [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]
        modes = [m.training for m in model.modules()]
        numbers = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
        return flags, hooks, modes, numbers, torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()

    before = state()
    if fails:
        with pytest.raises(ZeroDivisionError):
            run(model, tiny_tokenizer, 0.7, 0.1)
    else:
        run(model, tiny_tokenizer, 0.7, 0.1)
    assert state() == before
