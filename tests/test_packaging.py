"""What stands in pyproject.toml for others to run."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_what_every_wheel_must_pass_passes_here():
    command = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]["test-command"]
    assert command.startswith('python -c "')
    code = command.removeprefix('python -c "').removesuffix('"')
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "isa" in done.stdout
