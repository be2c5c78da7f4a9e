"""Bitween, the uniform quantizer, memory in bytes, and saving and loading what it made."""

from __future__ import annotations

import copy

import pytest
import torch

import bitween
from bitween import Bitween, Scheme
from bitween.model.memory import analyze_memory, model_bytes


def logits(model, seed=0):
    ids = torch.randint(0, model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(ids).logits


def test_rtn_replaces_every_linear_by_packed_bytes(tiny_model):
    before = logits(tiny_model)
    quantizer = Bitween(tiny_model, bits=8, group_size=32)
    model = quantizer.quantize(rtn=True)
    packed = [m for m in model.modules() if hasattr(m, "weight_nbytes")]
    assert len(packed) == sum(len(block.layers) for block in quantizer.layout.blocks)
    assert torch.equal(before, logits(tiny_model))
    assert (logits(model) - before).abs().max() < 0.5
    memory = quantizer.get_memory_analysis()
    assert memory.total == model_bytes(model)
    assert memory.original_total == model_bytes(tiny_model)
    expected = sum(Scheme(8, 32).nbytes(*layer.shape) for block in quantizer.layout.blocks for layer in block.layers)
    assert sum(m.weight_nbytes for m in packed) == expected


@pytest.mark.parametrize("how", [{"method": "clip"}, {"method": "gptq"}, {"trainable": True}])
def test_methods_beat_rounding(tiny_model, tiny_tokenizer, how):
    before = logits(tiny_model)

    def error(**how):
        return (
            (logits(Bitween(tiny_model, tiny_tokenizer, 3, 64, sequence_length=64).quantize(**how)) - before)
            .pow(2)
            .mean()
        )

    assert error(**how) < error(rtn=True)


def test_ignored_layers_and_embeddings(tiny_model):
    model = Bitween(tiny_model, bits=4, embeddings=True).quantize(ignore_layers="*v_proj")
    assert hasattr(model.get_input_embeddings(), "weight_nbytes")
    assert hasattr(model.get_output_embeddings(), "weight_nbytes")
    assert not any(hasattr(m, "weight_nbytes") for n, m in model.named_modules() if n.endswith("v_proj"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_model_loads_with_the_same_logits(tiny_model, tiny_tokenizer, tmp_path, dtype):
    for parameter in tiny_model.parameters():  # not .to(dtype), which would cast the rotary table too
        parameter.data = parameter.data.to(dtype)
    model = Bitween(tiny_model, bits=4, group_size=64, embeddings=True).quantize(rtn=True)
    bitween.save_model(model, tiny_tokenizer, tmp_path / "out")
    loaded, tokenizer = bitween.load_model(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    assert model_bytes(loaded) == model_bytes(model)
    assert tokenizer("night").input_ids == tiny_tokenizer("night").input_ids


def test_tied_embeddings_stay_one(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model.config.tie_word_embeddings = True
    tiny_model.tie_weights()
    model = Bitween(tiny_model, bits=6, embeddings=True).quantize(rtn=True)
    assert model.get_output_embeddings().codes.data_ptr() == model.get_input_embeddings().codes.data_ptr()
    bitween.save_model(model, tiny_tokenizer, tmp_path / "out")
    loaded, _ = bitween.load_model(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    assert model_bytes(loaded) == model_bytes(model)


def test_full_directory_is_not_overwritten(tiny_model, tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(FileExistsError):
        bitween.save_model(Bitween(tiny_model).quantize(rtn=True), None, tmp_path)
    assert (tmp_path / "precious").read_text() == "x"


def test_choices_are_checked(tiny_model):
    with pytest.raises(ValueError, match="several"):
        Bitween(tiny_model).quantize(rtn=True, trainable=True)
    with pytest.raises(ValueError, match="method: expected one of"):
        Bitween(tiny_model).quantize(method="magic")
    with pytest.raises(TypeError, match="tokenizer"):
        Bitween(tiny_model).quantize(method="gptq")


def test_memory_counts_shared_weights_once(tiny_model):
    total = model_bytes(tiny_model)
    tiny_model.lm_head.weight = tiny_model.model.embed_tokens.weight
    assert total - model_bytes(tiny_model) == tiny_model.lm_head.weight.nbytes
    memory = analyze_memory(tiny_model)
    assert sum(memory.by_block.values()) == sum(memory.by_layer.values()) == memory.total
    assert memory.reduction == 0


def with_outliers(model):
    """The same function with channels between up and down far apart in size, as training leaves them."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for block in model.model.layers:
            factors = torch.randn(block.mlp.up_proj.out_features, generator=generator).mul(1.5).exp()
            factors = factors.to(model.dtype)
            block.mlp.up_proj.weight *= factors[:, None]
            block.mlp.down_proj.weight /= factors
    return model


def test_trellis_codes_bear_outlier_channels(tiny_model, tiny_tokenizer):
    model = with_outliers(tiny_model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(3, 67)[None]
    with torch.no_grad():
        reference = model(ids).logits.float()

    def damage(**options):
        quantizer = Bitween(model, tiny_tokenizer, bits=3, group_size=64, calibration_samples=12)
        packed = quantizer.quantize(**options)
        assert packed.dtype == model.dtype
        with torch.no_grad():
            return float(bitween.kl_divergence(reference, packed(ids).logits.float()).mean())

    grid = damage(method="gptq+refine")
    assert damage(method="trellis") < 0.8 * grid
    assert damage(method="trellis", transforms="none") > grid
    assert damage(method="gptq+refine", transforms="auto") < grid
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )


def test_a_transformed_model_keeps_its_dtype_and_comes_back(tiny_model, tiny_tokenizer, tmp_path):
    for parameter in tiny_model.parameters():
        parameter.data = parameter.data.bfloat16()
    packed = Bitween(tiny_model, tiny_tokenizer, bits=3, calibration_samples=4).quantize(method="trellis")
    assert {p.dtype for p in packed.parameters()} == {torch.bfloat16}
    ids = torch.arange(3, 67)[None]
    with torch.no_grad():
        wanted = packed(ids).logits
        bitween.save_model(packed, None, tmp_path / "saved")
        assert torch.equal(bitween.load_model(tmp_path / "saved")[0](ids).logits, wanted)


def test_transforms_are_checked(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match='transforms: expected "auto" or "none"; got 3'):
        Bitween(tiny_model, tiny_tokenizer).quantize(transforms=3)
