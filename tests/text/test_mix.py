"""Several domains of text: equal shares, each with its own splits, and errors before any work."""

import pytest
import torch

from bitween.gradual.proof.certificate import MIN_WINDOWS
from bitween.text import mix, shipped
from tests.text.test_calibration import Letters

WORDS = "the of and to in is that it was for on are with as his they be at one have this from".split()  # noqa: SIM905


def documents(count=40, seed=0, words=60):
    """Documents of random words, so that no two share a run of twelve letters by more than chance."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(WORDS), (count, words), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in row) for row in rows]


def prepared(data=None, domains=None, tokenizer=None, **options):
    tokenizer = tokenizer or Letters()
    options = {"length": 32, "calibration_windows": 13, "selection": 4, "certification": 40} | options
    return mix.prepare(tokenizer, mix.checked(data, domains, tokenizer), **options)


def test_shipped_domains_are_dealt_out_in_equal_shares_and_share_no_document():
    splits = prepared(certification=50)
    assert splits.domains == shipped.DOMAINS
    assert torch.bincount(splits.calibration.domain).tolist() == [3, 2, 2, 2, 2, 2]
    assert splits.calibration.domain[:7].tolist() == [0, 1, 2, 3, 4, 5, 0]  # in turn: any beginning is a mix
    assert torch.bincount(splits.certification.domain).tolist() == [9, 9, 8, 8, 8, 8]
    assert (splits.certification.domain.diff() >= 0).all()
    used = [set(getattr(splits, name).document.tolist()) for name in ("calibration", "selection", "certification")]
    assert len(set.union(*used)) == sum(map(len, used))
    assert splits.report["splits"]["certification"]["windows"] == 50
    assert set(splits.report["domains"]) == set(shipped.DOMAINS)


def test_own_domains_beside_a_shipped_one():
    splits = prepared({"mine": documents(seed=1), "code": None}, certification=16)
    assert splits.domains == ("mine", "code")
    text = ["".join(map(chr, row)) for row in splits.certification.ids[splits.certification.domain == 0]]
    assert all(any(window.strip() in document for document in documents(seed=1)) for window in text)
    assert "ships with bitween" in splits.report["source"]


def test_each_domain_gets_enough_windows_for_a_bound():
    splits = prepared(certification=6)
    assert torch.bincount(splits.certification.domain).tolist() == [mix.FEWEST_WINDOWS] * 6
    assert mix.FEWEST_WINDOWS == MIN_WINDOWS
    assert len(prepared(certification=6, bounded=False).certification) == 6


def test_row_19_a_domain_too_small_to_be_bounded_is_refused():
    small = documents(4, seed=2, words=20)
    with (
        pytest.warns(UserWarning, match="windows of"),
        pytest.raises(ValueError, match=r"'small': expected at least 8 .* about [\d,]+ tokens"),
    ):
        prepared({"small": small, "large": documents(seed=3)})


def test_row_22_a_text_in_two_domains_is_refused():
    same = documents(seed=4)
    with pytest.raises(ValueError, match=r"document .* of 'b' repeats most of document .* of 'a'"):
        prepared({"a": same, "b": [text + " and more" for text in same]})
    shipped_code = [" " + text for text in shipped.documents("code")]
    with pytest.raises(ValueError, match=r"'mine' repeats most of .* 'code'"):
        prepared({"code": None, "mine": shipped_code}, certification=120, calibration_windows=80)


def test_row_22_a_document_that_repeats_most_of_another_is_left_out():
    from bitween.text.calibration import prepare

    texts = documents(seed=5)
    again = [text[:-40] for text in texts]
    with pytest.warns(UserWarning, match="documents repeat most of another and are left out"):
        splits = prepare(Letters(), texts + again, length=32, calibration=200, selection=20, certification=200)
    calibration, certification = (
        set((windows.document % len(texts)).tolist()) for windows in (splits.calibration, splits.certification)
    )
    assert not calibration & certification


@pytest.mark.parametrize(
    ("data", "domains", "error", "message"),
    [
        (None, ["prose", "klingon"], ValueError, "expected some of prose, reference.*'klingon'"),
        (None, "klingon", ValueError, "'klingon'"),
        (None, [], ValueError, "at least one"),
        (None, 3, TypeError, "names of domains"),
        (None, {"prose": 5}, ValueError, "'prose': expected a relative increase between 0 and 1; got 5"),
        (None, {"prose": "5%"}, TypeError, "'prose': expected a relative increase"),
        (["a text"], ["prose"], ValueError, "calibration_data is one text"),
        ({"mine": None}, None, ValueError, "'mine': expected a text; got None"),
        ({"mine": object()}, None, TypeError, "domain 'mine': expected a path"),
        ({"mine": "/nowhere/text.txt"}, None, FileNotFoundError, "domain 'mine': .*/nowhere"),
        ({"mine": ["x"]}, ["other"], ValueError, "expected some of mine; got 'other'"),
    ],
)
def test_row_23_bad_domains(data, domains, error, message):
    with pytest.raises(error, match=message):
        mix.checked(data, domains, Letters())


def test_budgets_of_domains():
    found = mix.checked(None, {"code": 0.02, "prose": None}, Letters())
    assert list(found.sources) == ["code", "prose"]
    assert found.budgets == {"code": 0.02}


class Templated(Letters):
    """A tokenizer with a chat template that is a function of the messages."""

    chat_template = "{{ messages }}"

    def __init__(self, write):
        super().__init__()
        self.write = write

    def apply_chat_template(self, messages, tokenize):
        return self.write(messages)


def test_dialogue_is_written_by_the_chat_template():
    tokenizer = Templated(lambda messages: "".join(f"<{m['role']}>{m['content']}" for m in messages))
    assert shipped.documents("dialogue", tokenizer)[0].startswith("<user>")
    assert shipped.documents("dialogue")[0].startswith("User: ")


def test_a_chat_template_that_fails_is_told_before_any_work():
    def refuse(messages):
        raise RuntimeError("only one turn, please")

    with pytest.raises(ValueError, match=r"refused a conversation of the domain 'dialogue'.*only one turn"):
        mix.checked(None, None, Templated(refuse))
    assert "dialogue" not in mix.checked(None, ["prose", "code"], Templated(refuse)).sources
    with pytest.raises(ValueError, match="wrote nothing"):
        mix.checked(None, None, Templated(lambda messages: " "))
