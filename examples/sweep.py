"""Many budgets from one analysis: what each memory target would cost, before anything is quantized.

    python examples/sweep.py MODEL_DIR PICTURE.svg

Prints a table and draws the frontier. Predictions come from curvature alone; `quantize()` measures and proves.
"""

import sys

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitween.gradual import GradualQuantizer
from bitween.gradual.utils import perplexity_increase

SAVED = (0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8)


def main(model_dir: str, picture: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    quantizer = GradualQuantizer(model, tokenizer, calibration_samples=24)
    frontier, _ = quantizer.plan()
    sizes = quantizer.preflight()

    print("saved   memory, MiB   predicted KL, nats   perplexity, about")
    for saved in SAVED:
        limit = (1 - saved) * sizes["bytes"]
        if limit < sizes["least_bytes"]:
            print(f"{saved:5.0%}   out of reach: the smallest schemes need {sizes['least_bytes'] / 2**20:,.1f} MiB")
            continue
        damage = frontier.within_bytes(limit - sizes["fixed_bytes"]).damage
        print(f"{saved:5.0%}   {limit / 2**20:11,.1f}   {damage:18.4f}   {perplexity_increase(damage):+17.2%}")

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="layers, MiB", ylabel="predicted KL, nats per token", yscale="log")
    axes.plot([nbytes / 2**20 for nbytes, _ in frontier.points()], [damage for _, damage in frontier.points()])
    figure.savefig(picture)


if __name__ == "__main__":
    main(*sys.argv[1:3])
