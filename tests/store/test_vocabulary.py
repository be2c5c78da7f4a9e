"""resize_token_embeddings and set_input_embeddings on models whose embedding or head is packed."""

import pytest
import torch

import bitween
from bitween import QuantizedEmbedding, QuantizedLinear, Scheme
from tests import quantized_models, tiny_models

SCHEME = Scheme(4, 32)
IDS = torch.arange(3, 15)[None]


def scaled():
    """Gemma's table multiplies its rows by the root of their length; the head that shares them does not."""
    return quantized_models.quantize(tiny_models.make("gemma", tie_word_embeddings=True), [SCHEME], embedding=SCHEME)


KINDS = {
    "tied": lambda: quantized_models.llama([SCHEME], tied=True, embedding=SCHEME),
    "untied": lambda: quantized_models.llama([SCHEME], head=True, embedding=SCHEME),
    "head alone": lambda: quantized_models.llama([SCHEME], head=True),
    "table alone": lambda: quantized_models.llama([SCHEME], embedding=SCHEME),
    "scaled": scaled,
}


def logits(model):
    bitween.set_matmul_mode(model, "exact")
    with torch.no_grad():
        return model.eval()(IDS).logits


def numbers(module):
    return module.dequantize(torch.float32) if hasattr(module, "dequantize") else module.weight.detach().clone()


@pytest.mark.parametrize("change", [-7, 5], ids=["fewer", "more"])
@pytest.mark.parametrize("kind", KINDS)
def test_resize(kind, change, tmp_path):
    model = KINDS[kind]()
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    before, old = [numbers(end) for end in ends], logits(model)
    tokens = len(before[0])
    size = tokens + change
    torch.manual_seed(0)
    model.resize_token_embeddings(size)
    assert model.config.get_text_config().vocab_size == size
    kept = min(tokens, size)
    for was, end in zip(before, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        now = numbers(end)
        assert now.shape == (size, was.shape[1])
        assert end.weight.shape == now.shape
        assert torch.equal(now[:kept], was[:kept])
        if isinstance(end, (QuantizedEmbedding, QuantizedLinear)) and change > 0:
            mean = was.mean(0)
            step = (mean.reshape(-1, 32).amax(1) - mean.reshape(-1, 32).amin(1).clamp(max=0)).repeat_interleave(32) / 15
            assert ((now[kept:] - mean).abs() <= 0.51 * step + 1e-3 * mean.abs()).all()
    got = logits(model)
    assert got.shape[-1] == size
    torch.testing.assert_close(got[..., :kept], old[..., :kept], rtol=1e-5, atol=1e-5)
    assert model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (1, IDS.shape[1] + 2)
    bitween.save_model(model, None, tmp_path / "saved")
    torch.testing.assert_close(logits(bitween.load_model(tmp_path / "saved")[0]), got, rtol=1e-5, atol=1e-5)


def test_resize_to_a_multiple_counts_from_the_table():
    model = KINDS["tied"]()
    tokens = model.config.vocab_size
    model.resize_token_embeddings(tokens + 1, pad_to_multiple_of=16)
    assert len(model.get_input_embeddings().weight) == model.config.vocab_size == -(-(tokens + 1) // 16) * 16


def test_resize_draws_rows_where_no_mean_is_wanted():
    model = KINDS["tied"]()
    tokens = model.config.vocab_size
    torch.manual_seed(0)
    model.resize_token_embeddings(tokens + 64, mean_resizing=False)
    spread = numbers(model.get_input_embeddings())[tokens:].std().item()
    assert 0.8 < spread / model.config.initializer_range < 1.2


def test_resize_refuses_rows_in_tiles_before_anything_changes():
    model = quantized_models.llama([SCHEME])
    model.lm_head = QuantizedLinear.from_linear(model.lm_head, Scheme.trellis(3), method="trellis")
    table, tokens = model.get_input_embeddings().weight, model.config.vocab_size
    with pytest.raises(ValueError, match=r"head whose rows are stored one by one.*before it is quantized"):
        model.resize_token_embeddings(tokens + 1)
    assert model.get_input_embeddings().weight is table
    assert model.config.vocab_size == tokens == len(table)


@pytest.mark.parametrize("way", ["save_model", "save_pretrained"])
@pytest.mark.parametrize("kind", ["tied", "untied", "scaled"])
def test_another_table(kind, way, tmp_path):
    """The head keeps what it had, in the file too."""
    model = KINDS[kind]()
    bitween.attach(model)
    head = numbers(model.get_output_embeddings())
    other = tiny_models.make(model.config.model_type, seed=1).get_input_embeddings()  # Gemma's multiplies its rows too
    model.set_input_embeddings(other)
    want = logits(model)
    if way == "save_model":
        bitween.save_model(model, None, tmp_path / "saved")
    else:
        model.save_pretrained(tmp_path / "saved")
    for load in (lambda path: bitween.load_model(path)[0], type(model).from_pretrained):
        loaded = load(tmp_path / "saved")
        assert torch.equal(numbers(loaded.get_output_embeddings()), head)
        torch.testing.assert_close(logits(loaded), want, rtol=1e-5, atol=1e-5)
