"""PyTorch's own threads do the work where they can be borrowed: no second pool, same bytes, safe after fork."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
import numpy as np, torch
from bitween import Scheme, _core
import bitween

def threads():
    return len(os.listdir("/proc/self/task"))

def work():
    return bitween.quantize(weight, Scheme(4, 64)).codes.tobytes()

torch.set_num_threads(3)
weight = np.random.default_rng(0).standard_normal((3000, 640)).astype(np.float32)
torch.ones(2_000_000).add_(1)
before = threads()
if not _core.borrow_threads():
    print("none"), sys.exit()
_core.set_num_threads(3)
first = work()
assert threads() == before, (before, threads())
_core.set_num_threads(1)
assert work() == first
_core.set_num_threads(3)
child = os.fork()
if not child:
    same = work() == first and not _core.borrow_threads()
    os._exit(0 if same else 3)
assert os.waitpid(child, 0)[1] == 0
assert work() == first
print("borrowed")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_row_36_borrowed_threads_add_none_and_stay_out_of_forked_children():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() == "none":
        pytest.skip("PyTorch brings no GNU OpenMP here")
    assert done.stdout.strip() == "borrowed"
