"""bitween/_core.pyi names every function of the extension, with its arguments in order."""

from __future__ import annotations

import ast
import inspect
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
