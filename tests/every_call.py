"""Saves and exports while the n-th system call fails, or kills, for every n.

    python -m tests.every_call FOLDER [WORK...]

Each attempt is a forked child. It must leave the old state or the new one and no temporary, and say so by an OSError
unless it reached the new one; what a killed child leaves beside, the next attempt removes. Prints a line a piece of
work: its name and how many faults it met. "quantize" is a whole run with its journal: it takes minutes, so it only runs
by name, and is only killed, at every fsync and rename.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitween
from bitween.export.auto_round import export_auto_round
from bitween.export.gguf import export_gguf
from bitween.gradual import GradualQuantizer
from bitween.store.files import atomic_write
from tests import faults, quantized_models

ROOT = Path(__file__).parents[1]
KINDS = ("open", "write", "fsync", "rename", "close", "mkdir")
KILL = -1
FAULTS = ((errno.EIO, False), (errno.ENOSPC, True), (KILL, False))  # what happens, and whether from then on too
LONG = "quantize"
DONE, REFUSED, BROKEN = 0, 3, 4  # exit statuses of a child

Work = Callable[[Path], object]


def works() -> dict[str, Work]:
    """Everything that writes what a user keeps, each to the path that it is given."""
    source = ROOT / "tests/tiny/model"
    words = AutoTokenizer.from_pretrained(source)

    def tiny(schemes: list[bitween.Scheme]) -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        return quantized_models.quantize(model, schemes)

    four_bits = [bitween.Scheme(4, 32, True)]
    alike, mixed = tiny(four_bits), tiny(quantized_models.MIXED)
    by_32 = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    even = quantized_models.llama(four_bits, config=by_32)
    return {
        "atomic_write": lambda path: atomic_write(path, bytes(3000)),
        "save_model": lambda path: bitween.save_model(mixed, words, path),
        "save_model, compressed-tensors": lambda path: bitween.save_model(alike, words, path),
        "export_auto_round": lambda path: export_auto_round(even, words, path),
        "export_gguf": lambda path: export_gguf(alike, words, path),
        LONG: lambda path: quantize(AutoModelForCausalLM.from_pretrained(source), words, path),
    }


def quantize(model: torch.nn.Module, words: object, path: Path) -> None:
    """As the command line does it, with little text."""
    journal = path.parent / "journal"
    few = {"calibration_samples": 8, "evaluation_samples": 20, "sequence_length": 32, "stages": 1, "importance": False}
    done = GradualQuantizer(model, words, 0.72, 0.5, journal=journal, **few).quantize()
    bitween.save_model(done, words, path)
    shutil.rmtree(journal)


def state(path: Path) -> dict[str, bytes] | bytes | None:
    """All that stands under a name."""
    return faults.tree_bytes(path) if path.is_dir() else path.read_bytes() if path.exists() else None


def attempt(work: Work, path: Path, *fault) -> tuple[int, int]:
    """Run the work in a child with a fault armed; its status (negative: killed) and how many calls it made."""
    library = ctypes.CDLL(None)
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        status = BROKEN
        try:
            if fault:
                kind, n, number, for_good = fault
                library.fault_arm(os.fsencode(path.parent), kind.encode(), ctypes.c_long(n), number, for_good)
            work(path)
            status = DONE
        except OSError:
            status = REFUSED
        except BaseException:
            traceback.print_exc()
        finally:
            library.fault_seen.restype = ctypes.c_long
            os.write(into, str(library.fault_seen()).encode())
            os._exit(status)
    os.close(into)
    with os.fdopen(out) as pipe:
        seen = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(seen or 0)


def fail_everywhere(name: str, work: Work, folder: Path) -> int:
    """All faults in turn; how many were met. AssertionError names the first that broke the promise."""
    path, met = folder / "out", 0

    def begin() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    begin()
    assert attempt(work, path)[0] == DONE, name
    new = state(path)
    kills = [(kind, (KILL, False)) for kind in ("fsync", "rename")]
    for kind, (number, for_good) in kills if name == LONG else itertools.product(KINDS, FAULTS):
        for n in itertools.count(1):
            begin()
            status, seen = attempt(work, path, kind, n, number, for_good)
            case = f"{name}: {kind} {n}, {'SIGKILL' if number == KILL else os.strerror(number)}, status {status}"
            killed = status == -signal.SIGKILL
            assert killed or status in (DONE, REFUSED), case
            assert state(path) in ((new,) if status == DONE else (None, new)), case
            left = set(os.listdir(folder)) - {"out", "journal"}
            assert killed or not left, (case, left)
            if state(path) is None:
                assert attempt(work, path)[0] == DONE, case
                assert state(path) == new, case
                assert os.listdir(folder) == ["out"], case
            if not killed and seen < n:
                break
            met += 1
    return met


def preloaded(folder: Path) -> dict[str, str]:
    """The environment in which this module's children meet their faults; builds failing_calls.so."""
    library = folder / "failing_calls.so"
    source = ROOT / "tests/c/failing_calls.c"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return {**os.environ, "LD_PRELOAD": str(library)}


def main() -> None:
    folder, chosen = Path(sys.argv[1]).resolve(), sys.argv[2:]
    if not hasattr(ctypes.CDLL(None), "fault_arm"):
        with tempfile.TemporaryDirectory() as place:
            command = [sys.executable, "-m", "tests.every_call", *sys.argv[1:]]
            sys.exit(subprocess.run(command, env=preloaded(Path(place)), check=False).returncode)
    torch.set_num_threads(1)  # so that nothing is lost in the fork
    for name, work in works().items():
        if name in chosen or (not chosen and name != LONG):
            print(f"{name}\t{fail_everywhere(name, work, folder)}", flush=True)


if __name__ == "__main__":
    main()
