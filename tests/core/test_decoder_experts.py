"""The choice of experts, experts that a step names, and experts, sinks and pairs that do not fit."""

from __future__ import annotations

import numpy as np
import pytest

from bitween import _core
from tests.core.test_decoder import SHAPES, Decoder, Steps, forward, miss


def test_experts_may_be_named():
    steps = Steps(Decoder(SHAPES["experts beside an MLP"], np.float32, "exact"), batch=2, seen=9, padding=False)
    d, own = steps.decoder, _core.decode
    random = np.random.default_rng(3)
    named = [np.stack([random.permutation(n)[:3] for _ in range(4)]) for n in (9, 6)]

    def naming(*args):
        own(*args, np.concatenate([one.reshape(-1) for one in named]))

    taken = iter(named)

    def chosen(logits):
        return next(taken).reshape(2, 2, 3)

    x, out = np.ones((2, 2, 40), np.float32), np.full((2, 2, 40), 7, np.float32)
    ropes = ((np.ones((4, 10), np.float32),) * 2 + (False,),) * 2
    rooms = tuple(map(tuple, steps.rooms))
    naming(d.core, x, out, ropes, rooms, None)
    flat = [(c.reshape(2, 2, -1), s.reshape(2, 2, -1)) for c, s, _ in ropes]
    want = forward(d, x.astype(np.float64), steps.text, flat, np.zeros(2, int), chosen)
    assert miss(out, want) < 1e-5
    before = out.copy()
    for wrong in (np.zeros(23, np.int64), np.zeros(25, np.int64), np.zeros(0, np.int64), np.zeros((2, 12), np.int64)):
        with pytest.raises(ValueError, match=r"decod|experts"):
            own(d.core, x, out, ropes, rooms, None, wrong)
    right = np.concatenate([one.reshape(-1) for one in named])
    for number in (-1, 6, right[-2]):  # the last block has six, and a token takes none of them twice
        with pytest.raises(IndexError):
            own(d.core, x, out, ropes, rooms, None, np.r_[right[:-1], number])
    with pytest.raises(TypeError, match="experts"):
        own(d.core, x, out, ropes, rooms, None, np.zeros(24, np.int32))
    assert np.array_equal(out, before)


# ---- the choice of experts ----

ROUTES = [(True, False), (True, True), (False, False)]


def chosen_by(logits, chosen: int, over_all: bool, divided: bool, dtype: int = 0):
    experts, weights = np.empty((len(logits), chosen), np.int64), np.empty((len(logits), chosen), np.float32)
    _core.route(logits, experts, weights, over_all, divided, dtype)
    return experts, weights


@pytest.mark.parametrize(("over_all", "divided"), ROUTES)
@pytest.mark.parametrize(("n", "chosen"), [(1, 1), (2, 1), (8, 2), (60, 4), (64, 8), (128, 8), (256, 64), (4096, 3)])
def test_routes_equal_a_softmax_in_float64(n, chosen, over_all, divided):
    logits = np.random.default_rng(n).standard_normal((20, n)).astype(np.float32) * 3
    experts, weights = chosen_by(logits, chosen, over_all, divided)
    best = np.argsort(-logits, -1)[:, :chosen]
    assert np.array_equal(experts, best)
    expected = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    own = np.take_along_axis(expected, best, -1)
    own /= (own if divided or not over_all else expected).sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, own, rtol=1e-5)
    halves = chosen_by(logits, chosen, over_all, divided, 1)[1]
    assert np.array_equal(halves, weights.astype(np.float16).astype(np.float32))


