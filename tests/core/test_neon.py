"""The NEON set gives the scalar set's bytes: natively on AArch64 by the other tests, here under an emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64-static")


@pytest.mark.skipif(not COMPILER, reason="needs aarch64-linux-gnu-gcc")
@pytest.mark.skipif(not EMULATOR, reason="needs qemu-aarch64-static")
def test_neon_equals_scalar(tmp_path):
    core = ROOT / "csrc/core"
    sources = [core / "isa/neon.c", core / "isa/scalar.c", core / "scheme.c", ROOT / "tests/core/compare_isas.c"]
    program = tmp_path / "compare"
    flags = ["-std=c11", "-O2", "-static", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror"]
    isas = "-DBW_ISA_LIST=X(scalar) X(neon)"
    subprocess.run([COMPILER, *flags, isas, *map(str, sources), "-o", str(program), "-lm"], check=True)
    run = subprocess.run([EMULATOR, str(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "agree in 3210 comparisons" in run.stdout
