"""GGUF files against two readers that are not ours: gguf's own decoder, and transformers."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize

import bitween
from bitween import Bitween, Scheme
from bitween.export.gguf import export_gguf, reasons
from bitween.export.gguf_blocks import block_type, encode
from bitween.layers import QuantizedLinear

EXACT = [
    (Scheme(bits, group, symmetric), (24, cols))
    for bits, symmetric in [(1, True), (1.58, True), (2, True), (3, True), (4, True), (5, True), (6, True), (8, True)]
    for group, cols in [(32, 96), (64, 192), (128, 256), (-1, 64)]
]


def _stored(scheme, shape, seed=0, spread=0.3):
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal(shape) * np.exp(spread * generator.standard_normal((shape[0], 1)))
    return bitween.quantize(weight.astype(np.float32), scheme)


@pytest.mark.parametrize(("scheme", "shape"), EXACT, ids=str)
def test_symmetric_codes_decode_to_the_same_numbers(scheme, shape):
    stored = _stored(scheme, shape)
    kind = block_type(scheme, shape, exact=True)
    assert np.array_equal(dequantize(encode(stored, kind), kind), stored.dequantize())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_asymmetric_codes_differ_by_the_rounding_of_their_minimum(bits):
    scheme = Scheme(bits, 32)
    stored = _stored(scheme, (16, 96))
    kind = block_type(scheme, (16, 96), exact=True)
    assert kind in (Type.Q4_1, Type.Q5_1)
    expected = stored.dequantize()
    assert np.abs(dequantize(encode(stored, kind), kind) - expected).max() <= 2**-11 * np.abs(expected).max()


def test_asymmetric_six_bits_are_whole_numbers_of_q8_0():
    stored = _stored(Scheme(6, 64), (8, 128))
    assert block_type(stored.scheme, stored.shape, exact=True) is Type.Q8_0
    assert np.array_equal(dequantize(encode(stored, Type.Q8_0), Type.Q8_0), stored.dequantize())


def test_asymmetric_eight_bits_are_rounded_again_and_only_when_allowed():
    stored = _stored(Scheme(8, 64), (8, 128))
    assert isinstance(block_type(stored.scheme, stored.shape, exact=True), str)
    decoded = dequantize(encode(stored, Type.Q8_0), Type.Q8_0)
    assert np.abs(decoded - stored.dequantize()).max() <= 0.6 * np.abs(stored.dequantize()).max() / 127


@pytest.mark.parametrize(
    ("scheme", "kind", "largest"),
    [
        (Scheme(2, 64), Type.Q2_K, 0.14),
        (Scheme(2, 16, True), Type.Q2_K, 0.08),
        (Scheme(3, 64, True), Type.Q3_K, 0.04),
        (Scheme(3, 128), Type.Q4_K, 0.02),
        (Scheme(4, 64), Type.Q4_K, 0.12),
        (Scheme(5, 32), Type.Q5_K, 0.36),
        (Scheme(6, 64, True), Type.Q6_K, 0.07),
    ],
    ids=str,
)
def test_k_types_stay_within_a_fraction_of_the_quantization_error(scheme, kind, largest):
    weight = np.random.default_rng(3).standard_normal((32, 512)).astype(np.float32)
    stored = bitween.quantize(weight, scheme)
    assert block_type(scheme, stored.shape) is kind
    decoded = dequantize(encode(stored, kind), kind)
    error = np.linalg.norm(stored.dequantize() - weight)
    assert np.linalg.norm(decoded - stored.dequantize()) <= largest * error  # measured, with a fifth to spare
    assert np.linalg.norm(decoded - weight) <= 1.06 * error


def test_a_matrix_of_zeros_stays_zero_in_every_type():
    for bits, symmetric in [(2, False), (3, True), (4, False), (5, False), (6, True), (4, True)]:
        stored = bitween.quantize(np.zeros((2, 256), np.float32), Scheme(bits, 64, symmetric))
        kind = block_type(stored.scheme, stored.shape)
        assert not dequantize(encode(stored, kind), kind).any()


def test_columns_and_groups_that_no_block_holds_are_told():
    assert "100 columns" in block_type(Scheme(4, 32), (4, 100))
    assert "groups of 16" in block_type(Scheme(4, 16), (4, 96))
    assert block_type(Scheme(3, 16, True), (4, 256)) is Type.Q3_K


def _logits(model, ids):
    with torch.no_grad():
        return model(ids).logits.float()


@pytest.mark.parametrize("scheme", [Scheme(4, 32, True), Scheme(8, 64, True), Scheme(4, 64)], ids=str)
def test_transformers_reads_the_file_with_the_same_logits(tiny_model, tiny_tokenizer, tmp_path, scheme):
    model = Bitween(tiny_model, bits=scheme.bits, group_size=scheme.group_size, symmetric=scheme.symmetric).quantize()
    bitween.set_matmul_mode(model, "exact")
    written = export_gguf(model, tiny_tokenizer, tmp_path / "model.gguf", exact=True)
    assert written.nbytes == (tmp_path / "model.gguf").stat().st_size
    assert not written.rounded
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ids = torch.arange(3, 45)[None]
    # asymmetric minima are rounded to fp16
    assert (_logits(loaded, ids) - _logits(model, ids)).abs().max() < (1e-3 if scheme.symmetric else 2e-2)
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    text = "The rain had stopped, and 1234 lamps were lit."
    assert again(text).input_ids == tiny_tokenizer(text).input_ids


@pytest.mark.parametrize(
    "scheme", [Scheme(4, 32, True), Scheme(5, 32, True), Scheme(8, 64, True), Scheme(4, 32)], ids=str
)
def test_llama_cpp_reads_the_file_with_the_same_logits(tiny_model, tiny_tokenizer, tmp_path, scheme):
    """It rounds activations to 8 bits in groups of 32, which alone costs about 0.002 nats."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = Bitween(tiny_model, bits=scheme.bits, group_size=scheme.group_size, symmetric=scheme.symmetric).quantize()
    export_gguf(model, tiny_tokenizer, tmp_path / "model.gguf", exact=True)
    llama = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, logits_all=True, verbose=False)
    text = "The rain had stopped, and 1234 lamps were lit."
    ids = llama.tokenize(text.encode(), add_bos=False)
    assert ids == tiny_tokenizer(text, add_special_tokens=False).input_ids
    llama.eval(ids)
    theirs = torch.tensor(llama.scores[: len(ids)])
    damage = bitween.kl_divergence(_logits(model, torch.tensor([ids]))[0], theirs)
    assert damage.mean() < 0.01


