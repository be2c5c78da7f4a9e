"""Plans with and without trellis codes at the same bytes: predicted and measured damage, in nats of KL per token.

.venv/bin/python benchmarks/trellis_plan.py [MODEL_DIR] [--reduction 0.7 0.76] [--windows 24]

The embedding, the head and every linear layer may take any candidate; measured on the selection text, undistilled.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitween
from bitween.gradual import GradualQuantizer

TINY = Path(__file__).parent.parent / "tests/tiny/model"


def row(model, tokenizer, reduction: float, trellis: bool, windows: int) -> str:
    started = time.monotonic()
    quantizer = GradualQuantizer(
        model,
        tokenizer,
        reduction,
        0.9,
        calibration_samples=windows,
        evaluation_samples=1,
        on_conflict="memory",
        trellis=trellis,
        distillation_steps=0,
        importance=False,
        certify=False,
        stages=1,
    )
    quantizer.quantize()
    report = quantizer.get_quantization_report()
    stage = next(s for s in report.stages if s["damage"] == report.quality["damage"])
    coded = sum("trellis" in scheme for scheme in report.plan.values())
    return (
        f"| −{reduction:.0%} | {'grids and trellis' if trellis else 'grids'} | {coded} of {len(report.plan)} | "
        f"{report.average_bits:.2f} | {report.memory.total / 2**20:.1f} | {stage['predicted']:.4f} | "
        f"{stage['damage']:.4f} | {report.quality['perplexity_increase']:+.2%} | {time.monotonic() - started:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(TINY))
    parser.add_argument("--reduction", type=float, nargs="+", default=[0.76])
    parser.add_argument("--windows", type=int, default=24)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    print(f"{options.model} in bfloat16, {bitween.info()['isa']}, {options.windows} calibration windows")
    print("| memory | candidates | trellis layers | bits a weight | MiB | predicted KL | KL | perplexity | seconds |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|")
    for reduction in options.reduction:
        for trellis in (False, True):
            print(row(model, tokenizer, reduction, trellis, options.windows), flush=True)


if __name__ == "__main__":
    main()
