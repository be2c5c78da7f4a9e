"""Steps beside transformers' caches as generation uses them: batches, padding, beams, windows, assistants."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache

from bitween.decode import attach, detach
from tests import tiny_models
from tests.decode import steps

GREEDY = {"do_sample": False, "max_new_tokens": 14, "min_new_tokens": 14, "pad_token_id": 0}


def same_text(model, ids, at_least=1, **options):
    """Text by transformers and by the core; the core takes at least so many steps."""
    detach(model)
    theirs = model.generate(ids, **{**GREEDY, **options})
    attach(model)
    with steps.counted() as taken:
        ours = model.generate(ids, **{**GREEDY, **options})
    assert torch.equal(theirs, ours)
    assert taken[0] >= at_least
    return taken[0]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", *steps.MIXTURES])
def test_greedy_text(family):
    assert same_text(steps.make(family), tiny_models.tokens(1, 7)) == 13


@pytest.mark.parametrize("family", ["llama", "gemma3_text", *steps.MIXTURES])
def test_batches_and_left_padding(family):
    ids = tiny_models.tokens(3, 8)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[2, :2] = 0
    ids[mask == 0] = 0
    assert same_text(steps.make(family), ids, attention_mask=mask) == 13
    new = [tiny_models.tokens(3, 1, seed=k) for k in range(8)]
    theirs, ours, _ = steps.both_ways(steps.make(family), ids, new, mask)
    assert steps.miss(theirs, ours) < 5e-4


def test_holes_in_the_mask_are_left_to_transformers():
    model, ids = steps.make("llama"), tiny_models.tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[0, 3] = 0
    assert same_text(model, ids, 0, attention_mask=mask) == 0


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2_moe"])
def test_beam_search(family):
    same_text(steps.make(family), tiny_models.tokens(2, 6), num_beams=3)


def test_assisted_decoding():
    model, assistant = steps.make("llama"), steps.make("llama", seed=3)
    same_text(model, tiny_models.tokens(1, 6), assistant_model=assistant)


def test_more_tokens_than_a_step_takes_are_left_to_transformers():
    model = steps.make("llama")
    new = [tiny_models.tokens(1, 20, seed=2), tiny_models.tokens(1, 1, seed=3)]
    theirs, ours, taken = steps.both_ways(model, tiny_models.tokens(1, 5), new)
    assert taken == 1
    assert steps.miss(theirs, ours) < 5e-4


def test_static_caches_are_left_to_transformers():
    model, ids = steps.make("llama"), tiny_models.tokens(1, 6)

    def run():
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            return model(ids[:, :1], past_key_values=cache, position_ids=torch.tensor([[6]])).logits

    ours = run()
    detach(model)
    assert torch.equal(ours, run())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_text_with_a_static_cache(family):
    """It is written by transformers' path, and is the text of every other cache."""
    model, ids = steps.make(family), tiny_models.tokens(1, 6)
    expected = model.generate(ids, **GREEDY)
    with steps.counted() as taken:
        ours = model.generate(ids, **GREEDY, cache_implementation="static", disable_compile=True)
    assert torch.equal(ours, expected)
    assert taken[0] == 0


def test_a_long_text_grows_its_room_and_a_window_moves_in_it():
    model = steps.make("gemma3_text", max_position_embeddings=512)
    new = [tiny_models.tokens(1, 1, seed=k) for k in range(180)]
    theirs, ours, taken = steps.both_ways(model, tiny_models.tokens(1, 3), new)
    assert taken == 180
    assert steps.miss(theirs, ours) < 1e-3


def test_a_cache_is_what_transformers_expects():
    model = steps.make("gemma3_text")
    cache, plain = DynamicCache(config=model.config), DynamicCache(config=model.config)
    ids, new = tiny_models.tokens(1, 6), tiny_models.tokens(1, 5, seed=4)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for k in range(5):
            model(new[:, k : k + 1], past_key_values=cache)
        detach(model)
        model(ids, past_key_values=plain)
        for k in range(5):
            model(new[:, k : k + 1], past_key_values=plain)
        attach(model)
        copies = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
        for other in (cache, *copies):
            assert other.get_seq_length() == 11
            for ours, theirs in zip(other.layers, plain.layers, strict=True):
                assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
                torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(ours.values, theirs.values, rtol=1e-3, atol=1e-3)
        before = model(new[:, :1], past_key_values=cache).logits
        for other in copies:  # each on memory of its own
            logits = model(new[:, :1], past_key_values=other).logits
            torch.testing.assert_close(logits, before, rtol=1e-3, atol=1e-3)


def test_a_cropped_cache_forgets():
    model, ids = steps.make("llama"), tiny_models.tokens(1, 8)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids[:, :4], past_key_values=cache)
        for k in range(4, 7):
            model(ids[:, k : k + 1], past_key_values=cache)
        expected = model(ids[:, 7:], past_key_values=copy.deepcopy(cache)).logits
        model(ids[:, :3], past_key_values=cache)
        cache.crop(-3)
        assert cache.get_seq_length() == 7
        assert torch.equal(model(ids[:, 7:], past_key_values=cache).logits, expected)
        cache.reset()
        assert cache.get_seq_length() == 0


def test_two_models_do_not_share_a_cache_by_mistake():
    one, other, ids = steps.make("llama"), steps.make("llama", torch.float16), tiny_models.tokens(1, 6)
    with torch.no_grad():
        cache = DynamicCache(config=one.config)
        one(ids, past_key_values=cache)
        one(ids[:, :1], past_key_values=cache)
        with steps.counted() as taken, pytest.raises(RuntimeError):  # transformers' own answer to mixed dtypes
            other(ids[:, :1], past_key_values=cache)
    assert taken[0] == 0
