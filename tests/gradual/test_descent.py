"""The descent on a made-up model whose true damage is known: where it stops, and what it learns on the way."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from bitween.gradual.descent import Descent
from bitween.gradual.measurement import Measurement
from bitween.gradual.plan.items import Item, Option
from bitween.gradual.plan.planner import frontier

BUDGET = math.log(1.05)


def make(real, budget=BUDGET, seed=0):
    """A descent over 60 layers; `real` maps a plan's summed damage to what measuring it gives."""
    rng = np.random.default_rng(seed)
    items = []
    for i in range(60):
        scale = rng.lognormal(-9, 1.0)
        options = [Option(bits, 1000 * bits, scale * 4.0 ** (6 - bits)) for bits in (2, 3, 4, 5, 6, 8)]
        items.append(Item(f"layer {i}", tuple(options)))

    def realise(name, plan):
        damage = real(plan.damage)
        measured = Measurement(damage, 0.0, 10.0, 10.0, math.expm1(damage), 1.0, 100)
        return SimpleNamespace(measurement=measured, seconds=0.0)

    return Descent(frontier(items), realise, budget)


def test_a_target_within_the_budget_is_reached_exactly():
    descent = make(lambda total: 1.2 * total)
    stage = descent.walk(480_000, 300_000, 3)
    assert stage.accepted
    assert stage.nbytes <= 300_000
    assert descent.smallest_within_budget(300_000) is stage


def test_a_floor_of_noise_does_not_spoil_the_prediction():
    """At 8 bits the noise of the products is all there is; its ratio to the sum must not be carried downwards."""
    descent = make(lambda total: 0.0024 + 1.1 * total)
    descent.walk(480_000, 330_000, 3)
    plan = descent.frontier.within_bytes(260_000)
    assert descent.predicted(plan) == pytest.approx(0.0024 + 1.1 * plan.damage, rel=0.15)
    assert descent.model.floor == pytest.approx(0.0024, rel=0.1)


@pytest.mark.parametrize(
    "real", [lambda t: 2 * t, lambda t: 0.002 + t, lambda t: 0.6 * t**1.1], ids=("twice", "a floor", "a power")
)
def test_the_fewest_bytes_within_the_budget(real):
    descent = make(real)
    assert descent.walk(480_000, 125_000, 2) is None or not descent.stages[-1].accepted
    found = descent.smallest_within_budget(125_000)
    sizes = descent.frontier.nbytes
    best = min(n for n in sizes if real(descent.frontier.within_bytes(int(n)).damage) <= BUDGET)
    assert found.accepted
    assert best <= found.nbytes <= 1.06 * best


def test_the_target_itself_may_be_the_answer_of_the_search():
    """The walk gave up on a prediction that was too dark; the search then finds that the target holds."""
    factors = iter([30.0])  # the first plan measures badly, all others as predicted
    descent = make(lambda total: next(factors, 1.0) * total)
    descent.walk(480_000, 300_000, 2)
    assert descent.smallest_within_budget(300_000).nbytes <= 300_000


def test_what_can_not_be_measured_is_never_accepted():
    descent = make(lambda total: math.inf if total > 0.01 else total)
    stage = descent.try_plan("broken", descent.frontier.within_bytes(150_000))
    assert not stage.accepted
    assert math.isfinite(descent.predicted(descent.frontier.within_bytes(400_000)))
