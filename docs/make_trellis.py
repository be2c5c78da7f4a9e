"""Measures and draws docs/pictures/trellis.svg, and prints its numbers as a table: python docs/make_trellis.py

Squared error of normal numbers of variance 1 by bits a code, scales not counted: grids of whole rows whose range is
searched, trellis codes with states of 12 and 16 bits, and the least that any code of so many bits can leave
(Shannon's rate-distortion bound, 4^-bits).
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

import bitween
from bitween import Scheme
from bitween.report.plots import AMBER, BLUE, GRID, INK, TEAL, _figure, _titled

matplotlib.rcParams.update({"svg.hashsalt": "bitween", "svg.fonttype": "none"})  # the same numbers, the same bytes

ROWS, COLS, SEED = 64, 1024, 1
HALVES = (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5)
GRIDS = (2, 3, 4, 5)


def error(scheme: Scheme, method: str) -> float:
    normal = np.random.default_rng(SEED).standard_normal((ROWS, COLS)).astype(np.float32)
    stored = bitween.quantize(normal, scheme, method=method)
    return float(((normal - stored.dequantize()) ** 2).mean())


def main() -> None:
    grid = [error(Scheme(bits, -1, True), "clip") for bits in GRIDS]
    by_width = {width: [error(Scheme.trellis(bits, width), "trellis") for bits in HALVES] for width in (12, 16)}
    print("| bits | grid | trellis, L = 12 | trellis, L = 16 | bound |\n|---:|---:|---:|---:|---:|")
    for k, bits in enumerate(HALVES):
        scalar = f"{grid[GRIDS.index(bits)]:.5f}" if bits in GRIDS else ""
        coded = " | ".join(f"{errors[k]:.5f}" for errors in by_width.values())
        print(f"| {bits:g} | {scalar} | {coded} | {4.0**-bits:.5f} |")

    figure, axes = _figure(7.0, 4.2)
    every = np.linspace(1, 5, 50)
    axes.plot(every, 4.0**-every, color=INK, lw=1.4, ls=(0, (4, 3)), label="rate-distortion bound")
    axes.plot(GRIDS, grid, "o-", color=AMBER, lw=1.6, ms=5, label="grid, range searched")
    for (width, errors), colour in zip(by_width.items(), (BLUE, TEAL), strict=True):
        whole = [k for k, bits in enumerate(HALVES) if bits == int(bits)]
        axes.plot([HALVES[k] for k in whole], [errors[k] for k in whole], "o-", color=colour, lw=1.6, ms=5,
                  label=f"trellis, states of {width} bits")  # fmt: skip
        mixed = [k for k in range(len(HALVES)) if k not in whole]
        axes.plot([HALVES[k] for k in mixed], [errors[k] for k in mixed], "o", mfc="white", color=colour, ms=5)
    axes.plot([], [], "o", mfc="white", color=BLUE, ms=5, label="half steps: two rates mixed")
    axes.set_yscale("log")
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    _titled(axes, "Squared error of normal numbers", "bits a weight", "mean squared error, variance 1")
    figure.set_facecolor("white")
    figure.savefig(Path(__file__).parent / "pictures" / "trellis.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
