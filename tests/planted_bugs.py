"""Bugs that are planted one by one in a copy of the project: the tests must catch every one.

    python -m tests.planted_bugs [NUMBER...]

Prints a line a bug, and fails when one lived through the tests that stand beside it (a part of the suite). What was
seen goes to planted_bugs.json, each bug with its day, so that a few can be run at a time.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
SEEN = Path(__file__).with_suffix(".json")
COPIED = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "bitween", "tests")


@dataclass(frozen=True)
class Bug:
    """`old`, which stands in `file` exactly once, becomes `new`; one of `tests` must fail then."""

    what: str
    file: str
    old: str
    new: str
    tests: str


BUGS = (
    Bug(
        "the tail of a row is read from its end on",
        "csrc/core/kernels/rtn.h",
        "memcpy(tail, p, (size_t)(n - i) * 4);\n            p = tail;",
        "p = w + n - (n - i);",
        "tests/core/test_rtn.py tests/core/test_isas.py",
    ),
    Bug(
        "zeros are one too high",
        "csrc/core/kernels/rtn.h",
        "zero = bw_min(zero, bw_set((float)(scheme->levels - 1)));",
        "zero = bw_min(bw_add(zero, bw_set(1)), bw_set((float)(scheme->levels - 1)));",
        "tests/core/test_rtn.py",
    ),
    Bug(
        "scales are rounded down to fp16",
        "csrc/core/kernels/rtn.h",
        "return bw_select_less(near, step, bw_load_f16(half), near);",
        "return near;",
        "tests/core/test_rtn.py",
    ),
    Bug(
        "steps are not limited from below",
        "csrc/core/kernels/rtn.h",
        "bw_store_f16(half, bw_max(step, least));",
        "bw_store_f16(half, step);",
        "tests/core",
    ),
    Bug(
        "two symmetric levels lie around 1",
        "csrc/core/scheme.c",
        "levels == 2 ? 0.5f",
        "levels == 2 ? 1.0f",
        "tests/core/test_rtn.py",
    ),
    Bug(
        "a product of sizes may overflow",
        "csrc/core/scheme.c",
        "return a < 0 || b < 0 || __builtin_mul_overflow(a, b, product) ? BW_ERR_OVERFLOW : BW_OK;",
        "*product = (ptrdiff_t)((size_t)a * (size_t)b);\n    return BW_OK;",
        "tests/boundary tests/c",
    ),
    Bug(
        "the last partial byte of packed codes is lost",
        "csrc/core/codec/dense.h",
        "memcpy(&stream, packed + done, (size_t)(n_bytes - done));",
        "memcpy(&stream, packed + done, (size_t)(n_bytes - done - 1));",
        "tests/core",
    ),
    Bug(
        "whole words are written past the end of a packed row",
        "csrc/core/codec/dense.h",
        "i + 8 <= n && done + 8 <= n_bytes; i += 8, done += bits) { /* whole",
        "i + 8 <= n; i += 8, done += bits) { /* whole",
        "tests/core tests/c",
    ),
    Bug(
        "bytes that no ternary code makes are accepted",
        "csrc/core/codec/ternary.h",
        "largest = rest > 242 ? 3 : largest;",
        "largest = rest > 255 ? 3 : largest;",
        "tests/core tests/boundary",
    ),
    Bug(
        "the last chunk of a matrix runs past its rows",
        "csrc/core/pack.c",
        "return end < job->rows ? end : job->rows;",
        "return end;",
        "tests/core tests/c",
    ),
    Bug(
        "a code outside the scheme is decoded",
        "csrc/core/dequantize.c",
        "BW_ERR_CODE",
        "BW_OK",
        "tests/core tests/boundary tests/c",
    ),
    Bug(
        "the largest logit is not subtracted",
        "csrc/core/loss.c",
        "block_exp(block, load_block(m, row, first, block), max)",
        "block_exp(block, load_block(m, row, first, block), 0)",
        "tests/core/test_loss.py",
    ),
    Bug(
        "KL(candidate || reference)",
        "csrc/core/loss.c",
        "block_kl(a, b, load_block(job->logits, row, first, b), a_max, b_max, sums);",
        "block_kl(b, a, load_block(job->logits, row, first, b), b_max, a_max, sums);",
        "tests/core/test_loss.py",
    ),
    Bug(
        "an asymmetric Hessian is taken",
        "csrc/core/factor.c",
        "if (gap > 1e-3 *",
        "if (gap > 1e9 *",
        "tests/core/test_gptq.py",
    ),
    Bug(
        "GPTQ stops feeding errors back after the first block",
        "csrc/core/gptq.c",
        "b->errors,\n             BW_TILE_ROWS, 1, b->base, BW_TILE_ROWS);",
        "b->errors,\n             BW_TILE_ROWS, 0, b->trial_errors, BW_TILE_ROWS);",
        "tests/core/test_gptq.py",
    ),
    Bug(
        "a tensor's owner is never released",
        "csrc/python/tensor.c",
        "    call_deleter(view);\n    Py_CLEAR(view->capsule);",
        "    Py_CLEAR(view->capsule);",
        "tests/boundary",
    ),
    Bug("a missed DECREF after an error", "csrc/python/stored.c", "    Py_XDECREF(codes);\n", "", "tests/boundary"),
    Bug(
        "read-only memory is taken as output",
        "csrc/python/tensor.c",
        "if ((flags & BW_WRITABLE) && view->read_only) {",
        "if ((flags & BW_WRITABLE) && view->read_only && 0) {",
        "tests/boundary",
    ),
    Bug(
        "the byte offset of a tensor is ignored",
        "csrc/python/tensor.c",
        "(char *)((uintptr_t)t->data + (uintptr_t)t->byte_offset)",
        "(char *)t->data",
        "tests/boundary",
    ),
    Bug(
        "long calls do not ask for signals",
        "csrc/python/module.c",
        "    bw_on_interrupt(bw_ask_signals);\n",
        "",
        "tests/boundary",
    ),
    Bug(
        "workers pick the same chunk",
        "csrc/core/parallel.c",
        "atomic_fetch_add_explicit(&pool.next_chunk, 1, memory_order_relaxed);\n        if (chunk",
        "atomic_load(&pool.next_chunk);\n"
        "        atomic_store(&pool.next_chunk, chunk + 1 + (chunk % 7 == 3));\n        if (chunk",
        "tests/boundary tests/core",
    ),
    Bug(
        "all looks of the certificate spend the whole error probability",
        "bitween/gradual/proof/certificate.py",
        "levels = error_levels(shares, 1 - confidence, spending)",
        "levels = [1 - confidence for _ in shares]",
        "tests/gradual/proof/test_certificate.py",
    ),
    Bug(
        "files are renamed before they are on the disk",
        "bitween/store/files.py",
        "else file.write(content)\n        os.fsync(descriptor)\n",
        "else file.write(content)\n",
        "tests/store/test_files.py tests/gradual/journal/test_journal.py",
    ),
)


def plant(bug: Bug, copy: Path) -> None:
    path = copy / bug.file
    text = path.read_text()
    if text.count(bug.old) != 1:
        raise SystemExit(f"{bug.file}: {bug.what}: the place to plant it has changed")
    path.write_text(text.replace(bug.old, bug.new, 1))


def caught(bug: Bug, copy: Path) -> str:
    """By what the bug was noticed; empty when it lives."""

    def run(*command: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, *command], cwd=copy, capture_output=True, text=True, check=False)

    if run("setup.py", "-q", "build_ext", "--inplace").returncode:
        return "the compiler"
    done = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *bug.tests.split())
    failed = [
        line.split(" - ")[0].split(maxsplit=1)[1]
        for line in done.stdout.splitlines()
        if line.startswith(("FAILED", "ERROR"))
    ]
    if "ImportError" in done.stdout or "ModuleNotFoundError" in done.stdout:  # says nothing of the bug
        raise SystemExit(f"{bug.what}: {failed[0]} could not be read\n{done.stdout[-2000:]}")
    return failed[0] if failed else "a crash" if done.returncode < 0 or done.returncode > 2 else ""


def remember(bug: Bug, by: str) -> None:
    """Merge one bug's verdict into the file of results, in the order of `BUGS`."""
    seen = json.loads(SEEN.read_text()) if SEEN.exists() else {}
    seen[bug.what] = {"caught by": by, "day": str(date.today())}
    ordered = {b.what: seen[b.what] for b in BUGS if b.what in seen}
    SEEN.write_text(json.dumps(ordered, indent=1) + "\n")


def main() -> None:
    chosen = [int(number) for number in sys.argv[1:]] or range(1, len(BUGS) + 1)
    alive = 0
    for number in chosen:
        bug = BUGS[number - 1]
        with tempfile.TemporaryDirectory() as place:
            copy = Path(place)
            for name in COPIED:
                copying = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
                copying(ROOT / name, copy / name)
            plant(bug, copy)
            by = caught(bug, copy)
        alive += not by
        remember(bug, by)
        print(f"{number}. {bug.what}: {f'caught by {by}' if by else 'LIVES'}", flush=True)
    print(f"{len(chosen)} bugs planted, {len(chosen) - alive} caught")
    sys.exit(alive > 0)


if __name__ == "__main__":
    main()
