"""Trellis codes beside GPTQ with refinement: bits that are stored and KL divergence, on the tests' own small model.

.venv/bin/python benchmarks/trellis.py [MODEL_DIR]
"""

import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitween
from bitween import Bitween
from bitween.gradual import GradualEvaluator
from bitween.layers import packed_layers

TINY = Path(__file__).parent.parent / "tests/tiny/model"
WINDOWS = 24


def main(directory: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    evaluator = GradualEvaluator(model, tokenizer, calibration_samples=1, selection_samples=8, evaluation_samples=1)
    print(f"{directory}, {bitween.info()['isa']}, decoder linears, {WINDOWS} calibration windows")
    print("| method | bits | bits a weight, all counted | KL, nats a token | seconds |\n|---|---:|---:|---:|---:|")
    for bits in (4, 3, 2):
        for method in ("gptq+refine", "trellis"):
            started = time.monotonic()
            quantizer = Bitween(model, tokenizer, bits=bits, group_size=64, calibration_samples=WINDOWS)
            quantized = quantizer.quantize(method=method)
            seconds = time.monotonic() - started
            stored = [module.quantized for _, module in packed_layers(quantized)]
            average = 8 * sum(q.nbytes for q in stored) / sum(q.shape[0] * q.shape[1] for q in stored)
            damage = evaluator.measure(quantized).damage
            print(f"| {method} | {bits} | {average:.3f} | {damage:.4f} | {seconds:.1f} |")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(TINY))
