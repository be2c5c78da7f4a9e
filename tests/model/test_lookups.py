"""Gradients at the rows that a model looks up in its table of words, whatever it does with them before its blocks."""

import copy

import pytest
import torch
from torch import nn

from bitween.model.blocks import BlockRunner, inspect
from tests.tiny_models import VOCABULARY, make, tokens

TABLES = {
    "llama": {},
    "gemma": {},  # scaled in the model
    "gemma3_text": {},  # scaled in the module
    "electra": {"embedding_size": 16, "is_decoder": True},  # narrower than the blocks, then a norm and a projection
    "bloom": {},  # a norm
    "deepseek_v4": {
        "hidden_size": 64,
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "hc_mult": 2,
    },
}


@pytest.mark.parametrize("family", TABLES)
def test_gradients_at_the_rows_that_are_looked_up(family):
    """Against torch's own gradient of the table, of which each id takes one row."""
    model, ids = make(family, **TABLES[family]), torch.arange(3, 15)[None]
    target = torch.randn(1, 12, VOCABULARY, generator=torch.Generator().manual_seed(3))
    table = model.get_input_embeddings().weight
    other = copy.deepcopy(model)
    other.get_input_embeddings().weight = nn.Parameter(table.detach().clone())  # a tied head has no part in it
    (other(ids).logits * target).sum().backward()
    expected = other.get_input_embeddings().weight.grad[ids[0]]
    runner = BlockRunner(model, inspect(model), products="fp32")
    with runner:
        hidden, context = runner.embed(ids)
        leaf = hidden.detach().requires_grad_(True)
        out = leaf
        for i in range(len(runner.layout.blocks)):
            out = runner.run_block(i, out, context, grad=True)
        logits_ = runner.after_head(runner.logits(runner.final(out, grad=True), grad=True))
        got = runner.table_gradient(ids, *torch.autograd.grad((logits_ * target).sum(), leaf))
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_table_that_is_not_looked_up_gives_no_gradient(monkeypatch):
    model = make("llama")
    runner = BlockRunner(model, inspect(model), products="fp32")
    monkeypatch.setattr(model.model.embed_tokens, "forward", lambda ids: model.model.embed_tokens.weight[ids] + 0)
    ids = tokens()
    hidden, _ = runner.embed(ids)
    assert runner.table_gradient(ids, torch.ones_like(hidden)) is None
