"""A half-precision model held in float32 for a while."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bitween.model.causal import is_causal
from bitween.model.precision import in_float32
from tests import tiny_models

IDS = torch.arange(8)[None]


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=3, **sizes)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def _addresses(model):
    return [(name, p.data_ptr(), p.dtype) for name, p in model.named_parameters()]


@pytest.mark.parametrize("in_turn", [False, True], ids=["all at once", "block by block"])
def test_logits_are_those_of_a_float32_copy_and_the_weights_come_back(model, in_turn):
    before = _addresses(model)
    with torch.no_grad():
        expected = copy.deepcopy(model).float()(IDS).logits
        with in_float32(model, model.model.layers if in_turn else ()):
            got = model(IDS).logits
    assert torch.equal(got, expected)
    assert _addresses(model) == before


def test_block_by_block_only_the_running_block_is_in_float32(model):
    seen = []

    def look(module, *_):
        seen.append([layer.mlp.up_proj.weight.dtype for layer in model.model.layers])

    model.model.layers[1].mlp.register_forward_hook(look)
    with in_float32(model, model.model.layers), torch.no_grad():
        assert model.lm_head.weight.dtype == torch.float32
        model(IDS)
    assert seen == [[torch.bfloat16, torch.float32, torch.bfloat16]]


def test_a_block_that_fails_leaves_the_weights_as_they_were(model):
    before = _addresses(model)

    def fail(*_):
        raise RuntimeError("no")

    model.model.layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no"), in_float32(model, model.model.layers):
        model(IDS)
    assert _addresses(model) == before
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.model.layers)


def test_ends_are_in_float32_one_by_one_where_the_model_bears_it():
    """Opening a large model would else hold both of its largest weights so at once."""
    model = tiny_models.make("llama", dtype=torch.bfloat16, tie_word_embeddings=False)
    parts, ends = list(model.model.layers), [model.model.embed_tokens, model.lm_head]
    seen = []
    model.lm_head.register_forward_hook(lambda *_: seen.append([end.weight.dtype for end in ends]))
    assert is_causal(model, tiny_models.VOCABULARY, parts, ends)
    assert seen == [[torch.bfloat16, torch.float32]] * 2

    def look(_module, _inputs, out):  # at the head's dtype, before the head runs
        out.last_hidden_state = out.last_hidden_state.to(model.lm_head.weight.dtype)
        return out

    model.model.register_forward_hook(look)
    seen.clear()
    assert is_causal(model, tiny_models.VOCABULARY, parts, ends)
    assert seen[-1] == [torch.float32, torch.float32]
    assert all(end.weight.dtype == torch.bfloat16 for end in ends)
