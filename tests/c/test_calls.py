"""The core in a program of its own: hostile calls, guarded buffers, memory that runs out."""

import shutil
import subprocess

import pytest

from .build import ISAS, ROOT, build

pytestmark = pytest.mark.skipif(
    not shutil.which("gcc") or not list((ROOT / "bitween/_lib").glob("libscipy_openblas.*")),
    reason="needs gcc and the OpenBLAS that the build copies",
)


@pytest.fixture(scope="module")
def random_calls(tmp_path_factory):
    return build("random_calls", tmp_path_factory.mktemp("c") / "random_calls", flags=("-O2", "-g"))


@pytest.mark.parametrize("isa", ISAS)
def test_hostile_calls_break_no_promise(random_calls, isa):
    made = subprocess.run([random_calls, "20000", "1", isa, "2"], capture_output=True, text=True, timeout=300)
    if "this machine has no" in made.stderr:
        pytest.skip(made.stderr.strip())
    assert made.returncode == 0, made.stderr
    tally = {name: (int(calls), int(accepted)) for name, calls, accepted in map(str.split, made.stdout.splitlines())}
    assert len(tally) == 23
    assert sum(calls for calls, _ in tally.values()) == 20000
    for name, (calls, accepted) in tally.items():
        assert 0 < accepted < calls, f"{name}: a test needs calls that are taken and calls that are refused"


def test_every_allocation_of_the_core_may_fail(tmp_path):
    wrap = ("posix_memalign", "free")
    program = build("failing_memory", tmp_path / "failing_memory", flags=("-O2", "-g"), wrap=wrap)
    made = subprocess.run([program, "2000", "1"], capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stdout + made.stderr
    assert int(made.stdout.split()[0]) > 1000
