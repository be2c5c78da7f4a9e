"""Trellis codes beside GPTQ with refinement: bits that are stored and KL divergence, by default on the tests' own small
model.

.venv/bin/python benchmarks/trellis.py [MODEL_DIR] [--ways gptq+refine:64,gptq+refine:-1,trellis,trellis:high]
    [--bits 4,3,2] [--windows 24] [--every 1]

A way is a method and what it takes: `gptq+refine:-1` whole rows as groups, `trellis:high` states of 16 bits,
`gptq+refine:64:auto` in a basis that is easier to quantize, which trellis codes take by themselves, `trellis:none` not.

`--every 3` quantizes only each third block, for slow ways on larger models.
"""

import argparse
import time
from datetime import date
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitween
from bitween import Bitween
from bitween.gradual import GradualEvaluator
from bitween.layers import packed_layers
from bitween.model import blocks

TINY = Path(__file__).parent.parent / "tests/tiny/model"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", default=str(TINY))
    parser.add_argument("--ways", default="gptq+refine:64,trellis", help="method[:group size][:effort][:transforms]")
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--windows", type=int, default=24, help="of 512 tokens for calibration")
    parser.add_argument("--selection", type=int, default=8, help="windows that are scored")
    parser.add_argument("--every", type=int, default=1)
    return parser.parse_args()


def main(o: argparse.Namespace) -> None:
    model = AutoModelForCausalLM.from_pretrained(o.directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(o.directory)
    evaluator = GradualEvaluator(
        model, tokenizer, calibration_samples=1, selection_samples=o.selection, evaluation_samples=1
    )
    left = [f"{b.name}.*" for i, b in enumerate(blocks.inspect(model).blocks) if i % o.every]
    print(f"{Path(o.directory).name}, {bitween.info()['isa']}, {date.today()}, decoder linears", end="")
    print(f" of each {o.every}. block" if o.every > 1 else "", end="")
    print(f", {o.windows} calibration windows, {o.selection} scored, all shipped text", flush=True)
    print(
        "| way | bits | bits a weight, all counted | KL, nats a token | seconds |\n|---|---:|---:|---:|---:|",
        flush=True,
    )
    for bits in (float(b) for b in o.bits.split(",")):
        for way in o.ways.split(","):
            method, *details = way.split(":")
            group = next((int(d) for d in details if d.lstrip("-").isdigit()), 64)
            effort = "high" if "high" in details else "normal"
            transforms = next((d for d in details if d in ("auto", "none")), None)
            started = time.monotonic()
            wanted = int(bits) if bits.is_integer() else bits
            quantizer = Bitween(model, tokenizer, bits=wanted, group_size=group, calibration_samples=o.windows)
            quantized = quantizer.quantize(method=method, effort=effort, transforms=transforms, ignore_layers=left)
            seconds = time.monotonic() - started
            stored = [module.quantized for _, module in packed_layers(quantized)]
            average = 8 * sum(q.nbytes for q in stored) / sum(q.shape[0] * q.shape[1] for q in stored)
            damage = evaluator.measure(quantized).damage
            print(f"| {way} | {bits:g} | {average:.3f} | {damage:.4f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main(options())