def test_settings_and_tokenizer_come_from_a_template(tiny_model, tiny_tokenizer, tmp_path):
    model = Bitween(tiny_model, bits=8, group_size=32, symmetric=True).quantize()
    export_gguf(model, tiny_tokenizer, tmp_path / "first.gguf")
    export_gguf(model, None, tmp_path / "second.gguf", template=tmp_path / "first.gguf")
    first, second = (gguf.GGUFReader(tmp_path / f"{n}.gguf") for n in ("first", "second"))
    kept = {k: f.contents() for k, f in first.fields.items() if not k.startswith("GGUF.")}
    assert kept == {k: f.contents() for k, f in second.fields.items() if not k.startswith("GGUF.")}
    assert [t.name for t in first.tensors] == [t.name for t in second.tensors]


def test_a_model_that_does_not_fit_is_refused_by_layer_and_leaves_no_file(tiny_model, tiny_tokenizer, tmp_path):
    model = Bitween(tiny_model, bits=4, group_size=16).quantize()
    assert all("groups of 16" in why for why in reasons(model).values())
    with pytest.raises(ValueError, match=r"layers do not fit GGUF .*groups of 16"):
        export_gguf(model, tiny_tokenizer, tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="tokenizer: expected one"):
        export_gguf(tiny_model, None, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_what_was_there(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"old")

    def full(self, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="No space left"):
        export_gguf(tiny_model, tiny_tokenizer, tmp_path / "model.gguf")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("model.gguf", b"old")]


def test_a_linear_layer_keeps_its_bias(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            if module.bias is not None:
                torch.nn.init.normal_(module.bias)
            model.set_submodule(name, QuantizedLinear.from_linear(module, Scheme(8, 32, True)))
    writer_settings = tmp_path / "settings.gguf"
    writer = gguf.GGUFWriter(writer_settings, "qwen2")
    from bitween.export.gguf import _add_settings

    _add_settings(writer, model)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    export_gguf(model, None, tmp_path / "qwen.gguf", template=writer_settings)
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "qwen.gguf").tensors}
    layer = model.model.layers[1].self_attn.q_proj
    assert np.array_equal(tensors["blk.1.attn_q.bias"].data, layer.bias.detach().numpy())
    decoded = dequantize(tensors["blk.1.attn_q.weight"].data, tensors["blk.1.attn_q.weight"].tensor_type)
    assert np.array_equal(decoded, layer.dequantize().numpy())
    assert "output.weight" not in tensors
