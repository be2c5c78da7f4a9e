"""Largest resident size of a gradual run, stage by stage, each run in a process of its own.

    python benchmarks/memory.py MODEL_DIR                     # this tree
    python benchmarks/memory.py MODEL_DIR --trees A B         # other checkouts, built in place, one after the other
    python benchmarks/memory.py --random 16x2048x5632x49152 MODEL_DIR   # first make a Llama of random weights there

The kernel keeps a high-water mark of resident memory and can be asked to begin anew (/proc/self/clear_refs), so the
mark of each stage is exact, not sampled. The digest is over every tensor of the model that comes out: two trees that
show the same one give the same bytes. Linux only.
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
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    options = RUN | {name: json.loads(value) for name, _, value in (pair.partition("=") for pair in arguments.set)}
    if arguments.child:
        print(json.dumps(measure(arguments.model, options)))
        return
    if arguments.random:
        make_llama(arguments.model, arguments.tokenizer, *map(int, arguments.random.split("x")))
    from common import machine, show

    found = {str(tree): run(tree, arguments.model, arguments.set) for tree in arguments.trees}
    stages = dict.fromkeys(stage for result in found.values() for stage in result["peak"])
    rows = []
    for stage in stages:
        row: dict[str, object] = {"stage": stage}
        for tree, result in found.items():
            row[f"{tree} MiB"] = round(result["peak"].get(stage, 0) / 2**20)
            row[f"{tree} s"] = round(result["seconds"].get(stage, 0.0), 1)
        rows.append(row)
    print(show(rows))
    for tree, result in found.items():
        print(f"{tree}: peak {max(result['peak'].values()) / 2**20:,.0f} MiB")
        print(f"    predicted {result['predicted'] / 2**20:,.0f} MiB")
        print(f"    {result['outcome']}")
        print(f"    digest {result['digest']}")
    print(machine())


def run(tree: Path, model: Path, options: list[str]) -> dict:
    """One measured run with the package of a tree."""
    command = [sys.executable, __file__, str(model), "--child", *(["--set", *options] if options else [])]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tree.resolve())}, stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"{tree}: the run ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(directory: Path, options: dict) -> dict:
    """Quantize in this process; {"peak": {stage: bytes}, "seconds": {stage: s}, "digest", "outcome", "predicted"}."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bitween.gradual import GradualQuantizer

    marks = Marks("imports")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    marks.begin("load")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    marks.begin("inspect")

    class Marked(GradualQuantizer):
        """Tells where its timed stages begin and end."""

        def _timed(self, name, work):
            marks.begin(name)
            try:
                return super()._timed(name, work)
            finally:
                marks.begin("between")

    quantizer = Marked(model, tokenizer, **options)
    marks.begin("between")
    quantized = quantizer.quantize()
    marks.begin("done")
    digest = hashlib.sha256()
    for name, tensor in sorted(quantized.state_dict().items()):
        digest.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    marks.begin("end")
    report = quantizer.get_quantization_report()
    return {
        "peak": marks.peak,
        "seconds": marks.seconds,
        "digest": digest.hexdigest()[:16],
        "predicted": quantizer.memory_need.total,
        "outcome": str(report).splitlines()[0]
        + " | "
        + json.dumps({k: round(v, 1) for k, v in report.seconds.items()}),
    }


class Marks:
    """High-water marks of this process, by stage."""

    def __init__(self, stage: str):
        self.peak: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._stage, self._since = stage, time.monotonic()

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
