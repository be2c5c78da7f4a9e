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
from bitween.model.experts import Held, find_stacks, unfolded
from bitween.store.checkpoint import CheckpointError
from bitween.store.hub import BitweenConfig, swap
from tests.tiny_models import VOCABULARY, logits, make, tokens

_SIZES = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "head_dim": 8}
FAMILIES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_SIZES, "num_experts": 4, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**_SIZES, "num_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "llama4_text": {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 48},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 64,
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
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
TRANSPOSED = {"gpt_oss": {True}, "llama4_text": {True}, "dbrx": {False, True}}
FUSED = {"dbrx": 4}


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
                parameter = plain.get_parameter(home)
                matrices = parameter if parameter.ndim == 3 else parameter.unflatten(0, (len(stack), -1))
                matrices[int(number)].copy_(values.t() if stack.transposed else values)
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
    assert {held.transposed for held in stacks.values()} == TRANSPOSED.get(family, {False})
    assert {held.fused for held in stacks.values()} == {FUSED.get(family, 0)}


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
    assert find_stacks(model) == {"weight": Held(transposed=False)}
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


_CUTS = {
    "view": lambda w, e: w.view(-1, 32, 16)[e],
    "reshape": lambda w, e: w.reshape(3, -1, w.shape[1])[e],
    "unflatten": lambda w, e: w.unflatten(0, (3, 32))[e],
    "chunk": lambda w, e: w.chunk(3)[e],
    "torch.chunk": lambda w, e: torch.chunk(w, 3, dim=0)[e],
    "split": lambda w, e: w.split(32)[e],
    "slice": lambda w, e: w[32 * e : 32 * (e + 1)],
}


class FusedProducts(torch.nn.Module):
    """Three experts one below the other in each of two matrices, one of them transposed, and a router."""

    def __init__(self, cut):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed, self.cut = torch.nn.Embedding(20, 16), cut
        self.whole = torch.nn.Parameter(torch.randn(48, 16, generator=generator))
        self.up = torch.nn.Parameter(torch.randn(96, 16, generator=generator))
        self.down = torch.nn.Parameter(torch.randn(96, 16, generator=generator))

    def get_input_embeddings(self):
        return self.embed

    def forward(self, ids):
        x = self.embed(ids)
        x = x + torch.nn.functional.linear(x, self.whole)[..., :16]  # one matrix of a parameter that is no stack
        cut = _CUTS[self.cut]
        return sum(torch.relu(x @ cut(self.up, e).T) @ cut(self.down, e) for e in range(3))


