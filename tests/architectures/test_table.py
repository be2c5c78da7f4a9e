"""The page of architectures: renewed in parts, nothing lost, nothing invented."""

import json

import pytest

pytest.importorskip("transformers")

import transformers

from tests.architectures.table import write

GOOD = {
    "build": "AForCausalLM",
    "rtn": "99.5% packed, gap 1e-06",
    "generate": "gap 1e-06",
    "save": "gap 0e+00",
    "gptq": "99.5% packed, gap 1e-06",
    "gradual": "-50%",
    "date": "2026-01-02",
}


@pytest.fixture
def written(tmp_path):
    """Writes results of a version, replacing what it had, and gives the page."""

    def write_results(found, version=transformers.__version__):
        folder = tmp_path / "results" / version
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            file.unlink()
        for name, result in found.items():
            (folder / f"{name}.json").write_text(json.dumps(result))
        write(tmp_path / "results", tmp_path / "page.md")
        return (tmp_path / "page.md").read_text()

    return write_results


def test_rows_reasons_and_failures_are_those_of_the_results(written):
    page = written(
        {
            "a": GOOD,
            "b": {**GOOD, "save": "WRONG | other logits", "generate": "none, the original raises KeyError"},
            "c": {"build": "none ValueError: no <such> size"},
            "d": {key: GOOD[key] for key in ("build", "rtn", "date")},
            "e": {"build": "ERROR no end within 900 s"},
        }
    )
    assert "| a | AForCausalLM | 99.5% | ✓ | ✓ | ✓ | ✓ | 2026-01-02 |" in page
    assert "| b | AForCausalLM | 99.5% | ✓ | – | ✗ | ✓ | 2026-01-02 |" in page
    assert "| d | AForCausalLM | 99.5% | · | · | · | · | 2026-01-02 |" in page
    assert "- b, save: WRONG / other logits" in page
    assert "- e, build: ERROR no end within 900 s" in page
    assert "- c: ValueError: no &lt;such> size" in page
    assert "built and ran 3 at this size; 2 of these pass every check that was run, 1 all five of them" in page
    assert "| e |" not in page


def test_types_without_a_result_keep_what_the_page_says_of_them(written):
    bad = {**GOOD, "gptq": "ERROR ValueError: no"}
    first = written({"a": GOOD, "b": bad, "c": {"build": "none ValueError: size"}})
    assert written({"a": GOOD, "b": bad, "c": {"build": "none ValueError: size"}}) == first
    page = written({"a": {**GOOD, "date": "2026-02-03"}})
    assert page == first.replace("✓ | 2026-01-02 |\n| b", "✓ | 2026-02-03 |\n| b")
    page = written({"b": GOOD, "c": GOOD})
    assert "What fails" not in page
    assert "Not built" not in page
    assert page.count("| AForCausalLM |") == 3


def test_other_versions_have_parts_of_their_own(written):
    written({"a": GOOD})
    part = {key: GOOD[key] for key in ("build", "rtn", "save")}
    bad = {**GOOD, "save": "WRONG logits"}
    page = written({"a": GOOD, "b": bad, "c": {"build": "none no"}, "d": part}, "5.0.0")
    part = page.partition("## With transformers 5.0.0")[2]
    assert (
        "4 types were run with this version, 3 of them built. 1 pass all five checks: `a`. 1 pass packed, save: `d`."
        in part
    )
    assert "- b, save: WRONG logits" in part
    assert "- c: no" in part
    assert written({}, "5.0.0") == page  # kept without results
    assert page.count("| AForCausalLM |") == 1
