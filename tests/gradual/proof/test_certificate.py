"""The certificate: its arithmetic against independent ones, and its error rate by simulation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.stats import binom, norm, skew, t

from bitween.gradual.proof.certificate import (
    TooLittleText,
    bootstrap_bound,
    bound,
    certify,
    certify_in_order,
)

BUDGET = math.log(1.05)
TOKENS = 512


def held_out(rng, mean, documents=24, spread=0.04, alike=0.3, tails=4.0):
    """Windows of documents of 1 to 6 windows: differences around `mean`, alike within a document, heavy tails."""
    place = np.repeat(np.arange(documents), rng.integers(1, 7, documents))
    noise = [rng.standard_t(tails, n) / math.sqrt(tails / (tails - 2)) for n in (documents, len(place))]
    differences = mean + spread * (math.sqrt(alike) * noise[0][place] + math.sqrt(1 - alike) * noise[1])
    return differences, np.full(len(place), TOKENS), place


def verdict_on(data, **settings):
    differences, tokens, documents = data
    return certify(lambda start, stop: differences[start:stop], tokens, documents, **{"budget": BUDGET, **settings})


def allowing(skewness, clusters, level=0.05):
    """Student's quantile with three times the first Cornish-Fisher term, and that of two errors of the skewness."""
    plain = t.ppf(1 - level, clusters - 1)
    return plain + max(3 * skewness + 2 * math.sqrt(6) / clusters, 0) * (1 + 2 * plain**2) / 6


def test_equal_independent_windows_give_the_textbook_interval_and_what_an_unseen_skewness_takes():
    d = np.array([3.0, -1.0, 2.0, 5.0, 4.0, 0.5, 2.5, 1.0, 6.0, -2.0])
    d = np.concatenate([d, d.sum() / 5 - d])  # symmetric about its mean: no skewness
    found = bound(d, np.full(20, TOKENS))
    error = d.std(ddof=1) / math.sqrt(20)
    assert found.by == "windows"
    assert found.increase == pytest.approx(d.mean())
    assert found.standard_error == pytest.approx(error)
    assert found.bound == pytest.approx(d.mean() + allowing(0.0, 20) * error)
    assert found.upper(0.05) == pytest.approx(found.bound)
    assert found.lower(0.05) == pytest.approx(d.mean() - allowing(0.0, 20) * error)
    assert found.perplexity_bound == pytest.approx(math.exp(found.bound) - 1)


def test_documents_of_any_size_give_the_jackknife():
    rng = np.random.default_rng(2)
    d, documents = rng.normal(0.04, 0.05, 30), rng.integers(0, 9, 30)
    tokens = rng.integers(100, 900, 30)
    found = bound(d, tokens, [f"document {n}" for n in documents])
    without = [np.average(d[documents != g], weights=tokens[documents != g]) for g in np.unique(documents)]
    mean, n = np.average(d, weights=tokens), len(without)
    assert (found.by, found.clusters) == ("documents", n)
    assert found.increase == pytest.approx(mean)
    assert found.standard_error == pytest.approx(math.sqrt((n - 1) / n * sum((w - mean) ** 2 for w in without)))


def test_alike_windows_widen_the_bound():
    d, tokens, documents = held_out(np.random.default_rng(0), 0.04, alike=0.9)
    assert bound(d, tokens, documents).standard_error > 1.3 * bound(d, tokens).standard_error
    assert bound(d, tokens, np.zeros(len(d))).by == "windows"


def test_skewed_differences_widen_the_bound_on_the_long_side():
    d = np.random.default_rng(0).exponential(size=40)
    found, tokens = bound(d, np.ones(40)), np.ones(40)
    plain = t.ppf(0.95, 39) * d.std(ddof=1) / math.sqrt(40)
    skewness = skew(d, bias=False) * (40 - 2) / math.sqrt(40 * (40 - 1)) * 40**2 / (39 * 38) * 1 / math.sqrt(40)
    assert found.skewness == pytest.approx(skewness, rel=0.05)
    assert found.bound == pytest.approx(d.mean() + allowing(found.skewness, 40) * plain / t.ppf(0.95, 39))
    assert found.bound - d.mean() > 1.2 * plain
    assert bound(-d, tokens).bound + d.mean() == pytest.approx(plain)
    assert found.increase - found.lower(0.05) == pytest.approx(plain)


