"""Products with packed matrices against torch, llama.cpp's kind of kernel in torch, and the memory's own speed.

    python benchmarks/matmul.py [--rounds 7] [--bits 2 3 4 8] [--trellis 2 3 4] [--prompt 512]

One row of activations, as when a token is generated: every product reads other weights than the one before, from a
ring of matrices that no cache holds, as the layers of a model are. "of read" is the packed bytes a second over the
speed at which both threads merely read memory; "x bf16" is the time of torch's bfloat16 linear over ours; "x int4" that
of torch's own packed product (_weight_int4pack_mm_for_cpu, groups of 64), which knows 4 bits only.

Writes results/matmul.json, results/roofline.svg and the tables of docs/performance.md; --dry only prints.
"""

from __future__ import annotations

import argparse
import itertools
import statistics

import common
import numpy as np
import torch

import bitween
from bitween import QuantizedLinear, Scheme

SHAPES = ((11008, 4096), (4096, 4096), (1536, 576))
RING_BYTES = 400 << 20


def ring(make, nbytes: int):
    """Endless turns through enough matrices that each is out of every cache when it comes again."""
    return itertools.cycle([make() for _ in range(max(2, min(256, RING_BYTES // nbytes)))])


def calls_for(nbytes: int) -> int:
    """Products in one measurement, to be well above the clock's grain."""
    return max(4, min(200, (64 << 20) // nbytes))


def repeated(run, n: int):
    def work():
        for _ in range(n):
            run()

    return work


def read_speed(rounds: int) -> float:
    """Bytes a second that all threads read together, summing numbers that no cache holds."""
    source = torch.ones(RING_BYTES // 8, dtype=torch.int64)
    return RING_BYTES / min(common.alternate({"read": lambda: source.sum()}, rounds)["read"])


def packed(rows: int, cols: int, scheme: Scheme, mode: str):
    def make():
        layer = QuantizedLinear.from_quantized(bitween.quantize(torch.randn(rows, cols) * 0.02, scheme))
        layer.mode = mode
        return layer

    return make


def trellis(rows: int, cols: int, rate: int, mode: str):
    """Every stream of bits is a path, so the codes are random; which rate a column tile has is learned from one."""
    tile = bitween.quantize(torch.randn(16, cols), Scheme.trellis(rate), method="trellis")

    def make():
        codes = np.random.default_rng(0).integers(0, 256, (rows // 16, tile.codes.shape[1]), dtype=np.uint8)
        scales = np.full((rows, 1), 0.02, dtype=np.float16)
        stored = bitween.QuantizedTensor(codes, scales, tile.zeros, tile.scheme, (rows, cols))
        layer = QuantizedLinear.from_quantized(stored)
        layer.mode = mode
        return layer

    return make


def int4(rows: int, cols: int):
    codes = torch.randint(0, 16, (rows, cols), dtype=torch.int32)
    scales = torch.rand(cols // 64, rows, 2).bfloat16()
    stored = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    return lambda: (stored.clone(), scales.clone())


def one_row(
    rows: int, cols: int, bits: list[float], rates: list[int], rounds: int, read: float
) -> list[dict[str, object]]:
    x, xf = torch.randn(1, cols).bfloat16(), torch.randn(1, cols)
    plain = ring(lambda: torch.randn(rows, cols).bfloat16(), 2 * rows * cols)
    n = calls_for(2 * rows * cols)
    candidates = {"bf16": repeated(lambda: torch.nn.functional.linear(x, next(plain)), n)}
    sizes = {}
    if cols % 64 == 0 and rows % 64 == 0:
        theirs = ring(int4(rows, cols), rows * cols // 2)

        def their_product():
            stored, scales = next(theirs)
            torch.ops.aten._weight_int4pack_mm_for_cpu(x, stored, 64, scales)

        candidates["int4"] = repeated(their_product, n)
    for width in bits:
        scheme = Scheme(int(width), 64)
        sizes[scheme] = scheme.nbytes(rows, cols)
        for mode in ("int16", "int8", "exact"):
            if mode != "int16" and width != 4:
                continue
            layers = ring(packed(rows, cols, scheme, mode), sizes[scheme])
            candidates[f"{scheme}, {mode}"] = repeated(lambda layers=layers: next(layers)(x), n)
    for rate in rates:
        scheme = Scheme.trellis(rate)
        sizes[scheme] = scheme.nbytes(rows, cols)
        for mode in ("int16", "int8"):
            layers = ring(trellis(rows, cols, rate, mode), sizes[scheme])
            candidates[f"{scheme}, {mode}"] = repeated(lambda layers=layers: next(layers)(x), n)
    layers32 = ring(packed(rows, cols, Scheme(4, 64), "int16"), Scheme(4, 64).nbytes(rows, cols))
    candidates["4b g64 asym, int16, float32 in and out"] = repeated(lambda: next(layers32)(xf), n)
    seconds = common.alternate(candidates, rounds)
    found = []
    for name, took in seconds.items():
        scheme = next((s for s in sizes if name.startswith(str(s))), None)
        nbytes = 2 * rows * cols if name == "bf16" else sizes.get(scheme, Scheme(4, 64).nbytes(rows, cols))
        each = statistics.median(took) / n
        found.append(
            {
                "matrix": f"{rows} x {cols}",
                "product": {"bf16": "torch bfloat16", "int4": "torch int4, groups of 64"}.get(name, name),
                "us": each * 1e6,
                "GB/s": nbytes / each / 1e9,
                "of read": nbytes / each / read,
                "x bf16": common.median_ratio(seconds["bf16"], took),
                "x int4": common.median_ratio(seconds["int4"], took) if "int4" in seconds else float("nan"),
            }
        )
    return found


def many_rows(rows: int, cols: int, tokens: int, rates: list[int], rounds: int) -> list[dict[str, object]]:
    x = torch.randn(tokens, cols).bfloat16()
    weight = torch.randn(rows, cols).bfloat16()
    layer = packed(rows, cols, Scheme(4, 64), "int16")()
    candidates = {"torch bfloat16": lambda: torch.nn.functional.linear(x, weight), "4b g64 asym": lambda: layer(x)}
    for rate in rates:
        codes = trellis(rows, cols, rate, "int16")()
        candidates[str(Scheme.trellis(rate))] = lambda codes=codes: codes(x)
    seconds = common.alternate(candidates, rounds)
    work = 2 * tokens * rows * cols
    return [
        {
            "matrix": f"{rows} x {cols}, {tokens} rows",
            "product": name,
            "ms": statistics.median(took) * 1e3,
            "GFLOP/s": work / statistics.median(took) / 1e9,
            "x bf16": common.median_ratio(seconds["torch bfloat16"], took),
        }
        for name, took in seconds.items()
    ]


def roofline(rows: list[dict[str, object]], read: float) -> None:
    """Work a byte against work a second: one row lies on the memory's slope."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="operations a byte of weights", ylabel="GFLOP/s")
    slope = [0.5, 16]
    axes.plot(slope, [read * s / 1e9 for s in slope], color="#66708a", label=f"memory, {read / 1e9:.1f} GB/s")
    for matrix, marker in zip(dict.fromkeys(r["matrix"] for r in rows), "osD^", strict=False):
        for ours, colour in ((True, "#3c5fd0"), (False, "#e0912f")):
            chosen = [r for r in rows if r["matrix"] == matrix and r["product"].startswith("torch") != ours]
            height, width = map(int, matrix.split(" x "))
            work = 2e-9 * height * width
            axes.scatter(
                [work / (r["GB/s"] * r["us"] * 1e-6) for r in chosen], [work / (r["us"] * 1e-6) for r in chosen],
                marker=marker, color=colour, label=f"{matrix}, {'bitween' if ours else 'torch'}",
            )  # fmt: skip
    axes.legend(frameon=False, fontsize=8)
    axes.grid(color="#dfe4ee")
    figure.savefig(common.RESULTS / "roofline.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bits", type=float, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--trellis", type=int, nargs="*", default=[2, 3, 4], help="rates, in bits")
    parser.add_argument("--prompt", type=int, default=512, help="rows of the large product")
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    torch.manual_seed(0)
    read = read_speed(options.rounds)
    print(f"reading memory: {read / 1e9:.1f} GB/s", flush=True)
    few, many = [], []
    for rows, cols in SHAPES:
        few += one_row(rows, cols, options.bits, options.trellis, options.rounds, read)
        print(common.show(few), flush=True)
    for rows, cols in SHAPES:
        many += many_rows(rows, cols, options.prompt, options.trellis, options.rounds)
    print(common.show(many))
    if options.dry:
        return
    common.save("matmul", [*few, *many], rounds=options.rounds, read_bytes_a_second=read)
    roofline(few, read)
    tables = [f"Reading memory: {read / 1e9:.1f} GB/s.", common.show(few), common.show(many)]
    common.write_page(common.PERFORMANCE, "matmul", tables)


if __name__ == "__main__":
    main()
