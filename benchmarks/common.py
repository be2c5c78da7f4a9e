"""What every benchmark uses: alternating measurements, medians, the machine, a table and its JSON.

Candidates of one claim are run in turn, A B A B, in one process, so that whatever else the machine does hits all of
them; ratios are taken within each round, and the median of rounds is quoted.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

import bitween

RESULTS = Path(__file__).parent / "results"
PERFORMANCE = Path(__file__).parent.parent / "docs" / "performance.md"


def alternate(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after one run of each to warm up."""
    return {name: [wall for wall, _ in took] for name, took in alternate_with_cpu(candidates, rounds).items()}


def alternate_with_cpu(
    candidates: dict[str, Callable[[], object]], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """(seconds, seconds of CPU time in all threads) of each candidate in each round, after one run of each to warm up.

    A candidate that works in another process returns the CPU time of that one, a float. Threads that spin while they
    wait count as working.
    """
    for run in candidates.values():
        run()
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            wall, cpu = time.perf_counter(), time.process_time()
            elsewhere = run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            took[name].append((wall, elsewhere if isinstance(elsewhere, float) else cpu))
    return took


def median_ratio(top: Sequence[float], bottom: Sequence[float]) -> float:
    """Median over rounds of top / bottom."""
    return statistics.median(a / b for a, b in zip(top, bottom, strict=True))


def machine() -> dict[str, object]:
    """What the figures were measured on, and when."""
    info = bitween.info()
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "threads": info["threads"],
        "isa": info["isa"],
        "blas_core": info["blas_core"],
        "bitween": info["version"],
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def show(rows: Sequence[dict[str, object]]) -> str:
    """Rows of equal keys as a Markdown table; floats with three figures."""
    cells = [list(rows[0])] + [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def write_page(page: Path, mark: str, tables: Sequence[str]) -> None:
    """Put tables, and what they were measured on, between the marks `<!-- MARK -->` and `<!-- /MARK -->` of a page."""
    text = page.read_text(encoding="utf-8")
    first, last = f"<!-- {mark}: written by benchmarks/{mark}.py -->", f"<!-- /{mark} -->"
    before, found, rest = text.partition(first)
    _, closed, after = rest.partition(last)
    if not found or not closed:
        raise ValueError(f"{page}: expected the marks {first} and {last}")
    facts = machine()
    head = f"{facts['cpu']}, {facts['threads']} threads, {facts['isa']}, torch {facts['torch']}; {facts['date'][:10]}."
    page.write_text(f"{before}{first}\n\n" + "\n\n".join([head, *tables]) + f"\n\n{last}{after}", encoding="utf-8")


def save(name: str, rows: Sequence[dict[str, object]], **settings: object) -> Path:
    """Write results/<name>.json: machine, settings, rows."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "settings": settings, "rows": list(rows)}, indent=1) + "\n")
    return path


def run_peer(
    peer: str, pythons: Sequence[str], model: str, windows: torch.Tensor, bits: float, iterations: int
) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """Weights of the decoder's layers as another project leaves them, and what it tells; None where it is missing.

    `pythons`: "PEER=PATH" of interpreters that have a peer.
    """
    python = dict(pair.split("=", 1) for pair in pythons).get(peer, sys.executable)
    with tempfile.TemporaryDirectory() as folder:
        text, out = Path(folder, "windows.pt"), Path(folder, "out.safetensors")
        torch.save(windows, text)
        command = [python, str(Path(__file__).with_name("peers.py")), peer, model, text, out]
        status = subprocess.run(
            [*command, "--bits", str(bits), "--iterations", str(iterations)], check=False
        ).returncode
        if status == 3:
            return None
        if status:
            raise SystemExit(f"{peer}: failed with status {status}")
        with safe_open(out, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
