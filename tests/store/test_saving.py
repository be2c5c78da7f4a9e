"""What was saved loads, by kind of fault."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitween
from bitween import Bitween, CheckpointError, QuantizedEmbedding, QuantizedLinear
from bitween.store.hub import BitweenQuantizer
from bitween.store.loading import check_saved
from tests import tiny_models

IDS = tiny_models.tokens()

# gpt_neox: a head named embed_out in files; gpt2: an initialiser that reads weights; gemma: scaled embedding;
# mixtral: experts that files hold one by one; bloom and opt: embeddings with a norm, positions with an offset
FAMILIES = ["llama", "gpt2", "gpt_neox", "gemma3_text", "mixtral", "opt", "qwen3"]


def quantized(family, *, symmetric=True, embeddings=False, **config):
    model = tiny_models.make(family, **config)
    return Bitween(model, bits=4, group_size=16, symmetric=symmetric, embeddings=embeddings).quantize()


@pytest.mark.parametrize("symmetric", [True, False], ids=["compressed-tensors", "native"])
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_save_pretrained_after_quantize_loads_with_the_same_logits(family, symmetric, tmp_path):
    model = quantized(family, symmetric=symmetric, embeddings=not symmetric)
    want = tiny_models.logits(model, IDS)
    for size in ("1GB", "8KB", "8KB"):  # whole, then sharded, then once more over what is there
        model.save_pretrained(tmp_path, max_shard_size=size)
        if size == "1GB":
            (tmp_path / "model.safetensors").unlink()
    assert torch.equal(tiny_models.logits(bitween.load_model(tmp_path)[0], IDS), want)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(tiny_models.logits(again, IDS), want, rtol=1e-4, atol=1e-4)


def test_what_was_loaded_saves_and_loads_again(tmp_path):
    model = quantized("gpt_neox", symmetric=False)
    model.save_pretrained(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second", dtype=torch.float32)
    assert torch.equal(tiny_models.logits(again, IDS), tiny_models.logits(model, IDS))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_state_dict_fills_a_copy(family, tmp_path):
    model = quantized(family, embeddings=True)
    torch.save(model.state_dict(), tmp_path / "state")
    again = copy.deepcopy(model)
    for module in again.modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding) and "codes" in module._buffers:
            module.codes.zero_()
    again.load_state_dict(torch.load(tmp_path / "state"))
    assert torch.equal(tiny_models.logits(again, IDS), tiny_models.logits(model, IDS))
    assert not any(name.endswith(".weight") and "proj" in name for name in model.state_dict())


@pytest.mark.parametrize("symmetric", [True, False], ids=["compressed-tensors", "native"])
def test_a_save_that_differs_from_the_model_is_found(symmetric, tmp_path):
    model = quantized("llama", symmetric=symmetric)
    model.save_pretrained(tmp_path)
    check_saved(tmp_path, model)
    model.model.layers[1].mlp.up_proj.codes[0, 0] ^= 1
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.codes.*differs"):
        check_saved(tmp_path, model)


def test_a_save_that_could_not_be_loaded_fails_and_leaves_nothing(tmp_path, monkeypatch):
    model = quantized("llama", symmetric=False)

    def forgetful(self, model):
        return {n: t for n, t in model.state_dict().items() if n != "model.layers.0.mlp.up_proj.codes"}, {}

    monkeypatch.setattr(BitweenQuantizer, "get_state_dict_and_metadata", forgetful)
    with pytest.raises(CheckpointError, match=r"up_proj\.codes: missing"):
        bitween.save_model(model, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
