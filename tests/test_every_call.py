"""Row 32: whatever system call fails while something is saved, nothing half is left and nothing is lost."""

import shutil
import subprocess
import sys

import pytest

from tests.every_call import ROOT

# Names of `every_call.works()` with the fewest faults that each must meet.
LEAST = {
    "atomic_write": 20,
    "save_model": 100,
    "save_model, compressed-tensors": 100,
    "export_auto_round": 100,
    "export_gguf": 20,
}


@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("gcc"), reason="preloads a C library")
@pytest.mark.parametrize("work", LEAST)
def test_row_32_every_system_call_fails(memory_folder, work):
    command = [sys.executable, "-m", "tests.every_call", str(memory_folder / "work"), work]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = done.stdout.splitlines()
    name, met = line.split("\t")
    assert name == work
    assert int(met) >= LEAST[work]
