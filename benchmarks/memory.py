"""Largest resident size of a gradual run, stage by stage, each run in a process of its own.

    python benchmarks/memory.py MODEL_DIR                     # this tree
    python benchmarks/memory.py MODEL_DIR --directory         # opened by GradualQuantizer, as the command line does
    python benchmarks/memory.py MODEL_DIR --directory --until open --set 'dtype="bfloat16"'
    python benchmarks/memory.py MODEL_DIR --trees A B         # other checkouts, built in place, one after the other
    python benchmarks/memory.py --random 16x2048x5632x49152 MODEL_DIR   # first make a Llama of random weights there

The kernel keeps a high-water mark of resident memory and can be asked to begin anew (/proc/self/clear_refs), so the
mark of each stage is exact, not sampled. Pages of files count in it: those of libraries, of the model's own files, and
of the files where numbers wait (`bitween.model.spill`); the system can take these back at any moment, from a limited
process too. What it can't, memory of the process's own, is sampled beside it every few milliseconds. The digest is over
every tensor of the model that comes out: two trees that show the same one give the same bytes. Linux only.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

RUN = {
    "target_memory_reduction": 0.7,
    "calibration_samples": 24,
    "evaluation_samples": 96,
    "stages": 2,
    "distillation_steps": 0,
}


def main() -> None:
    """Parse, run each tree in its own process, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--trees", nargs="*", type=Path, default=[Path(__file__).parent.parent])
    parser.add_argument("--random", help="LAYERSxWIDTHxINNERxVOCABULARY of a Llama to make in MODEL_DIR first")
    parser.add_argument("--tokenizer", type=Path, default=Path(__file__).parent.parent / "tests" / "tiny" / "model")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="options of GradualQuantizer")
    parser.add_argument("--directory", action="store_true", help="pass MODEL_DIR itself to GradualQuantizer")
    parser.add_argument("--until", metavar="STAGE", help='end after this stage: "open", "basis", "importance", ...')
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    options = RUN | {name: json.loads(value) for name, _, value in (pair.partition("=") for pair in arguments.set)}
    if arguments.child:
        print(json.dumps(measure(arguments.model, options, arguments.directory, arguments.until)))
        return
    if arguments.random:
        make_llama(arguments.model, arguments.tokenizer, *map(int, arguments.random.split("x")))
    from common import machine, show

    passed = [
        *(["--directory"] if arguments.directory else []),
        *(["--until", arguments.until] if arguments.until else []),
    ]
    passed += ["--set", *arguments.set] if arguments.set else []
    found = {str(tree): run(tree, arguments.model, passed) for tree in arguments.trees}
    stages = dict.fromkeys(stage for result in found.values() for stage in result["peak"])
    rows = []
    for stage in stages:
        row: dict[str, object] = {"stage": stage}
        for tree, result in found.items():
            row[f"{tree} MiB"] = round(result["peak"].get(stage, 0) / 2**20)
            row[f"{tree} own MiB"] = round(result["own"].get(stage, 0) / 2**20)
            row[f"{tree} s"] = round(result["seconds"].get(stage, 0.0), 1)
        rows.append(row)
    print(show(rows))
    for tree, result in found.items():
        peak, predicted = max(result["peak"].values()), result["predicted"]
        print(f"{tree}: peak {peak / 2**20:,.0f} MiB")
        away = "" if arguments.until else f", {predicted / peak - 1:+.1%}"
        print(f"    predicted for the whole run {predicted / 2**20:,.0f} MiB{away}")
        print(f"    {result['outcome']}")
        print(f"    digest {result['digest']}")
    print(machine())


def run(tree: Path, model: Path, arguments: list[str]) -> dict:
    """One measured run with the package of a tree."""
    command = [sys.executable, __file__, str(model), "--child", *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tree.resolve())}, stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"{tree}: the run ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


class Enough(Exception):
    """The last stage that was asked for is done."""


def measure(place: Path, options: dict, directory: bool, until: str | None) -> dict:
    """Quantize in this process; {"peak", "own": {stage: bytes}, "seconds": {stage: s}, "digest", "outcome",
    "predicted"}."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bitween.gradual import GradualQuantizer

    marks = Marks("imports")

    class Marked(GradualQuantizer):
        """Tells where its stages begin and end."""

        def _timed(self, name, work):
            marks.begin(name)
            try:
                return super()._timed(name, work)
            finally:
                marks.begin("between")
                if name == until:
                    raise Enough

        def _prepare(self):
            return Marked._timed(self, "basis", super()._prepare)

    if directory:
        marks.begin("open")
        quantizer = Marked(place, None, **options)
    else:
        tokenizer = AutoTokenizer.from_pretrained(place)
        marks.begin("load")
        model = AutoModelForCausalLM.from_pretrained(place, dtype=options.pop("dtype", torch.bfloat16))
        marks.begin("open")
        quantizer = Marked(model, tokenizer, **options)
    marks.begin("between")
    outcome, digest = f"ended after {until}", None
    try:
        if until != "open":
            quantized = quantizer.quantize()
            marks.begin("done")
            digest = digest_of(quantized)
            report = quantizer.get_quantization_report()
            seconds = json.dumps({k: round(v, 1) for k, v in report.seconds.items()})
            outcome = f"{str(report).splitlines()[0]} | {seconds}"
    except Enough:
        pass
    marks.begin("end")
    predicted = quantizer.memory_need.total
    figures = {"peak": marks.peak, "own": marks.own, "seconds": marks.seconds}
    return {**figures, "digest": digest, "predicted": predicted, "outcome": outcome}


def digest_of(model) -> str:
    """Over names and bytes of every tensor that a model stores."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class Marks:
    """High-water marks of this process, by stage."""

    def __init__(self, stage: str):
        self.peak: dict[str, int] = {}
        self.own: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._stage, self._since = stage, time.monotonic()
        threading.Thread(target=self._sample, daemon=True).start()

    def begin(self, stage: str) -> None:
        """Close the stage at hand."""
        status = Path("/proc/self/status").read_text()
        peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024
        now = time.monotonic()
        self.peak[self._stage] = max(self.peak.get(self._stage, 0), peak)
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        print(f"{self._stage:16s} {peak / 2**20:8,.0f} MiB {now - self._since:7.1f} s", file=sys.stderr, flush=True)
        self._stage, self._since = stage, now
        Path("/proc/self/clear_refs").write_text("5")

    def _sample(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        with open("/proc/self/statm", "rb", buffering=0) as file:
            while True:
                file.seek(0)
                resident, of_files = map(int, file.read().split()[1:3])
                stage = self._stage
                self.own[stage] = max(self.own.get(stage, 0), (resident - of_files) * page)
                time.sleep(0.005)


def make_llama(
    directory: Path, tokenizer: Path, layers: int, width: int, inner: int, vocabulary: int, experts: int = 0
) -> None:
    """A Llama, or with experts a Mixtral, of random bfloat16 weights, the same for the same sizes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig

    torch.manual_seed(0)
    heads = max(1, width // 64)
    kind = functools.partial(MixtralConfig, num_local_experts=experts) if experts else LlamaConfig
    config = kind(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="500MB")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)


if __name__ == "__main__":
    main()
