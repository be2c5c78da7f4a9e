"""Blocks: the layout found in many families, and running them one at a time."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaModel
from transformers.pytorch_utils import Conv1D

from bitween.model.blocks import BlockRunner, check_finite, inspect
from tests.tiny_models import logits, make, tokens

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "gpt2", "opt"]
FAMILIES += ["phi", "phi3", "gpt_neox", "falcon", "bloom", "cohere", "mamba"]


def run(runner, ids, **inputs):
    hidden, context = runner.embed(ids, **inputs)
    for i in range(len(runner.layout.blocks)):
        hidden = runner.run_block(i, hidden, context)
    return runner.logits(runner.final(hidden))


def short(names):
    return tuple(name.rsplit(".", 1)[-1] for name in names)


# ---- layout ---------------------------------------------------------------------------------------


def test_layout_of_llama():
    model = make("llama")
    layout = inspect(model)
    assert layout.embedding.name == "model.embed_tokens"
    assert layout.embedding.kind == "embedding"
    assert layout.head.name == "lm_head"
    assert not layout.tied
    assert [block.name for block in layout.blocks] == [f"model.layers.{i}" for i in range(3)]
    expected = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert all(short(layer.name for layer in block.layers) == expected for block in layout.blocks)
    assert layout.final_norm is model.model.norm
    assert layout.others == layout.kept == ()
    assert len(layout.layers) == 2 + 21
    layer = layout.layer("model.layers.1.self_attn.k_proj")
    assert layer.shape == (16, 32)
    assert layer.nbytes == 16 * 32 * 4
    assert layer.weight.data_ptr() == model.model.layers[1].self_attn.k_proj.weight.data_ptr()
    with pytest.raises(KeyError, match="nothing"):
        layout.layer("nothing")


def test_row_13_tied_head_is_one_item():
    layout = inspect(make("llama", tie_word_embeddings=True))
    assert layout.tied
    assert layout.embedding.shared == ("lm_head",)
    assert layout.head.shared == ("model.embed_tokens",)
    assert len(layout.layers) == 1 + 21
    assert layout.layer("lm_head") is layout.embedding


def test_row_14_a_linear_used_twice_counts_once():
    model = make("llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    model.model.layers[1].self_attn.v_proj.weight = model.model.layers[1].self_attn.k_proj.weight
    layout = inspect(model)
    assert len(layout.layers) == 2 + 21 - 3 - 1
    assert layout.layer("model.layers.0.mlp.up_proj").shared == ("model.layers.2.mlp.up_proj",)
    assert layout.layer("model.layers.1.self_attn.k_proj").shared == ("model.layers.1.self_attn.v_proj",)
    assert short(layer.name for layer in layout.blocks[2].layers) == ("q_proj", "k_proj", "v_proj", "o_proj")


def test_row_18_conv1d_is_given_as_outputs_by_inputs():
    model = make("gpt2")
    layer = inspect(model).layer("transformer.h.0.mlp.c_fc")
    assert isinstance(layer.module, Conv1D)
    assert layer.kind == "conv1d"
    assert layer.shape == tuple(layer.weight.shape) == (128, 32)
    x = torch.randn(3, 32)
    torch.testing.assert_close(x @ layer.weight.T + layer.module.bias, layer.module(x))


def test_what_surrounds_the_blocks_is_listed():
    opt = inspect(make("opt"))
    assert short(name for name, _ in opt.tail) == ("final_layer_norm", "project_out")
    assert isinstance(opt.final_norm, nn.LayerNorm)
    assert {layer.name: layer.kind for layer in opt.others} == {
        "model.decoder.embed_positions": "table",
        "model.decoder.project_in": "linear",
        "model.decoder.project_out": "linear",
    }
    assert not opt.kept
    mixtral = inspect(make("mixtral"))
    assert len(mixtral.kept) == 3  # the router of each block
    assert all("MixtralTopKRouter" in kept.reason for kept in mixtral.kept)
    assert inspect(make("gemma3_text")).embedding.plain  # it scales what it looks up, as a packed table can too
    assert inspect(make("llama")).embedding.plain


class Packed(nn.Module):
    """Stands in for a quantized layer: packed codes and a byte count, no weight."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("codes", torch.zeros(linear.out_features, 4, dtype=torch.uint8))
        self.full = [linear]
        self.weight_nbytes = 4 * linear.out_features

    def forward(self, x):
        return self.full[0](x)


