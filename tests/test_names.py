"""What a user can name: every function of the extension as its stub says, every public name one thing."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import bitween
from bitween import _core


def test_stub_matches_the_extension():
    tree = ast.parse((Path(bitween.__file__).parent / "_core.pyi").read_text())
    stubs = {f.name: [a.arg for a in f.args.args] for f in tree.body if isinstance(f, ast.FunctionDef)}
    verbs = {name: f for name, f in vars(_core).items() if inspect.isbuiltin(f)}
    assert set(stubs) == set(verbs)
    for name, verb in verbs.items():
        assert stubs[name] == list(inspect.signature(verb).parameters), name


def test_no_public_name_is_also_a_module():
    """Importing the module would put it in the place of the function, depending on who imported what first."""
    modules = {path.stem for path in Path(bitween.__file__).parent.iterdir()}
    assert not modules & set(bitween.__all__)


def test_every_fault_in_the_docs_has_a_test_and_the_reverse():
    """docs/faults.md numbers them; test names hold the numbers: row_07, rows_31_32."""
    root = Path(__file__).parent.parent
    page = root / "docs" / "faults.md"
    told = re.findall(r"^\| (\d\d) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    names = [
        name for path in (root / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    ]
    tested = {
        row for name in names for match in re.findall(r"rows?((?:_\d\d)+)_", name) for row in match[1:].split("_")
    }
    assert told == sorted(told)
    assert set(told) == tested
