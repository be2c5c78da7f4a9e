"""Arrows between the rooms of the package point one way: what pyproject.toml lists, import-linter holds."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def lint(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_no_import_points_up():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "2 kept, 0 broken" in done.stdout


def test_an_import_that_points_up_is_found(tmp_path):
    """The check itself: a copy of the package in which a low room imports from a high one is refused."""
    package = tmp_path / "bitween"
    for path in (ROOT / "bitween").rglob("*.py"):
        copy = package / path.relative_to(ROOT / "bitween")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"), encoding="utf-8")
    with (package / "rounding/gptq.py").open("a", encoding="utf-8") as file:
        file.write("\nfrom bitween.gradual import evaluator  # noqa\n")
    done = lint(tmp_path)
    assert done.returncode == 1, done.stdout[-3000:]
    assert "bitween.rounding is not allowed to import bitween.gradual" in done.stdout
