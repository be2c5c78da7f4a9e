"""Row 24: environment variables, right and wrong, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import bitween

_PROBE = """
import numpy as np
import bitween
from bitween import Scheme
q = bitween.quantize(np.linspace(-1, 1, 600, dtype=np.float32).reshape(4, 150), Scheme(3, 16))
x = np.ones((2, 150), np.float32)
print(bitween.info()["isa"], bitween.get_num_threads(), q.codes.tobytes().hex())
q.matmul(x)
"""


def run(**variables):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("BITWEEN_", "OPENBLAS_", "OMP_"))}
    return subprocess.run([sys.executable, "-c", _PROBE], env={**env, **variables}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def plain():
    done = run()
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BITWEEN_ISA", "avx9"),
        ("BITWEEN_ISA", "AVX2"),
        ("BITWEEN_ISA", " "),
        ("BITWEEN_ISA", "neon" if "neon" not in bitween.info()["isas"] else "avx2"),
        ("BITWEEN_NUM_THREADS", "0"),
        ("BITWEEN_NUM_THREADS", "-1"),
        ("BITWEEN_NUM_THREADS", "1000000"),
        ("BITWEEN_NUM_THREADS", "9" * 5000),
        ("BITWEEN_NUM_THREADS", "two"),
        ("BITWEEN_NUM_THREADS", "2.0"),
        ("BITWEEN_NUM_THREADS", "²"),
    ],
)
def test_row_24_wrong_values_are_named(name, value):
    done = run(**{name: value})
    assert done.returncode == 1
    assert f"ValueError: {name}: expected " in done.stderr


def test_row_24_good_values(plain):
    assert run(BITWEEN_ISA="", BITWEEN_NUM_THREADS="").stdout.split() == plain
    for isa in bitween.info()["isas"]:
        assert run(BITWEEN_ISA=isa).stdout.split() == [isa, *plain[1:]]
    assert run(BITWEEN_NUM_THREADS=" 3 ").stdout.split() == [plain[0], "3", plain[2]]
    assert run(BITWEEN_NUM_THREADS="1024").stdout.split() == [plain[0], "1024", plain[2]]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OMP_NUM_THREADS", ""),
        ("OMP_NUM_THREADS", "many"),
        ("OPENBLAS_NUM_THREADS", "7"),
        ("OPENBLAS_CORETYPE", "Haswell"),
        ("OPENBLAS_CORETYPE", "no such core"),
        ("OPENBLAS_VERBOSE", "1"),
    ],
)
def test_row_24_variables_of_others(plain, name, value):
    done = run(**{name: value})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-3:] == plain
