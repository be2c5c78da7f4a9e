"""The journal: what was put comes back, whatever happened in between."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from bitween.gradual.journal.journal import (
    Journal,
    JournalError,
    JournalMismatch,
    NullJournal,
    identity_of,
    strict_json,
)
from tests import faults

IDENTITY = {"model": {"sha256": "ab"}, "text": "cd", "options": {"bits": [4, 2.5], "seed": 0}, "machine": {"isa": "x"}}
N_STEPS = 4


def run(directory, identity=IDENTITY, resume=True):
    """A small deterministic run: each step depends on what the one before left in the journal."""
    with Journal.open(directory, identity, resume) as journal:
        value = 1.0
        for i in range(N_STEPS):
            record = journal.get(f"step {i}")
            if record is None:
                value = value * 1.1 + i
                arrays = {"w": np.full((i, 3), value, np.float32), "n": np.arange(4)} if i % 2 else None
                record = journal.put(f"step {i}", {"value": value, "pair": (i, "x")}, arrays)
            value = record["value"]
            if i % 2:
                np.testing.assert_array_equal(journal.arrays(f"step {i}")["w"], np.full((i, 3), value, np.float32))
        return len(journal.steps)


def end_state(directory):
    files = faults.tree_bytes(directory)
    files.pop("lock")
    return files


@pytest.fixture
def folder(memory_folder):
    return memory_folder / "journal"


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "journal"
    run(folder)
    return end_state(folder)


def test_what_was_put_comes_back(tmp_path):
    arrays = {
        "f": np.arange(6, dtype=np.float32)[::-2],
        "empty": np.empty((0, 3), np.float16),
        "scalar": np.array(7, np.int64),
        "big_endian": np.arange(3, dtype=">i4"),
    }
    record = {"a": (1, 2.5, None, True), "b": {"c": np.float32(0.5), "d": np.int64(3)}, "é": "\n"}
    with Journal.open(tmp_path, IDENTITY) as journal:
        returned = journal.put("k", record, arrays)
        assert returned == {"a": [1, 2.5, None, True], "b": {"c": 0.5, "d": 3}, "é": "\n"}
        returned["a"].append("mine")  # the journal keeps its own
    with Journal.open(tmp_path, IDENTITY) as journal:
        assert journal.get("k") == {"a": [1, 2.5, None, True], "b": {"c": 0.5, "d": 3}, "é": "\n"}
        assert [step.key for step in journal.steps] == ["k"]
        found = journal.arrays("k")
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].shape == array.shape
            assert found[name].flags.writeable
        assert journal.get("other") is None
        assert journal.arrays("other") is None


def test_same_run_gives_same_bytes(tmp_path, expected):
    run(tmp_path)
    assert end_state(tmp_path) == expected
    run(tmp_path)
    assert end_state(tmp_path) == expected


def test_null_journal_keeps_no_results():
    with NullJournal() as journal:
        assert journal.put("k", {"a": (1,)}, {"w": np.zeros(1)}) == {"a": [1]}
        assert journal.get("k") is None
        assert journal.arrays("k") is None
        assert [step.key for step in journal.steps] == ["k"]


@pytest.mark.parametrize(
    ("record", "error", "match"),
    [
        ({"a": float("nan")}, ValueError, r"record\.a: expected a finite"),
        ({"a": [1, {"b": -np.inf}]}, ValueError, r"record\.a\[1\]\.b: expected a finite"),
        ({"a": 2**64}, ValueError, "64 bits; got one of 65"),
        ({1: "a"}, TypeError, "keys that are strings; got 1"),
        ({"a": {2.5}}, TypeError, "got set"),
        ([1], TypeError, "record: expected a dict"),
    ],
)
def test_values_that_json_would_bend_are_refused(tmp_path, record, error, match):
    for journal in (Journal.open(tmp_path, IDENTITY), NullJournal()):
        with journal, pytest.raises(error, match=match):
            journal.put("k", record)
    assert (tmp_path / "steps.jsonl").read_bytes() == b""


@pytest.mark.parametrize("array", [[1.0], np.array(["text"]), np.array([None]), np.zeros(1, complex)])
def test_arrays_that_are_not_numbers_are_refused(tmp_path, array):
    with Journal.open(tmp_path, IDENTITY) as journal, pytest.raises(TypeError, match="arrays\\['w'\\]"):
        journal.put("k", {}, {"w": array})


def test_a_key_is_kept_once(tmp_path):
    with Journal.open(tmp_path, IDENTITY) as journal:
        journal.put("k", {"a": 1}, {"w": np.ones(2)})
        journal.put("k", {"a": 1}, {"w": np.ones(2)})
        with pytest.raises(ValueError, match="'k' was kept before"):
            journal.put("k", {"a": 2}, {"w": np.ones(2)})
        with pytest.raises(ValueError, match="'k' was kept before"):
            journal.put("k", {"a": 1}, {"w": np.zeros(2)})
        assert len(journal.steps) == 1
    with pytest.raises(JournalError, match="closed"):
        journal.put("other", {})


def test_row_31_other_inputs_are_refused_with_the_difference(tmp_path):
    run(tmp_path)
    other = {**IDENTITY, "options": {"bits": [4, 2], "steps": 3}, "text": "changed"}
    with pytest.raises(JournalMismatch) as caught:
        Journal.open(tmp_path, other)
    assert caught.value.differences == [
        "options.bits[1]: recorded 2.5; now 2",
        "options.seed: recorded 0; now missing",
        "options.steps: not recorded; now 3",
        "text: recorded 'cd'; now 'changed'",
    ]
    assert all(line in str(caught.value) for line in caught.value.differences)
    assert isinstance(caught.value, ValueError)
    assert run(tmp_path) == N_STEPS  # untouched


def test_another_machine_only_warns(tmp_path):
    run(tmp_path)
    with pytest.warns(UserWarning, match=r"machine\.isa: recorded 'x'; now 'y'") as caught:
        Journal.open(tmp_path, {**IDENTITY, "machine": {"isa": "y"}}).close()
    assert caught[0].filename == __file__


def test_start_over_replaces_the_run(tmp_path, expected):
    run(tmp_path, {**IDENTITY, "text": "other"})
    with Journal.open(tmp_path, IDENTITY, resume=False) as journal:
        assert journal.steps == []
        assert os.listdir(tmp_path / "arrays") == []
    run(tmp_path)
    assert end_state(tmp_path) == expected


def test_a_directory_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(JournalError, match=r"thesis\.tex"):
        Journal.open(tmp_path, IDENTITY)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_row_31_second_process_is_refused(tmp_path):
    def second():
        with pytest.raises(JournalError, match=f"process {os.getppid()} works on this run"):
            Journal.open(tmp_path, IDENTITY)

    with Journal.open(tmp_path, IDENTITY):
        assert faults.in_child(second) == 0
    Journal.open(tmp_path, IDENTITY).close()


def test_torn_last_line_is_forgotten(tmp_path, expected):
    run(tmp_path)
    whole = (tmp_path / "steps.jsonl").read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in [last + 1, last + 40, len(whole) - 1]:
        (tmp_path / "steps.jsonl").write_bytes(whole[:cut])
        with Journal.open(tmp_path, IDENTITY) as journal:
            assert len(journal.steps) == N_STEPS - 1
        assert (tmp_path / "steps.jsonl").read_bytes() == whole[:last]
        run(tmp_path)
        assert end_state(tmp_path) == expected
    (tmp_path / "steps.jsonl").write_bytes(whole[:last] + bytes(len(whole) - last))
    run(tmp_path)
    assert end_state(tmp_path) == expected


@pytest.mark.parametrize("name", ["run.json", "steps.jsonl", "arrays"])
def test_row_27_any_flipped_byte_is_noticed(tmp_path, name, expected):
    run(tmp_path)
    path = next((tmp_path / "arrays").iterdir()) if name == "arrays" else tmp_path / name
    whole = path.read_bytes()
    end = whole.rstrip(b"\n").rfind(b"\n") + 1 if name == "steps.jsonl" else len(whole)  # the last line may be torn
    for at in random.Random(1).sample(range(end), min(end, 60)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(JournalError, match=rf"{path.name}.*(damaged|missing|other inputs)"):
            run(tmp_path)
    path.write_bytes(whole)
    run(tmp_path)
    assert end_state(tmp_path) == expected


def test_missing_array_file_is_reported(tmp_path):
    run(tmp_path)
    next((tmp_path / "arrays").iterdir()).unlink()
    with pytest.raises(JournalError, match="missing, though step"):
        run(tmp_path)


@pytest.mark.parametrize(
    "text", ['{"a":NaN}', '{"a":-Infinity}', '{"a":1,"a":2}', '{"a":' + "9" * 5000 + "}", "[" * 100_000, "{", "\xff"]
)
def test_row_29_strict_json_refuses(text):
    with pytest.raises(ValueError):  # noqa: PT011 (json's own sentence differs between versions)
        strict_json.loads(text.encode("latin-1"))


def test_row_31_killed_at_every_call(folder, expected):
    """SIGKILL before each call that changes the disk, in the first run and in the resume, then compare all bytes."""

    def attempt(n):
        shutil.rmtree(folder, ignore_errors=True)

        def work():
            with faults.every_call(faults.kill_at(n)):
                run(folder)

        first = faults.in_child(work)
        second = faults.in_child(work)  # killed again while it resumes, unless little was left
        assert {first, second} <= {0, -9}
        run(folder)
        assert end_state(folder) == expected
        return n if first else 0

    assert faults.until_none_is_hit(attempt) > 30


def test_row_31_killed_at_random_moments(folder, expected):
    moments, killed = random.Random(0), 0
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        killed += faults.in_child(lambda: run(folder), kill_after=moments.uniform(0, 0.01)) == -9
        run(folder)
        assert end_state(folder) == expected
    assert killed > 5


def every_call_fails(folder, expected, number, for_good):
    def attempt(n):
        shutil.rmtree(folder, ignore_errors=True)
        with faults.every_call(faults.fail_at(n, number, for_good)) as counted:
            error = caught(run, folder)
            n_calls = counted[0]
        if error:
            assert error.errno == number
        assert not (for_good and n_calls >= n) or error
        run(folder)
        assert end_state(folder) == expected
        return n_calls

    assert faults.until_none_is_hit(attempt) > 30


def caught(work, *args):
    """The OSError that the work ends with, or None."""
    try:
        work(*args)
    except OSError as error:
        return error


@pytest.mark.parametrize(("number", "for_good"), [(errno.ENOSPC, True), (errno.EIO, False)])
def test_row_32_every_call_fails(folder, expected, number, for_good):
    """The n-th call that changes the disk fails: an OSError with that number, and the run still resumes."""
    every_call_fails(folder, expected, number, for_good)


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
def test_row_32_every_call_fails_on_disk(tmp_path, expected, number, for_good):
    every_call_fails(tmp_path / "journal", expected, number, for_good)


def test_row_32_put_may_be_tried_again(folder):
    with Journal.open(folder, IDENTITY) as journal:

        def attempt(n):
            step = (f"step {n}", {"x": n}, {"w": np.ones(n)})
            with faults.every_call(faults.fail_at(n)) as counted:
                error = caught(journal.put, *step)
                n_calls = counted[0]
            if error:
                assert str(folder) in str(error)
                assert "bytes" in str(error)
                assert journal.get(step[0]) is None
                journal.put(*step)
            return n_calls

        n_hit = faults.until_none_is_hit(attempt)
    with Journal.open(folder, IDENTITY) as journal:
        assert [step.key for step in journal.steps] == [f"step {n}" for n in range(1, n_hit + 2)]
        np.testing.assert_array_equal(journal.arrays(f"step {n_hit}")["w"], np.ones(n_hit))


_FILL = """
import sys
import numpy as np
from bitween.gradual.journal.journal import Journal
with Journal.open(sys.argv[1], {"a": 1}) as journal:
    for i in range(100):
        if journal.get(str(i)) is None:
            journal.put(str(i), {"i": i}, {"w": np.full(20_000, i)})
