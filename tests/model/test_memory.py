"""What the process holds."""

import os
import subprocess
import sys

import pytest

from bitween.model.memory import resident_bytes

_CUT_UP = """
import numpy as np
from bitween.model.memory import resident_bytes, return_freed_memory
many = [np.ones(1 << 17) for _ in range(300)]  # 1 MiB each
kept = many[-1]
del many
before = resident_bytes()
return_freed_memory()
print(before - resident_bytes())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or resident_bytes() is None, reason="glibc's allocator")
def test_freed_memory_goes_back_to_the_system():
    heap = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    done = subprocess.run([sys.executable, "-c", _CUT_UP], env=heap, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 250 << 20
