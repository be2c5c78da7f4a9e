"""The documentation: links lead somewhere, options are those of the command line."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "bitween").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    local = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_are_there(page):
    """Paths in backticks, as `docs/design.md` or `bitween/layers/packed.py`."""
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:bitween|benchmarks|csrc|docs|examples|tests)/[\w./-]+)`", text)
    made_up = ("bitween/_lib", "NAME")  # by the build; by whoever adds a file
    assert [n for n in named if not (ROOT / n).exists() and not any(part in n for part in made_up)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_rows_stand_in_tables(page):
    """Rows that no head stands above show as text."""
    tables = re.findall(r"(?:^\|.*\n)+", page.read_text() + "\n", re.MULTILINE)
    assert [table for table in tables if not re.match(r"\|.*\n\|(?:\s*:?-+:?\s*\|)+\n", table)] == []


def test_options_are_those_of_the_command_line():
    spec = importlib.util.spec_from_file_location("make_options", ROOT / "docs" / "make_options.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page()


def test_messages_are_those_of_the_code():
    """What docs/troubleshooting.md quotes stands in the sources, piece by piece between the dots."""
    sources = [*(ROOT / "bitween").rglob("*.py"), *(ROOT / "csrc").rglob("*.c")]
    code = "".join(path.read_text(encoding="utf-8") for path in sources)
    code = re.sub(r'["\'](\s+)f?["\']', "", code).replace("%s: ", "")  # strings that go on in the next line
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    assert len(quoted) > 10
    missing = [piece for q in quoted for piece in re.split(r"\s*\.\.\.,?;?\s*", q) if piece and piece not in code]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_no_placeholder_is_left(page):
    """A figure that was not measured is left out; a word in its place promises what nobody has seen."""
    found = re.findall(r"\b(?:SOAK|FUZZ|PLANTED|TODO|TBD|FIXME|XXX)\b", (ROOT / page).read_text(encoding="utf-8"))
    assert not found
