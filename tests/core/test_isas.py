"""Bytes do not depend on the instruction set, and unknown sets are refused."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import bitween
from bitween import Scheme, _core
from bitween.scheme import BITS

ISAS = bitween.info()["isas"]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_row_44_rtn_bytes_are_equal(bits, symmetric):
    w = (np.random.default_rng(1).standard_normal((40, 333)) * 0.1).astype(np.float32)
    found = {}
    for isa in ISAS:
        _core.set_isa(isa)
        q = bitween.quantize(w, Scheme(bits, 64, symmetric))
        found[isa] = (q.codes.tobytes(), q.scales.tobytes(), q.dequantize().tobytes())
    _core.set_isa(None)
    assert len(set(found.values())) == 1, [k for k in found if found[k] != found["scalar"]]


def test_unknown_isa_is_refused_at_import():
    env = {**os.environ, "BITWEEN_ISA": "avx9"}
    run = subprocess.run([sys.executable, "-c", "import bitween"], env=env, capture_output=True, text=True)
    assert run.returncode != 0
    assert "BITWEEN_ISA: expected one of" in run.stderr


def test_row_44_forced_isa_is_used():
    code = "import bitween; print(bitween.info()['isa'])"
    for isa in ISAS:
        env = {**os.environ, "BITWEEN_ISA": isa}
        assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == isa