def test_any_numbers_choose_experts_that_exist_and_each_once():
    random = np.random.default_rng(0)
    for n, chosen in ((5, 5), (9, 2), (64, 8), (200, 2), (1000, 8)):
        for wild in (np.nan, np.inf, -np.inf, 0.0, 1e38):
            logits = random.integers(-1, 2, (50, n)).astype(np.float32)
            logits[random.random((50, n)) < random.random((50, 1))] = wild
            for route in ROUTES:
                experts, _ = chosen_by(logits, chosen, *route)
                assert ((experts >= 0) & (experts < n)).all()
                assert all(len(set(row)) == chosen for row in experts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": np.empty((3, 5), np.int64), "weights": np.empty((3, 5), np.float32)}, "experts"),
        ({"experts": np.empty((2, 2), np.int64)}, "experts"),
        ({"experts": np.empty((3, 2), np.int32)}, "experts"),
        ({"experts": np.empty((3, 0), np.int64), "weights": np.empty((3, 0), np.float32)}, "experts"),
        ({"weights": np.empty((3, 1), np.float32)}, "weights"),
        ({"logits": np.empty((3, 4))}, "logits"),
        ({"logits": np.empty((3, 4097), np.float32)}, "logits"),
        ({"logits": np.empty((3, 0), np.float32)}, "logits"),
        ({"dtype": 3}, "dtype"),
        ({"over_all": 1}, "over_all"),
    ],
)
def test_routes_that_fit_nothing_are_refused(change, message):
    fitting = {
        "logits": np.zeros((3, 4), np.float32),
        "experts": np.empty((3, 2), np.int64),
        "weights": np.empty((3, 2), np.float32),
        "over_all": True,
        "divided": False,
    }
    with pytest.raises((ValueError, TypeError), match=message):
        _core.route(**{**fitting, **change})


def remade(decoder: Decoder, index: int, change) -> tuple:
    """The blocks, in one of which a field of the mixture is another."""
    blocks = list(decoder.blocks)
    mixture = list(blocks[0][6])
    mixture[index] = change(mixture[index])
    blocks[0] = (*blocks[0][:6], tuple(mixture), *blocks[0][7:])
    return tuple(blocks)


def refused(decoder: Decoder, steps: Steps, blocks: tuple, sizes: tuple | None = None) -> None:
    """By the description or by its first step, with a reason, and before anything is written."""

    def run():
        decoder.core = _core.decoder(sizes or decoder.sizes, tuple(decoder.linears), blocks, decoder.final)
        steps.step(1)

    before = [room[0].tobytes() for room in steps.rooms]
    with pytest.raises((ValueError, TypeError)) as raised:
        run()
    assert str(raised.value)
    assert [room[0].tobytes() for room in steps.rooms] == before


@pytest.mark.parametrize(
    ("index", "change"),
    [
        (0, lambda router: None),
        (0, lambda router: (router[0], 0, 4)),  # of fewer experts than there are
        (1, lambda gate: (0, 0, 1)),  # the gate of an MLP that is not there
        (2, lambda experts: experts[:3]),
        (2, lambda experts: ()),
        (2, lambda experts: ((None, None, None), *experts[1:])),
        (2, lambda experts: ((*experts[0][:2], experts[1][2]), *experts[1:])),  # down of another width
        (2, lambda experts: (experts[0][:2], *experts[1:])),
        (3, lambda chosen: 6),
        (3, lambda chosen: 0),
        (3, lambda chosen: 65),
        (6, lambda pairs: True),  # beside gates
        (7, lambda dtype: 3),
    ],
)
def test_experts_that_do_not_fit_are_refused(index, change):
    steps = Steps(Decoder(SHAPES["experts"], np.float32, "int16"), batch=1, seen=3, padding=False)
    refused(steps.decoder, steps, remade(steps.decoder, index, change))


def test_pairs_sinks_and_clamps_that_do_not_fit_are_refused():
    steps = Steps(Decoder(SHAPES["experts in pairs"], np.float32, "int16"), batch=1, seen=3, padding=False)
    d = steps.decoder
    sizes, blocks = list(d.sizes), d.blocks
    refused(d, steps, remade(d, 6, lambda pairs: False))
    refused(d, steps, remade(d, 2, lambda e: ((None, (*e[0][1][:2], e[0][1][2] - 1), e[0][2]), *e[1:])))
    for sinks in (np.zeros(5, np.float32), np.zeros((6, 1), np.float32), np.zeros(6, np.int32), 3):
        refused(d, steps, ((*blocks[0][:7], sinks), *blocks[1:]))
    refused(d, steps, blocks, (*sizes[:6], 2.0, *sizes[7:]))  # sinks under a cap
    refused(d, steps, blocks, (*sizes[:8], 6, *sizes[9:]))
    refused(d, steps, blocks, (*sizes[:10], -1.0, sizes[11]))
    d.linears[0] = (*d.linears[0][:-1], 1)  # late
    refused(d, steps, blocks)
