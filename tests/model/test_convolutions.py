"""Convolutions in a model of blocks: packed where they are plain, loaded as they were saved."""

import copy

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

import bitween
from bitween import Bitween
from bitween.gradual import GradualQuantizer
from bitween.layers.conv import QuantizedConv
from bitween.model.blocks import inspect
from tests import tiny_models
from tests.tiny_models import logits, tokens

PATCHES = "model.vision_tower.embeddings.patch_embedding"


def make():
    """A Gemma 3 with a tower that turns patches of an image into rows by a convolution."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = Gemma3Config(
        text_config={**sizes, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97, "pad_token_id": 0},
        vision_config={**sizes, "image_size": 32, "patch_size": 8, "vision_use_head": False},
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def model():
    return make()


def rows(model, pixels):
    with torch.no_grad():
        return model.model.vision_tower(pixels).last_hidden_state


def test_a_convolution_of_a_tower_is_packed_and_computes_what_its_numbers_do(model, tmp_path):
    layer = inspect(model).layer(PATCHES)
    assert (layer.kind, layer.shape, layer.plain) == ("conv", (32, 3 * 8 * 8), True)
    packed = Bitween(model, bits=4, group_size=32).quantize()
    bitween.set_matmul_mode(packed, "exact")
    conv = packed.get_submodule(PATCHES)
    assert isinstance(conv, QuantizedConv)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in packed.named_modules():
            if hasattr(module, "weight_nbytes"):
                weight = plain.get_submodule(name).weight
                weight.copy_(module.dequantize().view_as(weight))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(rows(packed, pixels), rows(plain, pixels), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits(packed, tokens()), logits(plain, tokens()), rtol=1e-3, atol=1e-3)
    assert inspect(packed).layer(PATCHES).quantized  # what is packed can be described again
    bitween.save_model(packed, None, tmp_path / "saved")
    loaded, _ = bitween.load_model(tmp_path / "saved")
    bitween.set_matmul_mode(loaded, "exact")
    assert torch.equal(rows(loaded, pixels), rows(packed, pixels))


def test_convolutions_are_ignored_by_name_and_rounded_by_calibrated_methods(model):
    kept = Bitween(model, bits=4, group_size=32).quantize(ignore_layers=PATCHES)
    assert kept.get_submodule(PATCHES).weight is not None
    assert not isinstance(kept.get_submodule(PATCHES), QuantizedConv)
    packed = Bitween(model, bits=4, group_size=32).quantize(method="gptq", calibration_data=tokens(4, 16))
    assert isinstance(packed.get_submodule(PATCHES), QuantizedConv)


def test_the_gradual_quantizer_plans_convolutions(model):
    packed = GradualQuantizer(
        model,
        None,
        target_memory_reduction=0.6,
        max_perplexity_increase=0.5,
        calibration_data=tokens(40, 24),
        calibration_samples=6,
        evaluation_samples=12,
        sequence_length=24,
        on_conflict="memory",
        distillation_steps=0,
        certify=False,
    ).quantize()
    assert isinstance(packed.get_submodule(PATCHES), QuantizedConv)


def test_short_kernels_of_single_channels_stay():
    layout = inspect(tiny_models.make("mamba", state_size=8, time_step_rank=4))
    assert not [x for x in layout.layers if x.kind == "conv"]
    assert any("conv1d" in kept.name for kept in layout.kept)
