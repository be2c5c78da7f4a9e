"""Damage and time of every layer quantizer, with other projects beside them, on models of your own.

    python benchmarks/quantizers.py MODEL... --text FILE [--bits 4 3 2] [--rows rtn gptq+refine auto-round ...]
        [--python "auto-round=/path/to/its/python" ...]

All linear layers of the decoder are quantized in groups of 64 with zero points; embedding and head stay as they are.
"KL" is the damage: KL(original || quantized) in nats a token over the first 12 windows of 512 tokens of the text.
Methods that learn from text get its last --windows windows, 32 where the row does not say. "seconds" go from windows
to the quantized model, loading left out; "rounding" is the part that is spent on the layers once their activations are
known.

Peers run in processes of their own (peers.py), each with the interpreter that --python names, and are told as
"not installed" where it lacks them. New rows replace their like in results/quantizers.json, so that long runs can be
split; results/quantizers.md shows all of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import common
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitween
from bitween import Scheme
from bitween.functional import METHODS
from bitween.model.blocks import BlockRunner, inspect
from bitween.realise.sequential import SequentialQuantizer

LENGTH, SCORED = 512, 12
WINDOWS = 32  # of calibration text, unless told otherwise
TRAINING_WINDOWS = 2  # a step
PEERS = ("auto-round", "llmcompressor GPTQ", "hqq")
NAME = "quantizers"


class Subject:
    """A model, its windows, and what it says without quantization."""

    def __init__(self, path: str, text: str, windows: int):
        self.path, self.name = path, Path(path).name
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        ids = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids[0]
        cut = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
        if len(cut) < SCORED + windows:
            raise SystemExit(f"text: expected {SCORED + windows} windows of {LENGTH} tokens; got {len(cut)}")
        self.scored, self.windows = cut[:SCORED], cut[-windows:]
        self.layout = inspect(self.model)
        self.runner = BlockRunner(self.model, self.layout)
        self.layers = [layer for block in self.layout.blocks for layer in block.layers]
        self.original = {layer.name: layer.module.weight for layer in self.layers}
        self._exact = BlockRunner(self.model, self.layout, products="fp32", check=False)
        self._reference = self._finals()

    def damage(self) -> float:
        with self._exact:
            pairs = zip(self._reference, self._finals(), strict=True)
            found = [bitween.kl_divergence(self._exact.logits(p), self._exact.logits(q)) for p, q in pairs]
        return float(sum(part.sum(dtype="float64") for part in found) / sum(len(part) for part in found))

    def restore(self) -> None:
        for layer in self.layers:
            layer.module.weight = self.original[layer.name]

    def _finals(self) -> list[torch.Tensor]:
        """What enters the head at every token that predicts another, window by window."""
        with self._exact:
            hidden, context = self._exact.embed(self.scored)
            for i in range(len(self.layout.blocks)):
                hidden = self._exact.run_block(i, hidden, context)
            return list(self._exact.final(hidden)[:, :-1])


def quantize_ours(subject: Subject, method: str, bits: float) -> dict[str, object]:
    """Quantize the model in place; what the row says beside the damage."""
    spent: Counter = Counter()

    def note(stage: str, _block: str, _layer: str, seconds: float) -> None:
        spent[stage] += seconds

    started = time.perf_counter()
    plan = {layer.name: Scheme(bits, 64) for layer in subject.layers}
    quantizer = SequentialQuantizer(subject.runner, method=method, progress=note)
    batch = TRAINING_WINDOWS if method == "signround" else len(subject.windows)
    batches = [] if method == "rtn" else quantizer.embed(subject.windows.split(batch))
    results = list(quantizer.run(plan, batches))
    seconds = time.perf_counter() - started
    stored = sum(r.quantized.nbytes for r in results) * 8 / sum(r.original.numel() for r in results)
    rounding = spent["quantize"] + spent["train"]
    return {"stored bits": stored, "seconds": seconds, "rounding": rounding, "by": f"bitween {bitween.__version__}"}


def quantize_peer(subject: Subject, peer: str, bits: int, options: argparse.Namespace) -> dict[str, object] | None:
    """The same with a peer; None where it is not installed."""
    found = common.run_peer(peer, options.python, subject.path, subject.windows, bits, options.iterations)
    if found is None:
        return None
    weights, told = found
    for layer in subject.layers:
        layer.module.weight = torch.nn.Parameter(weights[layer.name], requires_grad=False)
    by = f"{peer} {told['version']}" + (f", {options.iterations} iterations" if peer == "auto-round" else "")
    return {"stored bits": float(told["bits"]), "seconds": float(told["seconds"]), "rounding": None, "by": by}


def measure(subject: Subject, method: str, bits: int, options: argparse.Namespace) -> dict[str, object]:
    subject.restore()
    label = (
        method if len(subject.windows) == WINDOWS or method == "rtn" else f"{method}, {len(subject.windows)} windows"
    )
    row = {"model": subject.name, "bits": bits, "method": label}
    found = quantize_peer(subject, method, bits, options) if method in PEERS else quantize_ours(subject, method, bits)
    if method == "auto-round":
        row["method"] += f", {options.iterations} steps"
    if found is None:
        return row | {"KL": None, "seconds": None, "rounding": None, "stored bits": None, "by": "not installed"}
    return row | {"KL": subject.damage()} | found | {"windows": len(subject.windows), "date": common.machine()["date"]}


def merge(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Known rows with new ones in their place."""
    path = common.RESULTS / f"{NAME}.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    by_key = {(row["model"], row["bits"], row["method"]): row for row in [*known, *rows]}
    order = {method: i for i, method in enumerate(METHODS)}
    return sorted(by_key.values(), key=lambda r: (r["model"], -r["bits"], order.get(_verb(r), 99), r["method"]))


