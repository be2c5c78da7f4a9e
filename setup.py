"""Builds the one extension, bitween._core. Everything else about the package stands in pyproject.toml.

BITWEEN_BLAS      unset: the OpenBLAS of the build requirement scipy-openblas32, copied into the package;
                  "system": what pkg-config calls openblas; a path: that shared library
BITWEEN_SANITIZE  "address,undefined" and the like: build with these sanitizers
BITWEEN_COVERAGE  1: build for gcov
"""

import os
import platform
import shutil
import subprocess
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def isa_sources():
    """The instruction sets of this machine's architecture; a new one is a new file here."""
    by_machine = {
        "x86_64": {"scalar", "avx2", "avx512"},
        "amd64": {"scalar", "avx2", "avx512"},
        "aarch64": {"scalar", "neon"},
        "arm64": {"scalar", "neon"},
    }
    wanted = by_machine.get(platform.machine().lower(), {"scalar"})
    return sorted(p.stem for p in (ROOT / "csrc/core/isa").glob("*.c") if p.stem in wanted)


def blas_options():
    """(defines, link arguments) for OpenBLAS, which is copied beside the extension unless told otherwise."""
    choice = os.environ.get("BITWEEN_BLAS", "")
    if choice == "system":
        flags = subprocess.run(["pkg-config", "--libs", "openblas"], capture_output=True, text=True, check=True)
        return [], flags.stdout.split()
    if choice:
        return [], [choice, f"-Wl,-rpath,{Path(choice).parent}"]
    import scipy_openblas32

    folder = ROOT / "bitween/_lib"
    folder.mkdir(exist_ok=True)
    origin = "@loader_path" if platform.system() == "Darwin" else "$ORIGIN"
    for library in Path(scipy_openblas32.get_lib_dir()).glob("libscipy_openblas.*"):
        shutil.copy2(library, folder)
    library = next(folder.glob("libscipy_openblas.*"))
    return [("BW_BLAS_SCIPY", "1")], [str(library), f"-Wl,-rpath,{origin}/_lib"]


def extension():
    blas_defines, blas_links = blas_options()
    isas = isa_sources()
    sources = list((ROOT / "csrc").glob("*/*.c")) + [ROOT / f"csrc/core/isa/{name}.c" for name in isas]
    extra = [
        "-std=c11",
        "-O3",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
    ]
    link = ["-pthread"]
    if sanitizers := os.environ.get("BITWEEN_SANITIZE"):
        extra += [
            f"-fsanitize={sanitizers}",
            "-fno-sanitize-recover=all",
            "-fno-omit-frame-pointer",
            "-g1",
            "-O1",
            "-fno-var-tracking",  # otherwise the scalar kernels compile for minutes
            "-fno-var-tracking-assignments",
        ]
        link += [f"-fsanitize={sanitizers}"]
    if os.environ.get("BITWEEN_COVERAGE"):
        extra += ["--coverage", "-O0", "-fprofile-update=atomic"]
        link += ["--coverage"]
    return Extension(
        "bitween._core",
        sources=sorted(str(p.relative_to(ROOT)) for p in sources),
        include_dirs=[numpy.get_include()],
        depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h")),
        define_macros=[
            ("_GNU_SOURCE", None),
            ("BW_VERSION", f'"{VERSION}"'),
            ("BW_ISA_LIST", " ".join(f"X({name})" for name in isas)),
            *blas_defines,
        ],
        extra_compile_args=extra,
        extra_link_args=[*link, *blas_links],
        py_limited_api=True,
    )


class BuildExt(build_ext):
    """Compiles as many files at a time as there are CPUs; setuptools by itself takes one after the other."""

    def build_extension(self, ext):
        one_by_one = self.compiler.compile

        def together(sources, **options):
            largest_first = sorted(sources, key=lambda source: (Path(source).parent.name != "isa", source))
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return sorted(o for made in pool.map(lambda s: one_by_one([s], **options), largest_first) for o in made)

        self.compiler.compile = together
        super().build_extension(ext)


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
