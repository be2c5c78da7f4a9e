"""Builds the C programs of this folder together with the core.

python -m tests.c.build PROGRAM OUTPUT [--compiler gcc] [--flags "-O1 -g"] [--wrap posix_memalign ...]
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
COMMON = ("calls.c", "decoding.c", "made.c", "memory.c")
ISAS = ("scalar", "avx2", "avx512") if platform.machine() in ("x86_64", "AMD64") else ("scalar", "neon")
WARNINGS = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", "-ffp-contract=off", "-fno-math-errno")


def build(program: str, output: Path, compiler: str = "gcc", flags: tuple[str, ...] = ("-O2",), wrap=()) -> Path:
    """Compile PROGRAM.c with the whole core into `output`; CalledProcessError carries the compiler's words."""
    library = next((ROOT / "bitween/_lib").glob("libscipy_openblas.*"))
    sources = [*(ROOT / "csrc/core").glob("*.c"), *(ROOT / f"csrc/core/isa/{name}.c" for name in ISAS)]
    sources += [HERE / name for name in (f"{program}.c", *COMMON)]
    defines = ["-DBW_BLAS_SCIPY=1", "-DBW_ISA_LIST=" + " ".join(f"X({name})" for name in ISAS)]
    with tempfile.TemporaryDirectory() as folder:

        def compiled(source: Path) -> str:
            target = str(Path(folder) / f"{source.parent.name}-{source.stem}.o")
            command = [compiler, *WARNINGS, *defines, *flags, "-c", str(source), "-o", target]
            subprocess.run(command, check=True, capture_output=True, text=True)
            return target

        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(compiled, sources))
        links = [str(library), f"-Wl,-rpath,{library.parent}", "-pthread", "-ldl", "-lm"]
        links += [f"-Wl,--wrap={name}" for name in wrap]
        command = [compiler, *flags, *objects, *links, "-o", str(output)]
        subprocess.run(command, check=True, capture_output=True, text=True)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program")
    parser.add_argument("output", type=Path)
    parser.add_argument("--compiler", default="gcc")
    parser.add_argument("--flags", default="-O2", help="one text, as in --flags=-O1")
    parser.add_argument("--wrap", nargs="*", default=())
    options = parser.parse_args()
    try:
        build(options.program, options.output, options.compiler, tuple(options.flags.split()), options.wrap)
    except subprocess.CalledProcessError as error:
        raise SystemExit(error.stderr) from None


if __name__ == "__main__":
    main()
