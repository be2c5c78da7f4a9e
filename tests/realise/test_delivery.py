"""The proof is of the delivered model: what stood on replaced modules goes over or is refused, and all is compared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bitween
from bitween import Bitween
from bitween.gradual import GradualQuantizer
from bitween.realise import delivery
from tests import tiny_models

FAST = {"calibration_samples": 8, "evaluation_samples": 16, "sequence_length": 32, "importance": False, "stages": 1}


def with_head_bias(family, tied=True):
    model = tiny_models.make(family, tie_word_embeddings=tied)
    head = model.get_output_embeddings()
    head.bias = nn.Parameter(torch.linspace(-3, 3, head.out_features))
    return model


@pytest.mark.parametrize("family", ["phi", "gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_bias_stays_beside_a_tied_embedding(family, tied, tmp_path):
    model = with_head_bias(family, tied)
    ids = tiny_models.tokens()
    want = tiny_models.logits(model, ids)
    made = Bitween(model, bits=8, embeddings=True).quantize()
    head = made.get_output_embeddings()
    assert torch.equal(head.bias, model.get_output_embeddings().bias)
    assert (tiny_models.logits(made, ids) - want).abs().max() < 0.05 * want.abs().max()
    if family == "phi":  # whose config asks for a bias: others build a head without one when they are loaded
        bitween.save_model(made, None, tmp_path / "out")
        loaded, _ = bitween.load_model(tmp_path / "out")
        assert torch.equal(tiny_models.logits(loaded, ids), tiny_models.logits(made, ids))


def test_the_gradual_way_keeps_it_too(tiny_tokenizer, tiny_model):
    tiny_model.lm_head.weight = tiny_model.model.embed_tokens.weight
    tiny_model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, tiny_model.lm_head.out_features))
    made = GradualQuantizer(tiny_model, tiny_tokenizer, 0.5, 0.5, **FAST, transforms="none", certify=False).quantize()
    assert torch.equal(made.lm_head.bias, tiny_model.lm_head.bias)
    assert made.config.tie_word_embeddings


def test_an_installed_model_that_differs_is_no_result(tiny_model, tiny_tokenizer, monkeypatch):
    from bitween.layers import QuantizedLinear

    own = QuantizedLinear.from_quantized

    def forgets(stored, bias=None, **options):
        layer = own(stored, bias)
        layer.scales.mul_(1.02)
        return layer

    monkeypatch.setattr(QuantizedLinear, "from_quantized", forgets)
    for quantize in (
        Bitween(tiny_model).quantize,
        GradualQuantizer(tiny_model, tiny_tokenizer, 0.6, 0.5, **FAST, certify=False).quantize,
    ):
        with pytest.raises(RuntimeError, match=r"compute what was measured, within 0\.001 .*got a difference of 0\.0"):
            quantize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "gemma2"])
def test_what_is_right_is_within_the_bound(family, dtype):
    model = tiny_models.make(family, dtype=dtype)
    Bitween(model, bits=4).quantize()
    Bitween(model, bits=2, embeddings=True).quantize()


def test_a_lost_bias_is_beyond_every_bound():
    model = with_head_bias("phi")
    ids = tiny_models.tokens(1)
    want = delivery.logits_in_float32(model, ids)
    model.get_output_embeddings().bias = None
    for dtype in delivery.ALLOWED:
        with pytest.raises(RuntimeError):
            delivery.check_delivered(want, delivery.logits_in_float32(model, ids), dtype)


# ---- refused at the start ---------------------------------------------------------------------------


def _hook(model):
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)


def _pre_hook(model):
    model.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda *_: None)


def _backward_hook(model):
    model.model.layers[1].mlp.up_proj.register_full_backward_hook(lambda *_: None)


def _forward(model):
    layer = model.model.layers[1].mlp.up_proj
    layer.forward = lambda x, own=layer.forward: 2 * own(x)


def _accelerate(model):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model.model.layers[1].mlp.up_proj, hooks.ModelHook())


@pytest.mark.parametrize(
    ("attach", "message"),
    [
        (_hook, "without hooks; got 1 in _forward_hooks"),
        (_pre_hook, "without hooks; got 1 in _forward_pre_hooks"),
        (_backward_hook, "without hooks; got 1 in _backward_hooks"),
        (_forward, "Linear's own forward; got one set on this module"),
        (_accelerate, "remove_hook_from_module"),
    ],
)
def test_what_a_packed_layer_would_drop_is_refused(tiny_model, tiny_tokenizer, attach, message):
    attach(tiny_model)
    where = r"model\.layers\.1\.mlp\.up_proj: .*"
    with pytest.raises(ValueError, match=where + message):
        Bitween(tiny_model).quantize()
    with pytest.raises(ValueError, match=where + message):
        GradualQuantizer(tiny_model, tiny_tokenizer)
    made = Bitween(tiny_model).quantize(ignore_layers="model.layers.1.mlp.up_proj")
    assert type(made.model.layers[1].mlp.up_proj) is nn.Linear


def _parametrized(model):
    nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)


def _old_weight_norm(model):
    nn.utils.weight_norm(model.model.layers[1].mlp.up_proj)


def _pruned(model):
    from torch.nn.utils import prune

    prune.l1_unstructured(model.model.layers[1].mlp.up_proj, "weight", 0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("attach", "message"),
    [
        (_parametrized, "parametrization of weight: call .*remove_parametrizations"),
        (_pruned, r"pruning mask that is not merged: call torch\.nn\.utils\.prune\.remove"),
        (_old_weight_norm, "remove_weight_norm"),
    ],
)
def test_weights_made_of_others_are_refused(tiny_model, tiny_tokenizer, attach, message):
    attach(tiny_model)
    for refuse in (lambda: Bitween(tiny_model), lambda: GradualQuantizer(tiny_model, tiny_tokenizer)):
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: .*" + message):
            refuse()


def test_adapters_are_to_be_merged_first(tiny_model, tiny_tokenizer):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_model, peft.LoraConfig(target_modules=["q_proj"]))
    for model in (adapted, adapted.get_base_model()):
        with pytest.raises(ValueError, match=r"without adapters; got .* of peft: call merge_and_unload\(\) first"):
            Bitween(model)
        with pytest.raises(ValueError, match=r"call merge_and_unload\(\) first"):
            GradualQuantizer(model, tiny_tokenizer)
    Bitween(adapted.merge_and_unload()).quantize()


def test_an_embedding_that_renormalises_is_refused(tiny_model):
    tiny_model.model.embed_tokens.max_norm = 1.0
    with pytest.raises(ValueError, match=r"embed_tokens: expected max_norm=None"):
        Bitween(tiny_model, embeddings=True).quantize()


# ---- the flag of tied weights ------------------------------------------------------------------------


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_config_says_tied_as_the_weights_are(tmp_path, tied, flag, embeddings):
    model = tiny_models.make("llama", tie_word_embeddings=False)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = flag
    ids = tiny_models.tokens()
    made = Bitween(model, bits=8, embeddings=embeddings).quantize()
    assert made.config.tie_word_embeddings == tied
    assert model.config.tie_word_embeddings == flag
    bitween.save_model(made, None, tmp_path / "out", format="native")
    loaded, _ = bitween.load_model(tmp_path / "out")
    assert torch.equal(tiny_models.logits(loaded, ids), tiny_models.logits(made, ids))
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(tiny_models.logits(loaded, ids), tiny_models.logits(made, ids))


# ---- modes of the caller and other threads -----------------------------------------------------------


@pytest.mark.parametrize("made_inside", [False, True])
def test_inside_inference_mode(tiny_model, tiny_tokenizer, made_inside):
    import copy

    with torch.inference_mode():
        model = copy.deepcopy(tiny_model) if made_inside else tiny_model
        made = GradualQuantizer(model, tiny_tokenizer, 0.6, 0.5, **FAST).quantize()
        assert torch.is_inference_mode_enabled()
        Bitween(model, tiny_tokenizer, 4, sequence_length=32).quantize(method="gptq")
    made(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("flag", ["output_hidden_states", "output_attentions"])
def test_configs_that_ask_for_more_outputs(tiny_model, tiny_tokenizer, flag):
    tiny_model.set_attn_implementation("eager")
    setattr(tiny_model.config, flag, True)
    made = GradualQuantizer(tiny_model, tiny_tokenizer, 0.6, 0.5, **FAST).quantize()
    assert getattr(made.config, flag)
    assert getattr(tiny_model.config, flag)
    Bitween(tiny_model, tiny_tokenizer, 4, sequence_length=32).quantize(method="gptq")
    assert getattr(made(torch.tensor([[1, 2, 3]])), flag.removeprefix("output_")) is not None


def test_two_quantizers_and_a_running_model_in_threads(tiny_model, tiny_tokenizer):
    from concurrent.futures import ThreadPoolExecutor
    from threading import Event

    tiny_model.train()
    ids, done = torch.arange(3, 20)[None], Event()
    want = tiny_models.logits(tiny_model, ids)

    def quantize(_):
        made = GradualQuantizer(tiny_model, tiny_tokenizer, 0.6, 0.5, **FAST, certify=False).quantize()
        Bitween(tiny_model, tiny_tokenizer, 4, sequence_length=32).quantize(method="gptq")
        return made.state_dict()

    def keep_running():
        runs = 0
        while not done.is_set():
            assert torch.equal(tiny_models.logits(tiny_model, ids), want)
            assert all(module.training for module in tiny_model.modules())
            runs += 1
        return runs

    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(keep_running)
        try:
            first, second = pool.map(quantize, range(2))
        finally:
            done.set()
        assert running.result() > 1
    alone = quantize(0)
    for state in (first, second):
        assert all(torch.equal(state[name], tensor) for name, tensor in alone.items())


@pytest.mark.parametrize("transforms", ["auto", "none"])
def test_a_head_that_repeats_the_embedding_is_planned_as_one_that_is_tied(tiny_model, tiny_tokenizer, transforms):
    """Bytes asked for and bytes delivered are those of what is needed, whether the ends part on the way or not."""
    from bitween.model.memory import model_bytes

    tiny_model.lm_head.weight = nn.Parameter(tiny_model.model.embed_tokens.weight.detach().clone())
    options = {**FAST, "transforms": transforms, "certify": False, "distillation_steps": 0}
    quantizer = GradualQuantizer(tiny_model, tiny_tokenizer, 0.5, 0.9, **options)
    made = quantizer.quantize()
    report = quantizer.get_quantization_report()
    assert report.memory.original_total == model_bytes(tiny_model)
    assert report.memory.total == model_bytes(made) <= 0.5 * model_bytes(tiny_model)
    ends = made.get_input_embeddings(), made.get_output_embeddings()
    table, head = ((end.codes if hasattr(end, "codes") else end.weight).data_ptr() for end in ends)
    assert made.config.tie_word_embeddings == (table == head)
