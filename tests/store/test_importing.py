"""GPTQ, AWQ and AutoRound checkpoints, packed here word by word from the formats' definitions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bitween
from bitween import CheckpointError, QuantizedLinear, Scheme
from bitween.export.auto_round import export_auto_round
from tests import tiny_models
from tests.quantized_models import llama

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words_of(values, bits):
    """int32 (n * bits / 32, m) from (n, m): along the first axis, least significant bit first, across words too."""
    found = []
    for column in np.asarray(values).T:
        stream = sum(int(v) << (bits * i) for i, v in enumerate(column))
        found.append([(stream >> (32 * w)) & 0xFFFFFFFF for w in range(len(column) * bits // 32)])
    return np.array(found, np.uint32).T.view(np.int32).copy()


def awq_words(values):
    """int32 (n, m / 8) from (n, m) of 4 bits."""
    n, m = values.shape
    found = np.zeros((n, m // 8), np.uint32)
    for word in range(m // 8):
        for place, column in enumerate(AWQ_ORDER):
            found[:, word] |= values[:, word * 8 + column].astype(np.uint32) << np.uint32(4 * place)
    return found.view(np.int32)


def checkpoint(folder, settings, *, symmetric=False, g_idx=True, seed=0):
    """A random model in a foreign format in `folder`; {layer: its weight as numbers}."""
    random = np.random.default_rng(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = tiny_models.make("llama", **sizes)
    model.save_pretrained(folder)
    state, weights = load_file(folder / "model.safetensors"), {}
    bits, awq = settings["bits"], settings["quant_method"] == "awq"
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or name == "lm_head":
            continue
        rows, cols = layer.weight.shape
        group = cols if settings["group_size"] == -1 else settings["group_size"]
        n_groups = cols // group
        codes = random.integers(0, 1 << bits, (cols, rows))
        zeros = random.integers(0, 1 << bits, (n_groups, rows))
        if symmetric:
            zeros[:] = 1 << (bits - 1)
        scales = (random.random((n_groups, rows)) * 0.02 + 0.005).astype(np.float16)
        place = np.arange(cols) // group
        weights[name] = ((codes - zeros[place]) * scales[place].astype(np.float64)).T
        less = settings.get("checkpoint_format") == "gptq"
        stored = (zeros - less) % (1 << bits)
        parts = {"scales": scales}
        if awq:
            parts |= {"qweight": awq_words(codes), "qzeros": awq_words(stored)}
        else:
            parts |= {"qweight": words_of(codes, bits), "qzeros": words_of(stored.T, bits).T.copy()}
            if g_idx:
                parts["g_idx"] = place.astype(np.int32)
        del state[f"{name}.weight"]
        state |= {f"{name}.{key}": torch.from_numpy(np.ascontiguousarray(value)) for key, value in parts.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return weights


def gptq(bits=4, group=32, **more):
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": "gptq", **more}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "settings",
    [gptq(2), gptq(3), gptq(4), gptq(8), gptq(4, -1), gptq(4, 16, checkpoint_format="gptq_v2"), AWQ],
    ids=lambda s: "-".join(str(s.get(k)) for k in ("quant_method", "checkpoint_format", "bits", "group_size")),
)
def test_every_number_is_kept(tmp_path, settings, symmetric):
    weights = checkpoint(tmp_path, settings, symmetric=symmetric)
    model, tokenizer = bitween.load_model(tmp_path)
    assert tokenizer is None
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        assert type(layer) is QuantizedLinear
        assert layer.scheme == Scheme(settings["bits"], settings["group_size"], symmetric)
        np.testing.assert_array_equal(layer.dequantize(torch.float32).numpy(), weight.astype(np.float32))
    assert torch.isfinite(tiny_models.logits(model, torch.arange(12)[None])).all()


@pytest.mark.parametrize(
    "schemes", [[Scheme(4, 32), Scheme(2, 32, True), Scheme(3, 64)], [Scheme(5, 32), Scheme(8, -1)]]
)
def test_auto_round_comes_back_as_it_was_exported(tmp_path, schemes):
    model = llama(schemes, config={"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1})
    export_auto_round(model, None, tmp_path / "out")
    loaded, _ = bitween.load_model(tmp_path / "out")
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_the_command_line_reads_it_as_packed_layers(tmp_path, tiny_tokenizer):
    from bitween.cli.inputs import load as _load

    weights = checkpoint(tmp_path, gptq())
    tiny_tokenizer.save_pretrained(tmp_path)
    model, tokenizer = _load(str(tmp_path), "auto")
    assert tokenizer("rain").input_ids == tiny_tokenizer("rain").input_ids
    assert all(type(model.get_submodule(name)) is QuantizedLinear for name in weights)


def edit(folder, name, change):
    state = load_file(folder / "model.safetensors")
    state[name] = change(state[name])
    save_file(state, folder / "model.safetensors")


LAYER = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("g_idx", lambda t: t.flip(0), "activation order"),
        ("qweight", lambda t: t[:-1].clone(), "expected"),
        ("qweight", lambda t: t.float(), "expected torch.int32"),
        ("qzeros", lambda t: t[:, :-1].clone(), "expected"),
        ("scales", lambda t: t * float("nan"), "scales"),
        ("scales", lambda t: -t, "above 0"),
        ("scales", lambda t: t.float() + 1e-5, "float16"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, part, change, message):
    checkpoint(tmp_path, gptq())
    edit(tmp_path, f"{LAYER}.{part}", change)
    with pytest.raises(CheckpointError, match=message) as raised:
        bitween.load_model(tmp_path)
    assert LAYER in str(raised.value)


def test_biases_of_zeros_and_old_buffers_are_left_out(tmp_path):
    """Writers of GPTQ checkpoints give every layer a bias, and old models kept their rotary frequencies."""
    checkpoint(tmp_path, gptq())
    state = load_file(tmp_path / "model.safetensors")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), f"{LAYER}.bias": torch.zeros(64)}
    save_file(state | extra, tmp_path / "model.safetensors")
    model, _ = bitween.load_model(tmp_path)
    assert model.get_submodule(LAYER).bias is None
    edit(tmp_path, f"{LAYER}.bias", lambda t: t + 1)
    with pytest.raises(CheckpointError, match="expected zeros, as the model has no bias here"):
        bitween.load_model(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        gptq(bits=7),
        gptq(bits="4"),
        gptq(group=0),
        gptq(checkpoint_format="marlin"),
        {**AWQ, "version": "gemv"},
        {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": ["x"]},
        {"quant_method": "hqq", "bits": 4, "group_size": 32},
    ],
    ids=str,
)
def test_settings_that_are_unknown_are_refused(tmp_path, settings):
    checkpoint(tmp_path, gptq())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(CheckpointError, match="expected"):
        bitween.load_model(tmp_path)
