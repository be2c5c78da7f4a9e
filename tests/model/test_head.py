"""The head with its loss: as the loss of all logits at once, which are never there."""

import numpy as np
import pytest
import torch

import bitween
from bitween import QuantizedLinear, Scheme
from bitween.model.head import position_blocks


@pytest.fixture(params=["linear", "packed"])
def heads(request):
    torch.manual_seed(0)
    plain = torch.nn.Linear(48, 1000, bias=False)
    other = torch.nn.Linear(48, 1000, bias=False)
    if request.param == "packed":
        other = QuantizedLinear.from_linear(plain, Scheme(4, 16))
    return plain, other


def noting(head, seen):
    def call(states):
        seen.append(len(states))
        with torch.no_grad():
            return head(states)

    return call


@pytest.mark.parametrize("tokens", [0, 1, 17, 256, 600])
def test_losses_are_those_of_all_logits(heads, tokens):
    plain, other = heads
    states, targets, seen = torch.randn(tokens, 48), torch.randint(1000, (tokens,)), []
    found = bitween.head_cross_entropy(noting(other, seen), states, targets)
    with torch.no_grad():
        reference, logits = plain(states).double(), other(states).double()
    want = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    np.testing.assert_allclose(found, want.numpy(), rtol=1e-4, atol=1e-4)
    assert sum(seen) == tokens
    assert max(seen, default=0) <= 256
    found = bitween.head_kl_divergence(noting(plain, seen), states, noting(other, seen), states)
    want = torch.nn.functional.kl_div(
        logits.log_softmax(-1), reference.log_softmax(-1), reduction="none", log_target=True
    )
    np.testing.assert_allclose(found, want.sum(-1).numpy(), rtol=1e-3, atol=1e-5)


def test_blocks_cover_every_position_once():
    assert [i for part in position_blocks(700) for i in range(700)[part]] == list(range(700))


def test_shapes_that_do_not_fit(heads):
    with pytest.raises(ValueError, match=r"states: expected shape \(tokens, width\); got \(2, 3, 48\)"):
        bitween.head_cross_entropy(heads[0], torch.zeros(2, 3, 48), torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"targets: expected 5 tokens; got shape \(4,\)"):
        bitween.head_cross_entropy(heads[0], torch.zeros(5, 48), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"reference_states: expected 5 tokens; got shape \(4, 48\)"):
        bitween.head_kl_divergence(heads[0], torch.zeros(4, 48), heads[1], torch.zeros(5, 48))
