"""The memory that is told before a run is about what the run takes, for models of several shapes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.memory import make_llama

ROOT = Path(__file__).parents[3]
FAST = ["calibration_samples=2", "evaluation_samples=2", "sequence_length=128", "stages=1", "importance=false"]
FAST += ['method="rtn"', "max_perplexity_increase=0.99", "distillation_steps=0"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="high-water marks are read from /proc")
@pytest.mark.parametrize("sizes", [(1, 128, 256, 32768), (2, 256, 512, 16384), (2, 512, 1024, 4096)])
def test_what_is_told_is_within_a_tenth_of_what_is_taken(sizes, tmp_path):
    make_llama(tmp_path, ROOT / "tests" / "tiny" / "model", *sizes)
    command = [sys.executable, ROOT / "benchmarks" / "memory.py", tmp_path, "--child", "--set", *FAST]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    of_the_run = [peak for stage, peak in result["peak"].items() if stage not in ("imports", "load", "inspect", "end")]
    assert max(of_the_run) == pytest.approx(result["predicted"], rel=0.1), result["peak"]
