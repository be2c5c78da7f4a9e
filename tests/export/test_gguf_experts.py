"""Mixtures of experts in GGUF, against gguf's own decoder and, where it knows them, transformers' reader."""

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

import bitween
from bitween import Bitween, Scheme
from bitween.export.gguf import export_gguf, reasons

EXPERTS, INNER, WIDTH = 4, 96, 64
COMMON = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
MIXTRAL = MixtralConfig(**COMMON, vocab_size=512, intermediate_size=INNER, num_local_experts=EXPERTS)
OTHERS = {"num_experts": EXPERTS, "moe_intermediate_size": INNER, "intermediate_size": 128, "vocab_size": 512}
QWEN2 = Qwen2MoeConfig(**COMMON, **OTHERS, shared_expert_intermediate_size=64, norm_topk_prob=False)
QWEN3 = Qwen3MoeConfig(**COMMON, **OTHERS, head_dim=16, norm_topk_prob=True)


def _model(config, tokenizer):
    torch.manual_seed(0)
    config.vocab_size = len(tokenizer)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _quantized(config, tokenizer, ignore_layers=()):
    uniform = Bitween(_model(config, tokenizer), bits=8, group_size=32, symmetric=True)
    model = uniform.quantize(ignore_layers=ignore_layers)
    bitween.set_matmul_mode(model, "exact")
    return model


def _dense(model, name):
    """(experts, rows, columns) of a stack."""
    return model.get_submodule(name).dense().detach().numpy()


@pytest.mark.parametrize("config", [MIXTRAL, QWEN2, QWEN3], ids=lambda c: c.model_type)
def test_every_expert_is_a_slice_of_one_tensor(config, tiny_tokenizer, tmp_path):
    model = _quantized(config, tiny_tokenizer)
    written = export_gguf(model, tiny_tokenizer, tmp_path / "model.gguf", exact=True)
    assert not written.rounded
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}

    def decoded(name):
        tensor = tensors[f"blk.1.{name}.weight"]
        return dequantize(tensor.data, tensor.tensor_type)

    home = "model.layers.1.mlp.experts"
    both, down = _dense(model, f"{home}.gate_up_proj"), _dense(model, f"{home}.down_proj")
    assert np.array_equal(decoded("ffn_gate_exps"), both[:, :INNER])
    assert np.array_equal(decoded("ffn_up_exps"), both[:, INNER:])
    assert np.array_equal(decoded("ffn_down_exps"), down)
    router = model.get_submodule("model.layers.1.mlp.gate").weight.detach().numpy()
    assert np.array_equal(tensors["blk.1.ffn_gate_inp.weight"].data, router)


@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=lambda c: c.model_type)
def test_transformers_reads_the_file_with_the_same_logits(config, tiny_tokenizer, tmp_path):
    model = _quantized(config, tiny_tokenizer)
    export_gguf(model, tiny_tokenizer, tmp_path / "model.gguf", exact=True)
    # Its reader leaves the widths of experts at their class's default (transformers 5.24), so they are told.
    options = {"gguf_file": "model.gguf", "config": config, "dtype": torch.float32}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    ids = torch.arange(3, 45)[None]
    with torch.no_grad():
        assert (loaded(ids).logits - model(ids).logits).abs().max() < 1e-3


def test_llama_cpp_reads_the_file_with_the_same_logits(tiny_tokenizer, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    for config in (MIXTRAL, QWEN2, QWEN3):
        model = _quantized(config, tiny_tokenizer)
        export_gguf(model, tiny_tokenizer, tmp_path / "model.gguf", exact=True)
        llama = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, logits_all=True, verbose=False)
        ids = llama.tokenize(b"The rain had stopped, and 1234 lamps were lit.", add_bos=False)
        llama.eval(ids)
        with torch.no_grad():
            ours = model(torch.tensor([ids])).logits[0]
        assert bitween.kl_divergence(ours, torch.tensor(llama.scores[: len(ids)])).mean() < 0.01, config.model_type


def test_a_stack_in_full_precision_is_taken_apart_too(tiny_tokenizer, tmp_path):
    model = _quantized(QWEN3, tiny_tokenizer, ignore_layers=["*.experts.*"])
    export_gguf(model, tiny_tokenizer, tmp_path / "model.gguf", exact=True)
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    both = model.get_parameter("model.layers.0.mlp.experts.gate_up_proj").detach().numpy()
    assert np.array_equal(tensors["blk.0.ffn_up_exps.weight"], both[:, INNER:])


def test_experts_that_share_no_block_type_are_refused(tiny_tokenizer, tmp_path):
    model = _quantized(MIXTRAL, tiny_tokenizer)
    stack = model.get_submodule("model.layers.0.mlp.experts.down_proj")
    plain = torch.nn.Linear(INNER, WIDTH, bias=False)
    stack.add_module("2", bitween.layers.QuantizedLinear.from_linear(plain, Scheme(4, 32, True)))
    with pytest.raises(ValueError, match=r"experts.down_proj: its experts take 2 block types"):
        export_gguf(model, tiny_tokenizer, tmp_path / "model.gguf")
    stack.add_module("2", plain)
    assert "some are not" in reasons(model)["model.layers.0.mlp.experts.down_proj"]
    assert not list(tmp_path.iterdir())


def test_a_router_that_llama_cpp_would_run_otherwise_is_refused(tiny_tokenizer, tmp_path):
    config = Qwen3MoeConfig(**{**QWEN3.to_dict(), "norm_topk_prob": False})
    model = _quantized(config, tiny_tokenizer)
    with pytest.raises(ValueError, match="expected norm_topk_prob=True"):
        export_gguf(model, tiny_tokenizer, tmp_path / "model.gguf")
