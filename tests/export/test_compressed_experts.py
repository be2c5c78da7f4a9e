"""Mixtures of experts in compressed-tensors: read by transformers, and by compressed-tensors itself."""

import json
import warnings

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors import safe_open
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, GptOssConfig, OlmoeConfig

import bitween
from bitween import Bitween, Scheme
from bitween.export.compressed_tensors import export_compressed_tensors
from bitween.layers import packed_layers
from tests.export.test_gguf_experts import COMMON, EXPERTS, INNER, MIXTRAL, QWEN2, QWEN3

OLMOE = OlmoeConfig(**COMMON, num_experts=EXPERTS, intermediate_size=INNER, vocab_size=512, pad_token_id=None)
IDS = torch.arange(3, 40)[None]


FOUR, EIGHT = Scheme(4, 32, True), Scheme(8, 32, True)
ROUNDED = 3e-3  # of the logits' spread: compressed-tensors multiplies codes and scales in float16


def _quantized(config, scheme=FOUR, ignore_layers=()):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    uniform = Bitween(model, bits=scheme.bits, group_size=scheme.group_size, symmetric=scheme.symmetric)
    model = uniform.quantize(ignore_layers=ignore_layers)
    bitween.set_matmul_mode(model, "exact")
    return model


def _logits(model):
    with torch.no_grad():
        return model(IDS).logits


def assert_transformers_unpacks(model, directory):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        export_compressed_tensors(model, None, directory)
    loaded = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.float32
    )
    wanted = _logits(model)
    assert torch.allclose(_logits(loaded), wanted, atol=ROUNDED * float(wanted.std()))


@pytest.mark.parametrize("config", [MIXTRAL, QWEN2, QWEN3, OLMOE], ids=lambda c: c.model_type)
def test_transformers_unpacks_what_was_written(config, tmp_path):
    model = _quantized(config)
    assert_transformers_unpacks(model, tmp_path / "out")


def test_every_expert_stands_under_the_names_of_before_they_were_fused(tmp_path):
    model = _quantized(MIXTRAL)
    export_compressed_tensors(model, None, tmp_path / "out")
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
    packer = BaseCompressor.get_value_from_registry("pack-quantized")
    home = model.get_submodule("model.layers.1.mlp.experts")
    both, down = home.gate_up_proj.dense().detach(), home.down_proj.dense().detach()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
        for e in range(EXPERTS):
            for part, wanted in (("w1", both[e, :INNER]), ("w3", both[e, INNER:]), ("w2", down[e])):
                name = f"model.layers.1.block_sparse_moe.experts.{e}.{part}"
                parts = {x: file.get_tensor(f"{name}.{x}") for x in ("weight_packed", "weight_scale", "weight_shape")}
                values = packer.decompress(parts, scheme)["weight"].float()
                np.testing.assert_allclose(values.numpy(), wanted.numpy(), rtol=2e-3, atol=1e-6)  # fp16 products there
    assert not any("gate_up_proj" in name for name in names)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (
        f"model.layers.0.block_sparse_moe.experts.{EXPERTS - 1}.w2" in settings["config_groups"]["group_0"]["targets"]
    )


def test_experts_of_another_scheme_are_told_by_a_pattern(tmp_path):
    model = _quantized(QWEN3)
    eight = _quantized(QWEN3, EIGHT)
    for name, _ in list(packed_layers(model)):
        if ".experts." in name:
            home, _, number = name.rpartition(".")
            setattr(model.get_submodule(home), number, eight.get_submodule(name))
    assert_transformers_unpacks(model, tmp_path / "out")


def test_schemes_that_transformers_would_mix_up_are_told(tmp_path):
    model = _quantized(QWEN3)
    eight = _quantized(QWEN3, EIGHT)
    model.model.layers[0].self_attn.q_proj = eight.model.layers[0].self_attn.q_proj
    with pytest.warns(RuntimeWarning, match="experts have 1 schemes and other layers 2"):
        export_compressed_tensors(model, None, tmp_path / "out")


def test_what_it_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    asymmetric = _quantized(QWEN3, Scheme(4, 32))
    with pytest.raises(ValueError, match="asymmetric"):
        export_compressed_tensors(asymmetric, None, tmp_path / "out")
    some = _quantized(QWEN3, ignore_layers=["model.layers.0.mlp.experts.down_proj.2"])
    with pytest.raises(ValueError, match="one of a stack of experts"):
        export_compressed_tensors(some, None, tmp_path / "out")
    sizes = {"num_local_experts": EXPERTS, "intermediate_size": 64, "head_dim": 16, "vocab_size": 512}
    transposed = _quantized(GptOssConfig(**COMMON, **sizes))
    with pytest.raises(ValueError, match="one of a stack of experts"):
        export_compressed_tensors(transposed, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
