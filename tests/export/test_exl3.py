"""EXL3 checkpoints against a second decoder, written from the format's facts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import bitween
from bitween import Bitween, Scheme
from bitween.export.exl3 import export_exl3, reasons, tensors
from bitween.gradual import GradualQuantizer
from bitween.layers import packed_layers


def half(bits):
    return np.array([bits], np.uint16).view(np.float16).astype(float)[0]


STEP, SHIFT = half(0x1EEE), half(0xC931)  # of the codebook "mul1": fp16 (sum of bytes + 1024) * STEP + SHIFT


def decode_tile(words, bits):
    """(16 inputs, 16 outputs) float16 of one tile's uint16 (16 * bits,)."""
    stream = "".join(f"{second:016b}{first:016b}" for first, second in words.reshape(-1, 2))
    ring, out = stream + stream, np.zeros((16, 16))
    for lane in range(32):
        for k in range(8):
            t = 8 * lane + k
            end = (t + 1) * bits + len(stream)
            hashed = int(ring[end - 16 : end], 2) * 0x83DCD12D % 2**32
            total = sum(hashed.to_bytes(4, "little"))
            row = lane % 4 * 2 + k % 2 + (8 if k & 2 else 0)
            out[row, lane // 4 + (8 if k & 4 else 0)] = np.float16((total + 1024) * STEP + SHIFT)
    return out


def hadamard(x):
    """The orthogonal transform of each 128 rows."""
    h = np.array([[1 - 2 * (bin(i & j).count("1") % 2) for j in range(128)] for i in range(128)]) / np.sqrt(128)
    return (h @ x.reshape(-1, 128, x.shape[1])).reshape(x.shape)


def decode(parts):
    """(values (inputs, outputs), weight (inputs, outputs))."""
    tiles = parts["trellis"].view(np.uint16)
    bits = tiles.shape[2] // 16
    values = np.block([[decode_tile(tile, bits) for tile in row] for row in tiles])
    weight = hadamard(values) * parts["suh"].astype(float)[:, None]
    return values, hadamard(weight.T).T * parts["svh"].astype(float)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_every_code_is_carried_over(bits):
    weight = np.random.default_rng(bits).standard_normal((256, 128)).astype(np.float32)
    stored = bitween.quantize(weight, Scheme.trellis(bits, 16, turned=True), method="trellis")
    parts = {name: part.numpy() for name, part in tensors(stored).items()}
    assert parts["mul1"].view(np.uint32) == 0x83DCD12D
    values, found = decode(parts)
    ours = stored.dequantize().T
    assert np.sqrt(((found - ours) ** 2).mean()) < 3e-3  # their fp16; the error of the codes themselves is >= .03
    signs = np.sign(parts["suh"].astype(float)), np.sign(parts["svh"].astype(float))
    plain = ours / stored.scales.astype(float).T * 128 * signs[0][:, None] * signs[1]
    whole = hadamard(hadamard(plain).T).T
    np.testing.assert_allclose(whole, np.round(whole), atol=1e-2)
    np.testing.assert_array_equal(np.round((values - SHIFT) / STEP) - 1024 - 510, np.round(whole))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=1, **sizes)).eval()


def test_a_checkpoint(model, tmp_path):
    ids = torch.randint(0, 96, (8, 64), generator=torch.Generator().manual_seed(1))
    quantizer = Bitween(model, bits=3, sequence_length=64)
    quantized = quantizer.quantize(method="trellis", effort="high", turned=True, calibration_data=ids)
    assert reasons(quantized) == {}
    layers = dict(packed_layers(quantized))
    assert len(layers) == 7
    export_exl3(quantized, None, tmp_path / "exl3")
    found = load_file(tmp_path / "exl3/model.safetensors")
    assert not [name for name in found if name.endswith((".codes", ".scales", ".zeros"))]
    known = json.loads((tmp_path / "exl3/config.json").read_text())["quantization_config"]
    assert (known["quant_method"], known["bits"], known["head_bits"], known["codebook"]) == ("exl3", 3, 16, "mul1")
    name, layer = next(item for item in layers.items() if item[0].endswith("up_proj"))
    parts = {key: found[f"{name}.{key}"] for key in ("trellis", "suh", "svh", "mul1")}
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(2))
    expected = layer(x).detach()
    got = x.numpy().astype(float) @ decode(parts)[1]
    assert np.abs(got - expected.numpy()).max() < 0.01 * np.abs(got).max()

    bitween.save_model(quantized, None, tmp_path / "own")
    again, _ = bitween.load_model(tmp_path / "own")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, quantized(ids).logits)


def test_what_does_not_fit_is_named(model, tmp_path):
    with pytest.raises(ValueError, match=r'7 layers .*it holds turned trellis codes.*export_target="exl3"'):
        export_exl3(Bitween(model, bits=4).quantize(rtn=True), None, tmp_path / "exl3")
    with pytest.raises(ValueError, match="expected turned"):
        tensors(bitween.quantize(np.ones((16, 16), np.float32), Scheme.trellis(2), method="trellis"))


def test_a_plan_for_exl3_considers_nothing_else(model):
    ids = torch.randint(0, 96, (16, 64), generator=torch.Generator().manual_seed(1))
    quantizer = GradualQuantizer(model, None, calibration_data=ids, export_target="exl3", sequence_length=64)
    assert {str(s) for s in quantizer.schemes} == {f"{b}b trellis L16 turned" for b in (1, 2, 3, 4, 5)}
