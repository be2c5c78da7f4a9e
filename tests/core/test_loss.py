"""cross_entropy, kl_divergence and mean against torch in float64, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bitween
from bitween import _core

ISAS = bitween.info()["isas"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(None)


def exact_nll(logits, targets):
    return torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none").numpy()


def exact_kl(reference, logits):
    p, q = (x.double().log_softmax(-1) for x in (reference, logits))
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).numpy()


def random_logits(tokens, vocabulary, dtype, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(tokens, vocabulary, generator=generator) * spread
    return reference.to(dtype), (reference + torch.randn(reference.shape, generator=generator) * 0.1 * spread).to(dtype)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(0, 6),
    vocabulary=st.sampled_from([1, 2, 15, 16, 17, 100, 1023, 1024, 1025, 4111]),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.01, 1.0, 8.0, 60.0]),
    transposed=st.booleans(),
    seed=st.integers(0, 999),
)
def test_equals_torch(isa, tokens, vocabulary, dtype, spread, transposed, seed):
    reference, logits = random_logits(tokens, vocabulary, dtype, spread, seed)
    targets = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))
    view = logits.T.contiguous().T if transposed else logits
    found = bitween.cross_entropy(view, targets)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact_nll(logits, targets), rtol=1e-6, atol=1e-6)
    found = bitween.kl_divergence(reference, view)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact_kl(reference, logits), rtol=2e-5, atol=1e-6)


def test_exp_is_accurate():
    """Two logits apart by x, in blocks that are added in fp64: the loss of the larger is log(1 + exp(-x))."""
    x = np.linspace(0, 18, 1500, dtype=np.float32)
    logits = np.full((len(x), 1025), -np.inf, np.float32)
    logits[:, 0], logits[:, 1024] = 0, -x
    found = bitween.cross_entropy(logits, np.zeros(len(x), int))
    np.testing.assert_allclose(found, np.log1p(np.exp(-x.astype(np.float64))), rtol=2e-7)


def test_equal_logits_have_no_divergence():
    x = torch.randn(5, 3000) * 10
    assert (bitween.kl_divergence(x, x.clone()) == 0).all()
    np.testing.assert_allclose(bitween.kl_divergence(x, x + 3), 0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan(dtype):
    x = torch.randn(6, 50).to(dtype)
    y = torch.randn(6, 50).to(dtype)
    x[0, 3] = y[0, 3] = -torch.inf  # no probability in both: no cost
    x[1, 4] = -torch.inf  # in the reference only: no cost
    y[2, 5] = -torch.inf  # in the quantized only: infinite
    y[3, 6] = torch.nan
    y[4, 7] = torch.inf
    kl = bitween.kl_divergence(x, y)
    expected = exact_kl(*(z.masked_fill(z.isinf(), -500) for z in (x, y)))
    np.testing.assert_allclose(kl[[0, 1, 5]], expected[[0, 1, 5]], rtol=1e-5)
    assert kl[2] == np.inf
    assert np.isnan(kl[3:5]).all()
    nll = bitween.cross_entropy(y, torch.tensor([3, 0, 0, 0, 0, 0]))
    assert nll[0] == np.inf
    assert np.isnan(nll[3:5]).all()
    np.testing.assert_allclose(nll[[1, 2, 5]], exact_nll(y, torch.zeros(6, dtype=torch.long))[[1, 2, 5]], rtol=1e-6)
    assert np.isnan(bitween.cross_entropy(torch.full((1, 40), -torch.inf), torch.zeros(1, dtype=torch.long))).all()


def test_leading_dimensions_are_flattened():
    reference, logits = (x.reshape(2, 5, 200)[:, :-1] for x in random_logits(10, 200, torch.bfloat16, 3, 1))
    targets = torch.randint(0, 200, (2, 4))
    np.testing.assert_allclose(
        bitween.cross_entropy(logits, targets), exact_nll(logits.reshape(-1, 200), targets.reshape(-1)), rtol=1e-6
    )
    found = bitween.kl_divergence(reference, logits)
    np.testing.assert_allclose(found, exact_kl(reference, logits).reshape(-1), rtol=1e-5, atol=1e-6)
    one = bitween.kl_divergence(reference[0, 0], logits[0, 0])
    np.testing.assert_array_equal(one, found[:1])


def test_same_bytes_for_any_number_of_threads():
    reference, logits = random_logits(70, 1500, torch.bfloat16, 4, 2)
    targets = np.arange(70)
    found = set()
    for n in (1, 2, 3, 8):
        _core.set_num_threads(n)
        parts = _core.kl_divergence(reference, logits), _core.cross_entropy(logits, targets)
        found.add((*(p.tobytes() for p in parts), _core.total(logits)))
    bitween.get_num_threads()
    assert len(found) == 1


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 1025), (2, 3, 4000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mean(shape, dtype):
    x = (torch.randn(shape) + 1).to(dtype)
    assert bitween.mean(x) == pytest.approx(x.double().mean().item(), rel=1e-12)
    assert np.isnan(bitween.mean(torch.full(shape, torch.nan, dtype=dtype)))


def test_bad_arguments():
    logits = torch.randn(3, 10)
    for bad in (-1, 10, -100):
        with pytest.raises(IndexError, match="targets: expected indices"):
            bitween.cross_entropy(logits, torch.tensor([0, bad, 1]))
    with pytest.raises(TypeError, match="targets: expected integers; got float32"):
        bitween.cross_entropy(logits, torch.zeros(3))
    with pytest.raises(ValueError, match=r"targets: expected shape \(3,\); got \(2,\)"):
        bitween.cross_entropy(logits, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"logits: expected shape \(3, 10\); got \(3, 11\)"):
        bitween.kl_divergence(logits, torch.randn(3, 11))
    with pytest.raises(TypeError, match="logits: expected dtype float32, float16 or bfloat16; got float64"):
        bitween.kl_divergence(logits, logits.double())
    with pytest.raises(ValueError, match="x: expected at least one number"):
        bitween.mean(torch.zeros(0))