"""


def test_row_32_full_disk(tmp_path):
    """A real file system of 1 MB, filled up and then emptied."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        (disk / "ballast").write_bytes(bytes(300_000))
        command = [sys.executable, "-c", _FILL, str(disk / "journal")]
        full = subprocess.run(command, capture_output=True, text=True)
        assert full.returncode == 1
        assert "No space left on device: " in full.stderr
        assert "bytes written, " in full.stderr
        assert str(disk / "journal/arrays") in full.stderr
        before = end_state(disk / "journal")
        assert len(before["steps.jsonl"].splitlines()) == len(before) - 2 > 1
        (disk / "ballast").unlink()
        assert subprocess.run(command, capture_output=True).returncode == 1  # full again, a little later
        after = end_state(disk / "journal")
        assert after["steps.jsonl"].startswith(before["steps.jsonl"])
        assert len(after) > len(before)
    finally:
        subprocess.run(["umount", disk], check=True)


_UNDER_STRACE = """
import itertools, os, sys
from pathlib import Path
from tests import faults
from tests.gradual.journal.test_journal import run
place, call, when = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
null = os.open(os.devnull, os.O_WRONLY)
idle = {"fsync": lambda: os.fsync(null), "write": lambda: os.write(null, b"x"),
        "rename": lambda: os.rename("/nowhere/a", "/nowhere/b")}[call]
def work(n):
    for _ in range(when - n):  # strace counts calls in each process; so the n-th call of the run is hit
        try:
            idle()
        except OSError:
            pass
    run(place / str(n))
for n in itertools.count(1):
    (place / str(n)).mkdir()
    status = faults.in_child(lambda: work(n))
    if faults.in_child(lambda: run(place / str(n))):
        sys.exit(f"no resume after {call} {n}")
    if status == 0:
        print(n - 1)
        break
"""


