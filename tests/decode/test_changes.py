"""A model that changes after it was recognised, and what keeps transformers' path."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from transformers.cache_utils import DynamicCache

import bitween
from bitween import QuantizedLinear, Scheme
from bitween.decode import attach, detach, path_of
from tests import tiny_models
from tests.decode import steps

IDS = tiny_models.tokens(1, 8)


def warm(model):
    """A cache with three steps in it, so that all is recognised and checked."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :4], past_key_values=cache)
        for k in range(4, 7):
            model(IDS[:, k : k + 1], past_key_values=cache)
    return cache


def last(model, cache, **options):
    with torch.no_grad():
        return model(IDS[:, 7:], past_key_values=cache, **options)


def as_transformers(model, cache):
    """What transformers makes of the model as it is and a copy of the cache."""
    other = DynamicCache(config=model.config)
    for ours, theirs in zip(cache.layers, other.layers, strict=True):
        theirs.update(ours.keys.clone(), ours.values.clone())
    detach(model)
    logits = last(model, other).logits
    attach(model)
    return logits


def other_layer(seed=5, rows=32, cols=48):
    linear = torch.nn.Linear(cols, rows, bias=False)
    torch.nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(seed))
    return QuantizedLinear.from_linear(linear, Scheme(4, 16))


def replace_layer(model):
    model.model.layers[1].mlp.down_proj = other_layer()


def swap_codes(model):
    layer = model.model.layers[1].mlp.down_proj
    layer.register_buffer("codes", torch.zeros_like(layer.codes))


def write_codes(model):
    model.model.layers[1].mlp.down_proj.codes.zero_()


def other_gain(model):
    model.model.norm.weight = torch.nn.Parameter(torch.full_like(model.model.norm.weight, 3.0))


def data_of_a_gain(model):
    model.model.norm.weight.data = torch.full_like(model.model.norm.weight, 3.0)


def hook(model):
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out * 2)


def replace_block(model):
    model.model.layers[1] = copy.deepcopy(model.model.layers[0])
    model.model.layers[1].self_attn.layer_idx = 1


def other_rope(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def coarser_mode(model):
    bitween.set_matmul_mode(model, "int8")


@pytest.mark.parametrize(
    "change",
    [replace_layer, swap_codes, write_codes, other_gain, data_of_a_gain, hook, replace_block, other_rope],
)
def test_a_change_between_two_steps_is_noticed(change):
    model = steps.make("llama", schemes=[Scheme(4, 16)])
    cache = warm(model)
    before = as_transformers(model, cache)
    change(model)
    expected = as_transformers(model, cache)
    assert steps.miss(before, expected) > 0.01
    assert steps.miss(expected, last(model, cache).logits) < 5e-4


def test_a_mode_that_changes_is_noticed_with_the_next_text():
    model = steps.make("llama", schemes=[Scheme(4, 16)])
    warm(model)
    coarser_mode(model)
    theirs, ours, _ = steps.both_ways(model, IDS, [IDS[:, :1]])
    assert steps.miss(theirs, ours) < 0.01


def test_a_cast_between_two_texts_is_noticed():
    model = steps.make("llama", schemes=[Scheme(4, 16)])
    warm(model)
    model.to(torch.bfloat16)
    theirs, ours, taken = steps.both_ways(model, IDS, [IDS[:, :1]] * 3)
    assert taken == 3
    assert steps.miss(theirs, ours) < 0.05


def test_a_copy_is_recognised_by_itself():
    model = steps.make("llama", schemes=[Scheme(4, 16)])
    cache = warm(model)
    expected = last(model, copy.deepcopy(cache)).logits
    clone = copy.deepcopy(model)
    replace_layer(clone)
    assert torch.equal(last(model, copy.deepcopy(cache)).logits, expected)
    assert steps.miss(expected, last(clone, copy.deepcopy(cache)).logits) > 0.01
    assert path_of(clone)["path"] == "core"
    shallow = copy.copy(model.model)
    assert path_of(shallow)["checked"] == 0


def test_pickled_and_saved_models(tmp_path):
    model = steps.make("llama", schemes=[Scheme(4, 16)])
    expected = last(model, warm(model)).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert type(again.model).__name__ == "LlamaModel"
    torch.testing.assert_close(last(again, warm(again)).logits, expected)
    bitween.save_model(model, None, tmp_path / "out")
    loaded, _ = bitween.load_model(tmp_path / "out")
    torch.testing.assert_close(last(loaded, warm(loaded)).logits, expected)
    assert path_of(loaded)["path"] == "core"


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
def test_what_asks_for_more_is_left_to_transformers(option):
    model = steps.make("llama", attn_implementation="eager")
    cache = warm(model)
    with steps.counted() as taken:
        result = last(model, cache, **{option: True})
    assert taken[0] == 0
    assert len(result[option.removeprefix("output_")]) >= 3
    with steps.counted() as taken:  # transformers' hooks stay, and nobody asks any more
        cache = warm(model)
        last(model, cache)
    assert taken[0] == 4
    assert path_of(model) == {"path": "core", "reason": None, "checked": 2}


def test_a_hook_beside_those_that_collect_outputs_is_noticed():
    model = steps.make("llama")
    last(model, warm(model), output_hidden_states=True)
    cache = warm(model)
    before = as_transformers(model, cache)
    model.model.layers[0].register_forward_hook(lambda module, args, out: out * 2)
    expected = as_transformers(model, cache)
    assert steps.miss(before, expected) > 0.01
    assert steps.miss(expected, last(model, cache).logits) < 5e-4


def test_a_model_around_that_collects_outputs_gets_them():
    from transformers.utils import output_capturing

    model = steps.make("llama")
    cache = warm(model)
    token = output_capturing._active_collector.set({"hidden_states": []})
    try:
        with steps.counted() as taken:
            last(model, cache)
    finally:
        output_capturing._active_collector.reset(token)
    assert taken[0] == 0


def test_training_and_gradients_are_left_to_transformers():
    model = steps.make("llama")
    with steps.counted() as taken:
        cache = warm(model)
        n = taken[0]
        model(IDS[:, 7:], past_key_values=cache)
        model.train()
        last(model, cache)
    assert n == 3
    assert taken[0] == n


def test_autocast_is_left_to_transformers():
    model = steps.make("llama")
    cache = warm(model)
    with steps.counted() as taken, torch.autocast("cpu", torch.bfloat16):
        last(model, cache)
    assert taken[0] == 0


def test_unknown_decoders_keep_their_path():
    model = steps.make("gpt2")
    assert path_of(model) == {"path": "transformers", "reason": "no decoder of a known family", "checked": 0}
    model = steps.make("llama")
    model.model.layers[0].mlp.act_fn = torch.nn.Softsign()
    said = bitween.info(model)["decoding"]
    assert said["path"] == "transformers"
    assert "Softsign" in said["reason"]


def test_a_wrong_result_is_noticed_on_the_first_steps(monkeypatch):
    from bitween.decode import recognising

    model = steps.make("llama")
    monkeypatch.setattr(recognising, "_eps", lambda norm: 0.5)
    monkeypatch.setattr(recognising, "_norm_kind", lambda norm, dtype: 1)
    expected = as_transformers(model, warm(model))
    assert steps.miss(expected, last(model, warm(model)).logits) < 5e-4
    assert "differs from the model's own" in path_of(model)["reason"]


def test_a_compiled_model_is_traced_through_transformers():
    model = steps.make("llama")
    cache = warm(model)
    with torch.no_grad(), steps.counted() as taken:
        torch.compile(model.model, backend="eager")(IDS[:, 7:], past_key_values=cache)
    assert taken[0] == 0
