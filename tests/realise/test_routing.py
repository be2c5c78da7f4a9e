"""How often routers choose otherwise, against the models' own router logits."""

import copy

import pytest
import torch

from bitween.model.blocks import BlockRunner, inspect
from bitween.model.experts import unfolded
from bitween.realise.context import RunContext
from bitween.realise.routing import routing_changes
from tests.tiny_models import make, tokens

WINDOWS = tokens(3, 20)
FAMILIES = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8},
}


def _context(model):
    options = {"calibration_data": tokens(12, 16), "length": 16, "calibration_samples": 4, "bounded": False}
    options["products"] = "fp32"  # as the models' own router logits are computed
    return RunContext.build(model, None, evaluation_samples=2, selection_samples=2, **options)


def _candidate(model):
    model = unfolded(model)
    return BlockRunner(model, inspect(model), products="fp32")


def _chosen(model, chosen=2):
    """(blocks, tokens, experts) 1 where the model's own router logits put an expert among the largest."""
    with torch.no_grad():
        found = model(WINDOWS, output_router_logits=True).router_logits
    return torch.stack([torch.zeros_like(x).scatter(-1, x.topk(chosen, -1).indices, 1.0) for x in found])


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_are_those_of_the_models_own_router_logits(family):
    model = make(family, **FAMILIES[family])
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[0].self_attn.v_proj.weight.mul_(1.5)
    expected = (_chosen(model) != _chosen(changed)).any(-1).double().mean(-1)
    found = routing_changes(_context(model), _candidate(changed), WINDOWS)
    assert list(found) == [f"model.layers.{i}.mlp.experts" for i in range(3)]
    assert list(found.values()) == pytest.approx(expected.tolist())
    assert 0 < max(found.values()) < 1


def test_who_is_told_may_be_the_module_around_the_one_that_holds_the_experts():
    experts = {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 6, "moe_top_k": 2}
    attention = {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8}
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64}
    model = make("dbrx", ffn_config=experts, attn_config=attention, **sizes)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.transformer.blocks[0].norm_attn_norm.attn.out_proj.weight.mul_(1.5)
    before, after = _routed(copy.deepcopy(model)), _routed(copy.deepcopy(changed))
    found = routing_changes(_context(model), _candidate(changed), WINDOWS)
    assert list(found) == [f"transformer.blocks.{i}.ffn.experts.mlp" for i in range(3)]
    assert list(found.values()) == pytest.approx((before != after).any(-1).double().mean(-1).tolist())
    assert 0 < max(found.values()) < 1


def _routed(model):
    """(blocks, tokens, chosen) sorted numbers of the experts to which DBRX's routers give the largest logits."""
    seen = []
    for block in model.transformer.blocks:
        block.ffn.router.register_forward_hook(lambda _m, _x, out: seen.append(out.topk(2, -1).indices))
    with torch.no_grad():
        model(WINDOWS)
    return torch.stack(seen).sort(-1).values


def test_nothing_changes_in_the_model_itself_and_nothing_is_told_without_experts():
    model = make("mixtral", **FAMILIES["mixtral"])
    context = _context(model)
    assert set(routing_changes(context, context.runner, WINDOWS).values()) == {0.0}
    assert not any(m._forward_pre_hooks for m in context.model.modules())
    dense = _context(make("llama"))
    assert routing_changes(dense, dense.runner, WINDOWS) == {}
