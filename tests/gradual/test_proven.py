"""Which stage is delivered as proven, and with what error rate each proof is made."""

from types import SimpleNamespace

import pytest

from bitween.gradual.decisions import FIRST, BudgetConflict, proven


def _stage(name, nbytes, damage, accepted=True):
    return SimpleNamespace(name=name, nbytes=nbytes, damage=damage, accepted=accepted, to_dict=lambda: {"name": name})


SAFEST, SAFER, CHOSEN = _stage("8 bits", 300, 0.001), _stage("6 bits", 200, 0.01), _stage("4 bits", 100, 0.05)
BROKEN = _stage("5 bits, unlucky", 150, 0.03, accepted=False)


def _run(verdicts, on_conflict="quality", stages=(SAFEST, SAFER, BROKEN, CHOSEN), conflict=None):
    """What `proven` gives, and the tests that it made: (stage, confidence)."""
    made = []

    def certify(stage, confidence):
        made.append((stage, confidence))
        return SimpleNamespace(verdict=verdicts[stage.name], of=stage)

    descent = SimpleNamespace(stages=list(stages))
    rules = {"on_conflict": on_conflict, "budget": "perplexity budget", "confidence": 0.95}
    return proven(CHOSEN, conflict, descent, certify, **rules), made


def test_the_chosen_stage_is_tested_first_and_alone_when_it_is_accepted():
    (stage, proof, conflict), made = _run({"4 bits": "accepted"})
    assert stage is proof.of is CHOSEN
    assert conflict is None
    assert made == [(CHOSEN, pytest.approx(0.96))]


@pytest.mark.parametrize("verdict", ["refused", "undecided"])
def test_the_nearest_safer_stage_stands_in_and_both_errors_together_are_what_was_asked(verdict):
    (stage, proof, conflict), made = _run({"4 bits": verdict, "6 bits": "accepted"})
    assert stage is proof.of is SAFER
    assert "larger one" in conflict
    assert [x for x, _ in made] == [CHOSEN, SAFER]
    assert sum(1 - confidence for _, confidence in made) == pytest.approx(0.05)
    assert 0 < FIRST < 1


def test_nothing_is_called_proven_that_is_not():
    (stage, proof, conflict), _ = _run({"4 bits": "undecided", "6 bits": "refused"})
    assert stage is proof.of is CHOSEN
    assert "could not be proven" in conflict


@pytest.mark.parametrize("on_conflict", ["memory", "error"])
def test_the_whole_error_rate_is_the_chosen_stages_where_no_other_may_stand_in(on_conflict):
    _, made = _run({"4 bits": "accepted"}, on_conflict)
    assert made == [(CHOSEN, 0.95)]
    if on_conflict == "error":
        with pytest.raises(BudgetConflict, match="could not be proven"):
            _run({"4 bits": "refused"}, on_conflict)
    else:
        (stage, _, conflict), made = _run({"4 bits": "refused"}, on_conflict)
        assert (stage, len(made)) == (CHOSEN, 1)
        assert "could not be proven" in conflict


def test_without_a_safer_stage_the_chosen_one_has_the_whole_error_rate():
    _, made = _run({"4 bits": "refused"}, stages=(CHOSEN, BROKEN))
    assert made == [(CHOSEN, 0.95)]