def _verb(row: dict[str, object]) -> str:
    """The method of a row without what stands behind a comma."""
    return str(row["method"]).partition(",")[0]


def written(rows: list[dict[str, object]]) -> str:
    """The page: a table a model, each damage also as a multiple of the best peer's."""
    about = common.machine()
    parts = [
        "# Layer quantizers, measured",
        __doc__.split("\n\n")[2].replace("--windows ", ""),
        f"{about['cpu']}, {about['threads']} threads, {about['isa']}, OpenBLAS {about['blas_core']}, "
        f"torch {about['torch']}; {about['date'][:10]}. Written by `benchmarks/quantizers.py`.",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        lines = []
        for row in own:
            peers = [r["KL"] for r in own if r["bits"] == row["bits"] and _verb(r) not in METHODS and r["KL"]]
            line = {key: row[key] for key in ("bits", "method", "KL")}
            line["of best peer"] = row["KL"] / min(peers) if peers and row["KL"] else ""
            line |= {key: row[key] for key in ("seconds", "rounding", "stored bits", "by")}
            lines.append({key: "" if value is None else value for key, value in line.items()})
        parts += [f"## {model}", common.show(lines)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="directories")
    parser.add_argument("--text", required=True, help="file; its start is scored, its end calibrates")
    parser.add_argument(
        "--windows", type=int, default=WINDOWS, help=f"of {LENGTH} tokens to calibrate with (default {WINDOWS})"
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--rows", nargs="+", choices=[*METHODS, *PEERS], default=[*METHODS, *PEERS], metavar="ROW")
    parser.add_argument("--python", nargs="+", default=[], metavar="PEER=PATH", help="interpreters of peers")
    parser.add_argument("--iterations", type=int, default=200, help="of auto-round (default 200)")
    options = parser.parse_args()
    text = Path(options.text).read_text(encoding="utf-8")
    for path in options.models:
        subject = Subject(path, text, options.windows)
        for bits in options.bits:
            for method in options.rows:
                row = measure(subject, method, bits, options)
                print(json.dumps(row), flush=True)
                rows = merge([row])
                common.save(NAME, rows, length=LENGTH, scored=SCORED)
                (common.RESULTS / f"{NAME}.md").write_text(written(rows))


if __name__ == "__main__":
    main()