@pytest.mark.slow
@pytest.mark.parametrize(("call", "least"), [("fsync", 12), ("rename", 3), ("write", 6)])
@pytest.mark.parametrize("fault", ["error=EIO", "error=ENOSPC", "signal=SIGKILL"])
def test_rows_31_32_faults_from_the_kernel(tmp_path, expected, call, least, fault):
    """The same from outside: the n-th system call fails or kills, for every n that the run reaches."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    when = 100  # beyond what the interpreter itself calls
    inject = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"inject={call}:{fault}:when={when}"]
    command = [*inject, sys.executable, "-B", "-c", _UNDER_STRACE, str(tmp_path), call, str(when)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "Operation not permitted" in done.stderr:
        pytest.skip("tracing is not permitted here")
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= least
    for folder in tmp_path.iterdir():
        assert end_state(folder) == expected


def test_identity_tells_apart_what_matters():
    model = torch.nn.Linear(3, 2)
    windows = {"ids": torch.arange(12).reshape(3, 4)}

    def identity(**options):
        return {key: value for key, value in identity_of(model, windows, options).items() if key != "machine"}

    base = identity(bits=4)
    assert identity(bits=4) == base
    assert strict_json.loads(strict_json.dumps(base)) == base
    assert identity(bits=4.0)["options"] != identity(bits=True)["options"]
    with torch.no_grad():
        model.weight.view(torch.int32)[1, 2] ^= 1  # the last bit of one weight
    assert identity(bits=4)["model"] != base["model"]
    windows["ids"] = windows["ids"].T
    assert identity(bits=4)["text"] != base["text"]
    with pytest.raises(TypeError, match=r"options\.callback: expected"):
        identity(callback=print)
    with pytest.raises(ValueError, match="expected a tensor with memory"):
        identity_of(torch.nn.Linear(3, 2, device="meta"), windows, {})


_IDENTITY = """
import numpy
from bitween.gradual.journal.journal import identity_of
class Model:
    def named_parameters(self, remove_duplicate): return [("b", numpy.ones(5)), ("a", numpy.arange(3))]
    def named_buffers(self): return []
print(identity_of(Model(), [numpy.ones(3)], {"b": {3, 1, "2"}, "a": {"y": 1, "x": 2}}))
"""


def test_row_43_identity_does_not_depend_on_the_hash_seed():
    said = {
        subprocess.check_output([sys.executable, "-c", _IDENTITY], env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in ("0", "1")
    }
    assert len(said) == 1
