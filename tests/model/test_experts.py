"""Experts in 3-D parameters: each matrix a layer; packed, saved, loaded, planned."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitween
from bitween import Bitween, QuantizedLinear, Scheme
from bitween.gradual import GradualQuantizer
from bitween.layers.experts import ExpertStack
from bitween.model.blocks import inspect
from bitween.model.experts import find_stacks, unfolded
from tests.tiny_models import VOCABULARY, logits, make, tokens

_SIZES = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "head_dim": 8}
FAMILIES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_SIZES, "num_experts": 4, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**_SIZES, "num_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "llama4_text": {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 48},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron_h": {
        **_SIZES,
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 32,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 16,
        "n_groups": 1,
        "layer_types": ["mamba", "moe", "attention"],
    },
}
TRANSPOSED = {"gpt_oss", "llama4_text"}


def dequantized(model, packed):
    """A copy of the model with the packed numbers in its own parameters."""
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in packed.named_modules():
            if not hasattr(module, "weight_nbytes"):
                continue
            home, _, number = name.rpartition(".")
            stack, values = packed.get_submodule(home), module.dequantize()
            if isinstance(stack, ExpertStack):
                plain.get_parameter(home)[int(number)].copy_(values.t() if stack.transposed else values)
            else:
                plain.get_submodule(name).weight.copy_(values)
    return plain


def gap(got, wanted):
    return ((got - wanted).abs().max() / wanted.std()).item()


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def test_packed_experts_compute_what_the_dequantized_model_does(family):
    model = make(family, **FAMILIES[family])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quantizer = Bitween(model, bits=4, group_size=32)
    packed = quantizer.quantize(method="gptq", calibration_data=tokens(12, 24))
    bitween.set_matmul_mode(packed, "exact")
    plain = dequantized(model, packed)
    for ids in (tokens(), tokens(1, 1)):  # a single token takes a way of its own
        assert gap(logits(packed, ids), logits(plain, ids)) < 1e-3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in ends)
    ends = {id(packed.get_input_embeddings().weight), id(packed.get_output_embeddings().weight)}
    left = sum(p.numel() for p in packed.parameters() if p.ndim >= 2 and id(p) not in ends)
    assert left <= 0.05 * matrices


def test_packed_experts_load_as_they_were_saved(family, tmp_path):
    packed = Bitween(make(family, **FAMILIES[family]), bits=4, group_size=32).quantize()
    bitween.save_model(packed, None, tmp_path / "saved")
    loaded, _ = bitween.load_model(tmp_path / "saved")
    assert torch.equal(logits(loaded, tokens()), logits(packed, tokens()))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(theirs, tokens()), logits(packed, tokens()))


def test_orientation_is_found(family):
    stacks = find_stacks(make(family, **FAMILIES[family]))
    assert stacks
    assert set(stacks.values()) == {family in TRANSPOSED}


def test_unfolding_changes_no_logit_and_no_memory():
    model = make("gpt_oss", **FAMILIES["gpt_oss"])
    other = unfolded(model)
    assert gap(logits(other, tokens()), logits(model, tokens())) < 1e-5
    stack = other.model.layers[0].mlp.experts.gate_up_proj
    parameter = model.model.layers[0].mlp.experts.gate_up_proj
    assert stack.layer(1).weight.data_ptr() == parameter[1].data_ptr()
    assert stack.shape == parameter.shape
    assert torch.equal(stack.dense(), parameter)
    assert torch.equal(stack[1] + 0, parameter[1])  # any use that is no product gets the numbers


class LeftProducts(torch.nn.Module):
    """Two heads with a matrix each, multiplied with columns: all at once as Zamba does, and one by one."""

    def __init__(self, at_once):
        super().__init__()
        self.embed, self.at_once = torch.nn.Embedding(20, 16), at_once
        self.weight = torch.nn.Parameter(torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0)))

    def get_input_embeddings(self):
        return self.embed

    def forward(self, ids):
        x = self.embed(ids).transpose(1, 2)  # (batch, 16, length)
        if self.at_once:
            return self.weight[:, None] @ torch.stack([x, 2 * x])
        return torch.stack([self.weight[0] @ x, torch.matmul(self.weight[1], 2 * x)])


@pytest.mark.parametrize("at_once", [True, False])
def test_stacks_on_the_left_of_a_product_are_multiplied_packed(at_once, monkeypatch):
    model, ids = LeftProducts(at_once), torch.arange(12).reshape(2, 6)
    assert find_stacks(model) == {"weight": False}
    want = model(ids)
    other = unfolded(model)
    torch.testing.assert_close(other(ids), want)
    assert (other.weight[:, None] + 0).shape == (2, 1, 32, 16)  # any use that is no product gets the numbers
    for e in range(2):
        other.weight.add_module(str(e), QuantizedLinear.from_linear(other.weight.layer(e), Scheme(4, 16)))
    bitween.set_matmul_mode(other, "exact")
    plain = copy.deepcopy(model)
    plain.weight.data.copy_(other.weight.dense())
    monkeypatch.setattr(ExpertStack, "dense", lambda self: pytest.fail("unpacked"))
    with torch.no_grad():
        torch.testing.assert_close(other(ids), plain(ids), rtol=1e-4, atol=1e-4)


def test_a_model_without_experts_is_not_copied():
    model = make("llama")
    assert unfolded(model) is model


def test_experts_and_routers_are_kinds_of_their_own():
    layout = inspect(make("mixtral"))
    experts = [layer for layer in layout.layers if layer.kind == "expert"]
    assert len(experts) == 3 * 4 * 2
    assert experts[0].name == "model.layers.0.mlp.experts.gate_up_proj.0"
    assert experts[0].shape == (96, 32)


def test_ignored_stacks_stay_one_parameter():
    model = make("mixtral")
    packed = Bitween(model, bits=4, group_size=32).quantize(ignore_layers="*.experts.*")
    assert packed.model.layers[0].mlp.experts.down_proj.shape == (4, 32, 48)
    assert not any(isinstance(module, ExpertStack) for module in packed.modules())
    bitween.set_matmul_mode(packed, "exact")
    assert gap(logits(packed, tokens()), logits(dequantized(model, packed), tokens())) < 1e-3


def test_a_part_of_a_stack_may_stay(tmp_path):
    packed = Bitween(make("gpt_oss", **FAMILIES["gpt_oss"]), bits=4, group_size=32).quantize(ignore_layers="*_proj.3")
    bitween.save_model(packed, None, tmp_path / "saved")
    loaded, _ = bitween.load_model(tmp_path / "saved")
    assert torch.equal(logits(loaded, tokens()), logits(packed, tokens()))


def test_the_gradual_quantizer_plans_each_expert():
    ids = torch.randint(3, VOCABULARY, (48, 32), generator=torch.Generator().manual_seed(2))
    quantizer = GradualQuantizer(
        make("mixtral"),
        None,
        target_memory_reduction=0.5,
        max_perplexity_increase=0.5,
        calibration_data=ids,
        calibration_samples=8,
        evaluation_samples=16,
        sequence_length=32,
        on_conflict="memory",
        distillation_steps=0,
    )
    model = quantizer.quantize()
    report = quantizer.get_quantization_report()
    assert report.memory.reduction >= 0.5
    assert "model.layers.0.mlp.experts.down_proj.2" in report.plan
    assert torch.isfinite(logits(model, tokens())).all()


def test_experts_that_no_text_reaches_are_counted():
    model = make("gpt_oss", **FAMILIES["gpt_oss"])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router.bias[3] = -1e4  # never among the chosen
    ids = torch.randint(3, VOCABULARY, (48, 32), generator=torch.Generator().manual_seed(2))
    quantizer = GradualQuantizer(
        model,
        None,
        target_memory_reduction=0.8,
        calibration_data=ids,
        calibration_samples=8,
        evaluation_samples=16,
        sequence_length=32,
        on_conflict="memory",
        distillation_steps=0,
        certify=False,
        importance=False,
    )
    quantizer.quantize()
    report = quantizer.get_quantization_report()
    assert report.unreached_experts
    assert all(name.endswith(".3") for name in report.unreached_experts)
    assert "reached by no calibration text" in str(report)
    assert set(report.routing) == {f"model.layers.{i}.mlp.experts" for i in range(len(model.model.layers))}
    assert "of tokens go to other experts" in str(report)
