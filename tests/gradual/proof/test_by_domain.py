"""One certificate of several domains: it holds for each, and the worst one speaks."""

import math

import numpy as np
import pytest

from bitween.gradual.proof.by_domain import together
from bitween.gradual.proof.certificate import certify

BUDGET = math.log(1.05)


def certificate(mean, windows=60, spread=0.01, budget=BUDGET, seed=0):
    d = np.random.default_rng(seed).normal(mean, spread, windows)
    return certify(lambda a, b: d[a:b], [100] * windows, np.arange(windows), budget=budget)


def test_the_worst_domain_speaks_and_all_count():
    parts = {"prose": certificate(0.01), "code": certificate(0.03, seed=1)}
    found = together(parts, "here", ["prose", "code"])
    assert (found.verdict, found.worst, found.bound) == ("accepted", "code", parts["code"].bound)
    assert found.tokens == sum(part.tokens for part in parts.values())
    assert "in code, the worst of 2 domains" in str(found)
    assert set(found.to_dict()["domains"]) == {"prose", "code"}


@pytest.mark.parametrize(
    ("second", "verdict"),
    [
        ({"mean": 0.2}, "refused"),
        ({"mean": 0.045, "spread": 0.05, "windows": 10, "seed": 3}, "undecided"),
        ({"mean": 0.03, "budget": math.log(1.01)}, "refused"),  # within the common budget, not within its own
    ],
)
def test_one_domain_that_fails_decides(second, verdict):
    found = together({"a": certificate(0.0), "b": certificate(**second)}, "here", ["a", "b"])
    assert (found.verdict, found.worst) == (verdict, "b")


def test_a_domain_without_text_leaves_it_undecided():
    assert together({"a": certificate(0.0)}, "here", ["a", "b"]).verdict == "undecided"


def test_a_single_domain_is_its_own_certificate():
    one = certificate(0.0)
    assert together({"a": one}, "here", ["a"]) is one


def test_a_model_above_the_budget_in_one_domain_of_six_is_seldom_accepted():
    """Five domains without any harm and one at its budget: no sharing of the error rate is needed, nor used."""
    rng, runs = np.random.default_rng(5), 300
    wrong = 0
    for _ in range(runs):
        parts = {}
        for place, mean in enumerate((0.0, 0.0, BUDGET, 0.0, 0.0, 0.0)):
            d = rng.normal(mean, 0.03, 24)
            parts[str(place)] = certify(lambda a, b, d=d: d[a:b], [100] * 24, np.arange(24), budget=BUDGET)
        wrong += together(parts, "").accepted
    assert wrong <= 25  # 5 % of 300, and 2.6 standard deviations
    assert wrong > 1
