"""AutoRound checkpoints against the format's definition, and against auto-round itself where it is installed."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bitween import Scheme
from bitween.export.auto_round import export_auto_round, reasons, tensors
from bitween.layers import QuantizedLinear
from tests.quantized_models import llama

SCHEMES = [
    Scheme(bits, group, symmetric) for bits in (2, 3, 4, 5, 6, 8) for group, symmetric in [(32, True), (-1, False)]
]


def _model():
    return llama(SCHEMES, config={"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1})


def _bits(words: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers of `bits` bits from a stream of int32 words along the first axis, least significant bit first."""
    stream = np.unpackbits(np.ascontiguousarray(words.T).view(np.uint8), axis=1, bitorder="little")
    values = stream.reshape(len(stream), -1, bits) @ (1 << np.arange(bits))
    return values.T.astype(np.float64)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_tensors_decode_by_the_formats_definition(scheme):
    torch.manual_seed(0)
    stored = QuantizedLinear.from_linear(torch.nn.Linear(96, 64), scheme).quantized
    parts = {name: part.numpy() for name, part in tensors(stored).items()}
    codes = _bits(parts["qweight"], scheme.levels.bit_length() - 1)
    zeros = _bits(parts["qzeros"].T, scheme.levels.bit_length() - 1).T
    group = np.arange(96) // (96 if scheme.group_size == -1 else scheme.group_size)
    weight = (codes - zeros[group]) * parts["scales"].astype(np.float64)[group]
    assert np.array_equal(weight.T, stored.dequantize().astype(np.float64))


def test_settings_name_every_scheme(tmp_path):
    model = _model()
    before = model.config.to_dict()
    export_auto_round(model, None, tmp_path / "out")
    assert model.config.to_dict() == before
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    state = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            found = written["extra_config"].get(name, written)
            assert (found["bits"], found["group_size"], found["sym"]) == (
                module.scheme.bits,
                module.scheme.group_size,
                module.scheme.symmetric,
            )
            assert {f"{name}.{part}" for part in ("qweight", "qzeros", "scales")} <= state.keys()
    assert written["extra_config"]["lm_head"] == {"bits": 16}


def test_layers_that_do_not_fit_are_named(tmp_path):
    model = llama([Scheme(1.58, 16, True), Scheme(4, 32)], embedding=Scheme(8, 32, True))
    assert "embedding" in reasons(model)["model.embed_tokens"]
    with pytest.raises(ValueError, match="do not fit AutoRound's format"):
        export_auto_round(model, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_auto_round_itself_reads_the_same_logits(tmp_path):
    pytest.importorskip("auto_round")
    from transformers import AutoModelForCausalLM

    model = _model()
    export_auto_round(model, None, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                module.mode = "exact"
                weight = module.dequantize()
                read = loaded.get_submodule(name)(torch.eye(weight.shape[1], dtype=torch.float16)).T.float()
                assert (read - weight).abs().max() < 1e-3 * weight.abs().max()  # it computes in fp16
        difference = (loaded(ids).logits.float() - model(ids).logits).abs().max()
        spread = model(ids).logits.std()
    assert difference < 0.05 * spread