@pytest.mark.parametrize("cut", _CUTS)
def test_experts_one_below_the_other_are_multiplied_packed(cut, monkeypatch):
    model, ids = FusedProducts(cut), torch.arange(12).reshape(2, 6)
    assert find_stacks(model) == {"up": Held(False, 3), "down": Held(True, 3)}
    want = model(ids)
    other = unfolded(model)
    torch.testing.assert_close(other(ids), want)
    assert other.up.layer(1).weight.data_ptr() == model.up[32].data_ptr()  # the very memory
    assert other.up.shape == model.up.shape
    for use in (lambda w: w + 0, lambda w: w.T, lambda w: w[3], lambda w: w[2:30], lambda w: w.view(6, 16, 16)):
        assert torch.equal(use(other.up), use(model.up))  # any use that is no product gets the numbers
    for name in ("up", "down"):
        stack = getattr(other, name)
        for e in range(3):
            stack.add_module(str(e), QuantizedLinear.from_linear(stack.layer(e), Scheme(4, 16)))
    bitween.set_matmul_mode(other, "exact")
    plain = copy.deepcopy(model)
    plain.up.data.copy_(other.up.dense())
    plain.down.data.copy_(other.down.dense())
    monkeypatch.setattr(ExpertStack, "dense", lambda self: pytest.fail("unpacked"))
    with torch.no_grad():
        torch.testing.assert_close(other(ids), plain(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [{"up": 5}, {"up": 0}, {"up": "3"}, ["up"]])
def test_experts_that_can_not_lie_one_below_the_other_are_refused(fused):
    def load():
        config = BitweenConfig({"up.1": "4b g16 sym"}, fused_experts=fused)
        swap(FusedProducts("view"), config.schemes, **config.stacks)

    with pytest.raises(CheckpointError, match="fused_experts"):
        load()


@pytest.mark.parametrize("square", [True, False])
def test_stacks_of_a_plain_module_load_as_they_were_saved(square, tmp_path):
    """Transposed ones too, which a square matrix does not tell from others."""
    model = SquareProducts() if square else FusedProducts("chunk")
    other, ids = unfolded(model), torch.arange(12).reshape(2, 6)
    for module in (m for m in other.modules() if isinstance(m, ExpertStack)):
        for e in range(len(module)):
            module.add_module(str(e), QuantizedLinear.from_linear(module.layer(e), Scheme(4, 16)))
    bitween.save_model(other, None, tmp_path / "saved")
    loaded = bitween.load_model(tmp_path / "saved", into=type(model)(**({} if square else {"cut": "chunk"})))[0]
    with torch.no_grad():
        assert torch.equal(loaded(ids), other(ids))


class SquareProducts(torch.nn.Module):
    """Three square experts in a 3-D parameter, each (inputs, outputs)."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(20, 16)
        self.weight = torch.nn.Parameter(torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0)))

    def get_input_embeddings(self):
        return self.embed

    def forward(self, ids):
        return sum(self.embed(ids) @ self.weight[e] for e in range(3))


def test_routers_beside_the_module_around_the_experts_are_found():
    layout = inspect(make("dbrx", **FAMILIES["dbrx"]))
    kinds = {layer.name: layer.kind for layer in layout.layers}
    assert kinds["transformer.blocks.1.ffn.router.layer"] == "router"
    assert kinds["transformer.blocks.1.ffn.experts.mlp.w2.3"] == "expert"


class Seldom(torch.nn.Module):
    """Experts of which the first tokens reach none, here, or in any of the modules."""

    def __init__(self, first):
        super().__init__()
        self.first = first
        self.weight = torch.nn.Parameter(torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        far = x[:, self.first :]
        return torch.cat([x[:, : self.first], far + (far @ self.weight[1])[..., :16]], 1) if far.shape[1] else x


@pytest.mark.parametrize("firsts", [(0, 99), (99, 0), (20, 30)])
def test_stacks_that_no_token_reaches_are_held_as_their_like(firsts):
    model = torch.nn.Sequential(torch.nn.Embedding(120, 16), *map(Seldom, firsts))
    model.get_input_embeddings = lambda: model[0]
    assert find_stacks(model) == {"1.weight": Held(transposed=True), "2.weight": Held(transposed=True)}


def test_a_model_of_few_positions_is_not_shown_more():
    class Few(torch.nn.Module):
        def forward(self, x):
            return x + torch.nn.functional.embedding(torch.arange(x.shape[1]), torch.zeros(10, 16))

    model = torch.nn.Sequential(torch.nn.Embedding(120, 16), Few(), Seldom(0), torch.nn.Module())
    model[3].never = torch.nn.Parameter(torch.zeros(2, 3, 4))
    model[3].forward = lambda x: x
    model.get_input_embeddings = lambda: model[0]
    assert find_stacks(model) == {"2.weight": Held(transposed=True)}


def test_a_stack_as_a_whole_gives_its_numbers_to_anything_but_a_product():
    model = LeftProducts(at_once=True)
    stack, weight = unfolded(model).weight, model.weight
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    for use in (lambda w: w + 1, lambda w: 2 * w, lambda w: w / 2, lambda w: -w, lambda w: 1 - w.mT, lambda w: x @ w):
        torch.testing.assert_close(use(stack), use(weight))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_model_without_experts_is_not_copied_and_not_run(family, monkeypatch):
    model = make(family)
    monkeypatch.setattr(type(model), "forward", lambda *_args, **_kwargs: pytest.fail("run"))
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


def _first_contract(model):
    """As in the first versions of transformers 5: nothing says whether experts have a gate, all of them have."""
    for module in model.modules():
        if hasattr(module, "has_gate"):
            del module.has_gate
    return model


def test_experts_of_the_first_contract_are_found_and_multiplied():
    model = _first_contract(make("mixtral"))
    assert set(find_stacks(model).values()) == {Held(transposed=False)}
    assert gap(logits(unfolded(model), tokens()), logits(make("mixtral"), tokens())) < 1e-5


def test_routers_may_tell_the_weight_of_every_expert():
    experts = unfolded(make("mixtral")).model.layers[0].mlp.experts
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    weights = torch.rand(5, 4, generator=torch.Generator().manual_seed(2))
    chosen = weights.topk(2).indices
    with torch.no_grad():
        torch.testing.assert_close(experts(x, chosen, weights), experts(x, chosen, weights.gather(-1, chosen)))