@pytest.mark.parametrize("shape", ["heavy", "skewed"])
def test_bootstrap_agrees(shape):
    rng = np.random.default_rng(4)
    d, tokens, documents = held_out(rng, 0.04, documents=60)
    if shape == "skewed":
        d = 0.04 * rng.gamma(2.0, size=60)[documents] + 0.01 * rng.standard_normal(len(d))
    found = bound(d, tokens, documents)
    other = bootstrap_bound(d, tokens, documents)
    assert other == bootstrap_bound(d, tokens, documents)
    plain = found.standard_error * t.ppf(0.95, found.freedom)
    assert 0.9 * plain < other - found.increase
    assert other < found.bound  # which allows for more skewness than the sample shows
    assert found.bound - found.increase < 1.4 * (other - found.increase)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(9), np.ones(8)), "tokens: expected one per window"),
        ((np.zeros(9), np.ones(9), np.ones(3)), "documents: expected one per window"),
        ((np.full(9, np.nan), np.ones(9)), "differences: expected finite numbers; got one in window 0"),
        ((np.zeros(9), np.r_[np.ones(5), 0, 1, 1, 1]), "tokens: expected at least 1 .*; got none in window 5"),
        ((np.zeros(9), np.ones(9), None, 0.3), "confidence"),
        ((np.zeros(7), np.ones(7)), "at least 8 windows"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        bound(*arguments)


def test_clear_cases_are_settled_early():
    rng = np.random.default_rng(1)
    good = verdict_on(held_out(rng, 0.0, documents=100))
    assert (good.verdict, good.accepted, len(good.looks)) == ("accepted", True, 1)
    assert good.increase < good.bound <= BUDGET
    assert good.documents < 100
    bad = verdict_on(held_out(rng, 0.12, documents=60))
    assert (bad.verdict, len(bad.looks)) == ("refused", 1)


def test_only_the_windows_of_each_look_are_measured_once():
    d, tokens, documents = held_out(np.random.default_rng(1), 0.045, documents=40)
    asked = []

    def measure(start, stop):
        asked.append((start, stop))
        return d[start:stop]

    certificate = certify(measure, tokens, documents, budget=BUDGET, looks=4)
    assert [0, *(stop for _, stop in asked[:-1])] == [start for start, _ in asked]
    assert [look.windows for look in certificate.looks] == [stop for _, stop in asked]
    assert all(documents[stop - 1] != documents[stop] for _, stop in asked if stop < len(d))
    assert certificate.tokens == tokens[: asked[-1][1]].sum()


@pytest.mark.parametrize(
    ("spending", "thresholds"), [("late", [3.7103, 2.5114, 1.9930]), ("even", [2.2794, 2.2949, 2.2959])]
)
def test_looks_share_the_error_probability(spending, thresholds):
    """Three looks at thirds of the text, at one-sided 0.025: the thresholds that Jennison and Turnbull tabulate."""
    d = BUDGET + np.random.default_rng(3).normal(0, 0.01, 30)
    undecided = certify(
        lambda start, stop: d[start:stop], [TOKENS] * 30, budget=BUDGET, confidence=0.975, spending=spending
    )
    np.testing.assert_allclose(norm.isf([look.level for look in undecided.looks]), thresholds, atol=6e-4)


def test_undecided_tells_how_much_text_would_do():
    rng = np.random.default_rng(7)
    small = verdict_on(held_out(rng, 0.04, documents=8, tails=30))
    assert small.verdict == "undecided"
    assert small.increase < BUDGET < small.bound
    assert small.needed_tokens > small.tokens
    enough = math.ceil(3 * 8 * small.needed_tokens / small.tokens)  # with a margin: the spread seen is an estimate
    assert verdict_on(held_out(rng, small.increase, documents=enough, tails=30)).accepted
    assert f"about {small.needed_tokens:,} tokens would do" in str(small)


def test_too_little_text_states_the_need():
    few = certify(lambda start, stop: np.full(stop - start, 0.01), [TOKENS] * 5, budget=BUDGET)
    assert (few.verdict, few.increase, few.bound) == ("undecided", pytest.approx(0.01), math.inf)
    assert few.needed_tokens == 8 * TOKENS
    with pytest.raises(TooLittleText) as caught:
        bound(np.zeros(5), np.ones(5))
    assert caught.value.needed == 8
    with pytest.raises(ValueError, match="at least one window"):
        certify(lambda start, stop: np.zeros(0), [], budget=BUDGET)


def test_above_the_budget_on_all_text_is_refused():
    d = np.tile([0.02, 0.09], 10)  # mean 0.055 > ln 1.05, but not clearly
    certificate = certify(lambda start, stop: d[start:stop], np.full(20, TOKENS), budget=BUDGET, looks=1)
    assert certificate.verdict == "refused"
    assert bound(d, np.full(20, TOKENS)).lower(0.05) < BUDGET
    assert certificate.needed_tokens is None


def test_identical_models_and_broken_models():
    same = certify(lambda start, stop: np.zeros(stop - start), [TOKENS] * 30, budget=0.0)
    assert (same.verdict, same.bound) == ("accepted", 0.0)
    for failure in (math.nan, math.inf):
        broken = certify(lambda start, stop, f=failure: np.full(stop - start, f), [TOKENS] * 30, budget=BUDGET)
        assert (broken.verdict, broken.bound, len(broken.looks)) == ("refused", math.inf, 1)
        assert broken.to_dict()["perplexity_bound"] is None


def test_certificate_can_be_read_and_stored():
    certificate = verdict_on(held_out(np.random.default_rng(1), 0.01, documents=60), text="held-out.txt")
    stored = json.loads(json.dumps(certificate.to_dict(), allow_nan=False))
    assert stored["perplexity_budget"] == pytest.approx(0.05)
    assert stored["perplexity_bound"] == pytest.approx(math.expm1(certificate.bound))
    assert stored["looks"][-1]["bound"] == certificate.bound
    line = str(certificate)
    assert line.startswith("accepted: perplexity +")
    assert f"{certificate.tokens:,} tokens in {certificate.windows} windows of {certificate.documents} doc" in line
    assert line.endswith("from held-out.txt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"confidence": 1.0}, "confidence"), ({"looks": 0}, "looks"), ({"budget": math.nan}, "budget")],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        certify(lambda start, stop: np.zeros(stop - start), [TOKENS] * 30, **{"budget": BUDGET, **settings})


def test_a_measure_of_the_wrong_size_is_refused():
    with pytest.raises(ValueError, match="measure: expected 10 differences"):
        certify(lambda start, stop: np.zeros(3), [TOKENS] * 30, budget=BUDGET)


def test_candidates_are_tested_up_to_the_first_failure():
    data = [held_out(np.random.default_rng(9), mean, documents=60) for mean in (0.0, 0.01, 0.2, 0.0)]
    asked = []

    def candidate(number):
        def measure(start, stop):
            asked.append(number)
            return data[number][0][start:stop]

        return measure

    certificates = certify_in_order([candidate(n) for n in range(4)], *data[0][1:], budget=BUDGET)
    assert [c.verdict for c in certificates] == ["accepted", "accepted", "refused"]
    assert set(asked) == {0, 1, 2}


RUNS = 500


@pytest.mark.parametrize(("spending", "alike"), [("late", 0.1), ("late", 0.5), ("even", 0.3)])
def test_wrongly_accepted_no_more_often_than_promised(spending, alike):
    """Random splits of a pool of documents whose true increase is the budget itself, the hardest case."""
    rng = np.random.default_rng(11)
    pool, _, place = held_out(rng, 0.0, documents=2000, alike=alike)
    pool += BUDGET - pool.mean()
    start = np.searchsorted(place, np.arange(2001))
    wrong = 0
    for _ in range(RUNS):
        split = [np.arange(start[g], start[g + 1]) for g in rng.choice(2000, 24, replace=False)]
        documents = np.repeat(np.arange(24), [len(s) for s in split])
        d = pool[np.concatenate(split)]
        wrong += verdict_on((d, np.full(len(d), TOKENS), documents), spending=spending).accepted
    assert wrong <= binom.ppf(0.999, RUNS, 0.05)
    assert wrong >= binom.ppf(0.0001, RUNS, 0.025)  # nor is text wasted by being far too strict


def test_family_of_candidates_errs_no_more_often_than_promised():
    """Two good candidates, then three at the budget: accepting any of the three is an error."""
    rng = np.random.default_rng(12)
    wrong = reached = 0
    for _ in range(RUNS):
        d, tokens, documents = held_out(rng, 0.0)
        own = [rise + d + rng.normal(0, 0.01, len(d)) for rise in (0.0, 0.005, BUDGET, BUDGET, BUDGET)]
        measures = [lambda start, stop, one=one: one[start:stop] for one in own]
        certificates = certify_in_order(measures, tokens, documents, budget=BUDGET)
        reached += len(certificates) > 2
        wrong += sum(c.accepted for c in certificates) > 2
    assert reached > 0.8 * RUNS
    assert wrong <= binom.ppf(0.999, RUNS, 0.05)


def test_good_models_are_accepted():
    """A true increase of 2.5 % of a 5 % budget, on 24 documents of 3.5 windows: nearly always certified."""
    rng = np.random.default_rng(13)
    runs = [verdict_on(held_out(rng, math.log(1.025))) for _ in range(300)]
    assert sum(c.accepted for c in runs) > 0.85 * len(runs)
    assert sum(len(c.looks) < 3 for c in runs) > 0.5 * len(runs)
