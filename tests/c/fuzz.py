"""Ten million made-up calls of the core under the address and undefined behaviour sanitizers (`make fuzz`).

Where clang and its libFuzzer are installed, a search guided by coverage follows.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .build import ISAS, build

SANITIZED = ("-O2", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
CALLS = 10_000_000
PARTS = 2 * len(ISAS)


def clang() -> str | None:
    """The newest clang that is installed."""
    names = ["clang", *(f"clang-{version}" for version in range(25, 13, -1))]
    return next(filter(shutil.which, names), None)


def made_up(program: Path, part: int, count: int) -> int:
    """Run `count` calls on one instruction set; how many were made. SystemExit with the sanitizer's words."""
    command = [program, str(count), str(part + 100), ISAS[part % len(ISAS)], str(1 + part % 2)]
    run = subprocess.run(command, env={**os.environ, "BITWEEN_TEST_HEAP": "1"}, capture_output=True, text=True)
    if "this machine has no" in run.stderr:
        print(run.stderr.strip())
        return 0
    if run.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{run.stderr}")
    return sum(int(line.split()[1]) for line in run.stdout.splitlines())


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else CALLS
    compiler = clang() or "gcc"
    with tempfile.TemporaryDirectory() as folder:
        program = build("random_calls", Path(folder) / "random_calls", compiler, SANITIZED)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(lambda part: made_up(program, part, -(-count // PARTS)), range(PARTS)))
        print(f"{sum(made):,} calls on {', '.join(ISAS)}, {compiler}: no finding")
        if compiler != "gcc":
            flags = tuple(flag.replace("=address", "=fuzzer,address") for flag in SANITIZED)
            fuzzer = build("fuzz_core", Path(folder) / "fuzz_core", compiler, flags)
            subprocess.run([fuzzer, "-max_total_time=120", "-max_len=96", "-timeout=10", "-verbosity=0",
                            "-print_final_stats=1"], check=True, cwd=folder)  # fmt: skip


if __name__ == "__main__":
    main()
