"""What an import says where an extra is missing."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("missing", "line", "extra"),
    [
        ("scipy", "from bitween.gradual import GradualQuantizer", "hf"),
        ("torch", "from bitween import Bitween", "hf"),
        ("transformers", "from bitween import load_model; load_model", "hf"),
    ],
)
def test_a_missing_extra_is_named(missing, line, extra):
    script = f"import sys\nsys.modules[{missing!r}] = None\n{line}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode
    assert f"pip install 'bitween[{extra}]'" in done.stderr.splitlines()[-1]