def test_quantized_layers_count_as_layers():
    model = make("llama")
    before = inspect(model)
    runner = BlockRunner(model, before, products="fp32")
    mlp = model.model.layers[1].mlp
    mlp.up_proj = Packed(mlp.up_proj)
    layer = inspect(model).layer("model.layers.1.mlp.up_proj")
    assert layer.quantized
    assert layer.shape == (48, 32)
    assert layer.nbytes == 4 * 48
    with pytest.raises(ValueError, match="already quantized"):
        _ = layer.weight
    hidden, context = runner.embed(tokens())  # the older layout still runs, and sees the exchanged layer's input
    _, inputs = runner.capture_inputs(1, hidden, context)
    assert ("gate_proj", "up_proj") in [short(names) for names in inputs]


# ---- bad models -----------------------------------------------------------------------------------


def test_row_18_models_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match="output head"):
        inspect(LlamaModel(make("llama").config))
    with torch.device("meta"):
        meta = LlamaModel(make("llama").config)
    with pytest.raises(ValueError, match=r"embed_tokens.weight.*meta"):
        inspect(meta)
    model = make("llama")
    model.model.layers[1].self_attn.q_proj.double()
    with pytest.raises(ValueError, match=r"q_proj.weight: expected float32, float16 or bfloat16; got float64"):
        inspect(model)


def test_row_18_a_model_without_linear_layers_is_refused():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 4)

        def get_input_embeddings(self):
            return self.table

    with pytest.raises(ValueError, match="at least one linear layer; Table has none"):
        inspect(Table())


