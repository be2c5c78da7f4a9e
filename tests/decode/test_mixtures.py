"""Decoders with experts: how tokens choose them, what keeps transformers' path, and experts that change."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicCache

import bitween
from bitween import QuantizedLinear, Scheme
from bitween.decode import attach, path_of
from bitween.decode.mixtures import _as_torch_chooses, _routed
from tests import quantized_models, tiny_models
from tests.decode import steps
from tests.decode.test_changes import as_transformers, last, warm


@pytest.mark.parametrize(("n", "chosen"), [(4, 2), (8, 2), (60, 4), (64, 8), (128, 1), (128, 8), (512, 8), (512, 10)])
def test_equal_numbers_are_chosen_as_torch_does(n, chosen):
    generator = torch.Generator().manual_seed(1)
    for x in (
        torch.zeros(3, n),
        torch.arange(n)[None] // 2 * 1.0,
        torch.randint(0, 3, (300, n), generator=generator).float(),
        torch.randn(300, n, generator=generator).bfloat16().float(),
    ):
        assert torch.equal(_routed(x, chosen, False, False, 0)[0], x.topk(chosen).indices)
        probabilities = torch.softmax(x, -1)
        assert torch.equal(_routed(x, chosen, True, True, 0)[0], probabilities.topk(chosen).indices)
    assert _as_torch_chooses(n, chosen)


@pytest.mark.parametrize("family", steps.MIXTURES)
def test_equal_experts(family):
    """A router of zeros and repeated rows: most choices are between equal numbers."""
    model = steps.make(family, torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            if hasattr(layer.mlp, "experts"):
                weight = getattr(layer.mlp, steps.ROUTERS.get(family, "gate")).weight
                weight[1::2] = weight[0::2][: len(weight[1::2])]
    ids = tiny_models.tokens(1, 9)
    theirs, ours, taken = steps.both_ways(model, ids, [tiny_models.tokens(1, 1, seed=k) for k in range(6)])
    assert taken == 6
    assert steps.typical_miss(theirs, ours) < 0.05


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "olmoe"])
@pytest.mark.parametrize("divided", [True, False])
def test_weights_that_sum_to_one_or_not(family, divided):
    model = steps.make(family, norm_topk_prob=divided)
    theirs, ours, taken = steps.both_ways(model, tiny_models.tokens(1, 5), [tiny_models.tokens(1, 2, seed=3)])
    assert taken == 1
    assert steps.miss(theirs, ours) < 5e-4


def test_experts_of_several_schemes_and_none():
    model = steps.make("mixtral", schemes=[Scheme(4, 32), Scheme(8, 16, True), Scheme.trellis(2.5)][:2])
    experts = model.model.layers[1].mlp.experts
    trellis = QuantizedLinear.from_linear(dense(experts.gate_up_proj.layer(2)), Scheme.trellis(2.5), method="trellis")
    setattr(experts.gate_up_proj, "2", trellis)
    setattr(experts.down_proj, "1", dense(experts.down_proj.layer(1)))
    theirs, ours, taken = steps.both_ways(
        model, tiny_models.tokens(2, 7), [tiny_models.tokens(2, n, seed=n) for n in (1, 8, 3)]
    )
    assert taken == 3
    assert steps.miss(theirs, ours) < 5e-4


def dense(layer):
    linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    linear.weight = torch.nn.Parameter(layer.dequantize(), requires_grad=False)
    return linear


def test_experts_that_are_not_packed_keep_transformers_path():
    model = attach(quantized_models.quantize(tiny_models.make("mixtral"), steps.SCHEMES))
    warm(model)
    assert path_of(model) == {"path": "transformers", "reason": "experts that are not packed", "checked": 0}


def test_router_logits_are_transformers_to_give():
    model = steps.make("qwen3_moe")
    with steps.counted() as taken:
        out = last(model, warm(model), output_router_logits=True)
    assert len(out.router_logits) == 2
    assert taken[0] == 3
    model.config.output_router_logits = True
    with steps.counted() as taken:
        assert len(last(model, warm(model)).router_logits) == 2
    assert taken[0] == 0


def test_what_a_router_computes_of_its_own_is_seen():
    model = steps.make("olmoe")
    gate = model.model.layers[0].mlp.gate
    plain = gate.forward

    def other(x):
        logits, weights, experts = plain(x)
        return logits, weights * 2, experts

    gate.forward = other
    warm(model)
    assert path_of(model)["reason"] == "OlmoeTopKRouter chooses by a rule of its own"


def test_clipped_queries_keep_transformers_path():
    model = steps.make("olmoe", clip_qkv=0.5)
    warm(model)
    assert path_of(model)["reason"] == "queries, keys and values that are clipped"


def replace_expert(model):
    experts = model.model.layers[2].mlp.experts
    other = torch.nn.Linear(32, 96, bias=False)
    torch.nn.init.normal_(other.weight, generator=torch.Generator().manual_seed(3))
    for e in range(4):
        setattr(experts.gate_up_proj, str(e), QuantizedLinear.from_linear(other, Scheme(4, 16)))


def write_router(model):
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.neg_()


def fewer_experts(model):
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 1


@pytest.mark.parametrize("change", [replace_expert, write_router, fewer_experts], ids=lambda f: f.__name__)
def test_experts_that_change_are_seen(change):
    model = steps.make("mixtral", sliding_window=None)
    cache = warm(model)
    before = last(model, cache).logits
    cache.crop(-1)
    change(model)
    cache = warm(model)
    for _ in range(8):  # what has no hook is seen within eight steps
        last(model, cache)
        cache.crop(-1)
    expected = as_transformers(model, cache)
    got = last(model, cache).logits
    assert not torch.allclose(got, before, atol=1e-3)
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)
    assert path_of(model)["path"] == "core"


def test_a_step_may_come_without_a_type_of_its_own():
    """What a decoder with experts gives has the fields that its language model reads."""
    model = steps.make("mixtral")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for n in range(4):
            out = model(tiny_models.tokens(1, 1, seed=n), past_key_values=cache)
    assert out.router_logits is None
    assert out.logits.shape == (1, 1, tiny_models.VOCABULARY)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_norms_wider_than_the_rest(dtype):
    """As transformers loads GPT-OSS in float16."""
    model = steps.make("gpt_oss", dtype)
    for module in model.modules():
        if type(module).__name__ == "GptOssRMSNorm":
            module.float()
    theirs, ours, taken = steps.both_ways(model, tiny_models.tokens(1, 8), [tiny_models.tokens(1, n) for n in (1, 4)])
    assert taken == 2
    assert steps.typical_miss(theirs, ours) < 0.05


def other_sinks(model):
    attention = model.model.layers[0].self_attn
    attention.sinks = torch.nn.Parameter(torch.full_like(attention.sinks, 3.0), requires_grad=False)


def write_biases(model):
    for layer in model.model.layers:
        layer.mlp.experts.down_proj_bias.data.mul_(-2)


@pytest.mark.parametrize("change", [other_sinks, write_biases], ids=lambda f: f.__name__)
def test_sinks_and_biases_that_change_are_seen(change):
    model = steps.make("gpt_oss")
    ids, new = tiny_models.tokens(1, 8), [tiny_models.tokens(1, 1, seed=k) for k in range(3)]
    _, before, _ = steps.both_ways(model, ids, new)
    change(model)
    theirs, ours, taken = steps.both_ways(model, ids, new)
    assert taken == 3
    assert steps.miss(theirs, ours) < 5e-4
    assert steps.miss(before, ours) > 0.01


def test_a_gate_of_its_own_keeps_transformers_path():
    model = steps.make("gpt_oss")
    experts = model.model.layers[1].mlp.experts
    experts._apply_gate = lambda gate_up: gate_up[..., ::2] * gate_up[..., 1::2]
    warm(model)
    assert path_of(model)["reason"] == "GptOssExperts with a gate of its own"


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_saved_and_loaded_decoders_take_their_steps_by_the_core(family, tmp_path):
    model = bitween.Bitween(tiny_models.make(family, **steps.OWN[family]), bits=4, group_size=32).quantize(rtn=True)
    expected = last(model, warm(model)).logits
    assert path_of(model) == {"path": "core", "reason": None, "checked": 2}
    bitween.save_model(model, None, tmp_path / "out")
    loaded, _ = bitween.load_model(tmp_path / "out")
    torch.testing.assert_close(last(loaded, warm(loaded)).logits, expected)
    assert bitween.info(loaded)["decoding"] == {"path": "core", "reason": None, "checked": 2}
