"""Row 32: whatever system call fails while something is saved, nothing half is left and nothing is lost."""

import shutil
import subprocess
import sys

import pytest

from tests.every_call import ROOT


@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("gcc"), reason="preloads a C library")
def test_row_32_every_system_call_fails(memory_folder):
    command = [sys.executable, "-m", "tests.every_call", str(memory_folder / "work")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    met = dict(line.split("\t") for line in done.stdout.splitlines())
    assert len(met) == 5
    for name, count in met.items():
        assert int(count) >= (100 if name.startswith(("save", "export_auto")) else 20), (name, count)