def test_row_18_several_devices_are_named(monkeypatch):
    model = make("llama")
    weight = model.model.norm.weight

    class Elsewhere(nn.Parameter):
        device = torch.device("cuda:1")

    model.model.norm.weight = Elsewhere(weight.detach())
    with pytest.raises(ValueError, match=r"one device; got cpu \(model.embed_tokens.weight.*cuda:1 \(model.norm"):
        inspect(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_check_finite_names_the_first_bad_value(dtype, value):
    model = make("llama", dtype=dtype)
    check_finite(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[5, 17] = weight[40, 2] = value
        model.model.layers[2].mlp.up_proj.weight[0, 0] = value
    pattern = r"model.layers.1.mlp.up_proj.weight: expected finite.*2 non-finite of 1,536, first at \[5, 17\]"
    with pytest.raises(ValueError, match=pattern):
        check_finite(model)


# ---- running --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_compute_what_the_model_computes(family):
    model = make(family)
    with BlockRunner(model, inspect(model), products="fp32") as runner:
        for length in (12, 5):
            ids = tokens(length=length)
            torch.testing.assert_close(run(runner, ids), logits(model, ids), rtol=0, atol=1e-5)


def test_eager_attention_with_padding():
    model = make("llama", attn_implementation="eager")
    ids, mask = tokens(), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    runner = BlockRunner(model, inspect(model), products="fp32")
    torch.testing.assert_close(run(runner, ids, attention_mask=mask), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(run(runner, ids), logits(model, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_bf16_products_stay_close_with_an_fp32_stream(family):
    model = make(family)
    runner = BlockRunner(model, inspect(model), products="bf16")
    hidden, context = runner.embed(tokens())
    assert runner.run_block(0, hidden, context).dtype == torch.float32
    expected = logits(model, tokens())
    gap = (run(runner, tokens()).float() - expected).abs().max() / expected.abs().max()
    assert 1e-5 < gap < 0.05  # bfloat16 has 8 bits, so it differs, and not by much
    exact = runner.logits(runner.final(hidden), products="fp32")
    assert exact.dtype == torch.float32


def test_half_precision_models_run_in_their_own_arithmetic():
    model = make("llama", dtype=torch.bfloat16)
    with BlockRunner(model, inspect(model), products="fp32") as runner:
        torch.testing.assert_close(run(runner, tokens()), logits(model, tokens()), rtol=0, atol=0)


def test_contexts_of_one_shape_share_their_memory():
    runner = BlockRunner(make("llama"), inspect(make("llama")))
    one, two = (runner.embed(tokens(seed=seed))[1] for seed in (1, 2))
    first, second = (context.calls[2].kwargs["position_embeddings"] for context in (one, two))
    assert all(a is b for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("family", ["gemma2", "cohere", "llama"])
def test_after_head_applies_caps_and_scales(family):
    model = make(family)
    runner = BlockRunner(model, inspect(model), products="fp32")
    assert runner.plain_logits == (family == "llama")
    hidden, context = runner.embed(tokens())
    for i in range(3):
        hidden = runner.run_block(i, hidden, context)
    final = runner.final(hidden)
    raw = runner.layout.head.module(final)
    flat = runner.after_head(raw.flatten(0, 1)).view_as(raw)  # rows in any arrangement
    torch.testing.assert_close(flat, logits(model, tokens()), rtol=0, atol=1e-5)


def test_gradients_flow_only_when_asked():
    model = make("llama")
    runner = BlockRunner(model, inspect(model), products="fp32")
    hidden, context = runner.embed(tokens())
    assert not runner.run_block(0, hidden, context).requires_grad
    out = hidden.requires_grad_(True)
    for i in range(3):
        out = runner.run_block(i, out, context, grad=True)
    runner.logits(runner.final(out, grad=True), grad=True).square().sum().backward()
    expected = hidden.detach().clone().requires_grad_(True)
    model(inputs_embeds=expected).logits.square().sum().backward()
    torch.testing.assert_close(hidden.grad, expected.grad)


# ---- inputs of the layers -------------------------------------------------------------------------

SHARED = {
    "llama": [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)],
    "phi": [("q_proj", "k_proj", "v_proj", "fc1"), ("dense",), ("fc2",)],
    "gpt2": [("c_attn",), ("c_proj",), ("c_fc",), ("c_proj",)],
}


@pytest.mark.parametrize("family", SHARED)
def test_layers_that_read_one_tensor_are_grouped(family):
    model = make(family)
    runner = BlockRunner(model, inspect(model))
    assert [short(names) for names in runner.shared_inputs(1)] == SHARED[family]


def test_captured_inputs_are_what_the_layers_read():
    model = make("llama")
    runner = BlockRunner(model, inspect(model), products="fp32")
    hidden, context = runner.embed(tokens())
    out, inputs = runner.capture_inputs(0, hidden, context)
    torch.testing.assert_close(out, runner.run_block(0, hidden, context), rtol=0, atol=0)
    block = model.model.layers[0]
    by_name = {short(names): x for names, x in inputs.items()}
    normed = block.input_layernorm(hidden).flatten(0, 1)
    torch.testing.assert_close(by_name["q_proj", "k_proj", "v_proj"], normed.detach())
    middle = nn.functional.silu(block.mlp.gate_proj(by_name["gate_proj", "up_proj"]))
    middle = middle * block.mlp.up_proj(by_name["gate_proj", "up_proj"])
    torch.testing.assert_close(by_name["down_proj",], middle.detach())


def test_capturing_some_layers_stops_the_block_early():
    model = make("llama")
    runner = BlockRunner(model, inspect(model), products="fp32")
    hidden, context = runner.embed(tokens())
    _, everything = runner.capture_inputs(0, hidden, context)
    called = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: called.append(True))
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"]
    out, inputs = runner.capture_inputs(0, hidden, context, layers=names)
    handle.remove()
    assert out is None
    assert not called
    assert set(inputs) == {(names[0],), (names[1],)}
    full = {name: x for group, x in everything.items() for name in group}
    for (name,), x in inputs.items():
        torch.testing.assert_close(x, full[name], rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"expected layers of model.layers.0; got \['lm_head'\]"):
        runner.capture_inputs(0, hidden, context, layers=["lm_head"])


def test_an_input_overwritten_in_place_is_noticed():
    model = make("llama")
    runner = BlockRunner(model, inspect(model), products="fp32")
    hidden, context = runner.embed(tokens())
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + 0 * x.mul_(2).sum()
    with pytest.raises(ValueError, match=r"mlp\.(gate|up)_proj: .*overwrites it in place"):
        runner.capture_inputs(0, hidden, context)


# ---- leaving the model as it was ------------------------------------------------------------------


def state_of(model):
    modules = [(m.training, len(m._forward_pre_hooks), len(m._forward_hooks), set(m.__dict__)) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    return modules, flags, model.config.use_cache, torch.get_rng_state().tolist(), copy.deepcopy(model.state_dict())


def assert_same(a, b):
    assert a[:4] == b[:4]
    assert all(torch.equal(a[4][k], b[4][k]) for k in a[4])


@pytest.mark.parametrize("fails", [False, True])
def test_row_18_the_model_comes_back_as_it_was(fails):
    model = make("llama", attention_dropout=0.5)
    model.train()
    model.model.layers[1].eval()
    model.config.use_cache = True
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = state_of(model)

    def work():
        with BlockRunner(model, inspect(model)) as runner:
            assert not any(module.training for module in model.modules())
            run(runner, tokens())
            hidden, context = runner.embed(tokens())
            torch.rand(3)
            if fails:
                model.model.layers[2].mlp.forward = lambda x: x @ x
            try:
                runner.capture_inputs(2, hidden, context)
            finally:
                model.model.layers[2].mlp.__dict__.pop("forward", None)

    if fails:
        with pytest.raises(RuntimeError):
            work()
    else:
        work()
    assert_same(before, state_of(model))


def test_an_exception_inside_the_walk_leaves_no_stand_in_behind():
    model = make("llama")
    runner = BlockRunner(model, inspect(model))
    before = state_of(model)
    with pytest.raises(IndexError):
        runner.embed(torch.full((1, 4), 10_000))
    assert_same(before, state_of(model))


def test_hooks_on_a_block_are_part_of_it():
    model = make("llama")
    calls = []
    for i in (0, 1):
        model.model.layers[i].register_forward_pre_hook(lambda _m, args: (args[0] * 2, *args[1:]))
    model.model.layers[2].register_forward_hook(lambda *_: calls.append(1))
    runner = BlockRunner(model, inspect(model), products="fp32")
    expected = logits(model, tokens())
    calls.clear()
    torch.testing.assert_close(run(runner, tokens()), expected, rtol=0, atol=1e-5)
    assert len(calls) == 1


def test_a_block_that_keeps_state_is_refused():
    model = make("llama")
    history = []

    def growing(_module, _args, out):
        history.append(1)
        return out + len(history)

    model.model.layers[1].register_forward_hook(growing)
    with pytest.raises(ValueError, match=r"equal results from equal inputs.*model.layers.1 keeps state"):
        BlockRunner(model, inspect(model))


def test_a_model_that_works_between_its_blocks_runs_as_one_block():
    class Doubling(nn.ModuleList):
        """Blocks between which the loop doubles the hidden states, as a model's own code might."""

        def __getitem__(self, key):
            blocks = super().__getitem__(key)
            return [Around(block) for block in blocks] if isinstance(key, slice) else blocks

    class Around:
        def __init__(self, block):
            self.block = block

        def __call__(self, hidden, **kwargs):
            return self.block(hidden * 2, **kwargs)

    model = make("llama")
    model.model.layers = Doubling(model.model.layers)
    layout = inspect(model)
    assert "changes hidden states before block 1" in layout.one_block
    assert [block.name for block in layout.blocks] == [""]
    assert len(layout.blocks[0].layers) == len(
        [layer for block in inspect(make("llama")).blocks for layer in block.layers]
    )
    before = state_of(model)
    runner = BlockRunner(model, layout, products="fp32")
    torch.testing.assert_close(run(runner, tokens()), logits(model, tokens()), rtol=0, atol=0)
    assert runner.shared_inputs(0)[:2] == inspect_groups(layout)
    assert_same(before, state_of(model))


def inspect_groups(layout):
    """Query, key and value, then the output of the first block: one block's layers are grouped as they run."""
    names = [layer.name for layer in layout.blocks[0].layers][:4]
    return tuple(names[:3]), (names[3],)


def test_bad_arguments():
    model = make("llama")
    with pytest.raises(ValueError, match=r'products: expected "auto", "bf16" or "fp32"; got \'fp8\''):
        BlockRunner(model, inspect(model), products="fp8")


def test_nested_use_restores_the_model_once():
    model = make("llama")
    model.train()
    before = state_of(model)
    with BlockRunner(model, inspect(model)) as runner:
        with runner:
            assert not model.training
        assert not model.training
    assert_same(before, state_of(model))


def test_products_in_bfloat16_are_left_where_the_models_own_code_refuses_them(monkeypatch):
    monkeypatch.setattr("bitween.layers.tiles.cpu_has_bf16", lambda: True)
    experts = {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}
    attention = {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8}
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64}
    model = make("dbrx", ffn_config=experts, attn_config=attention, **sizes)
    runner = BlockRunner(model, inspect(model))
    assert runner.products == "fp32"  # it adds products in place to a tensor of their operands' dtype
    torch.testing.assert_close(run(runner, tokens()), logits(model, tokens()))
    model = make("llama")
    assert BlockRunner(model, inspect(model)).products == "bf16"
