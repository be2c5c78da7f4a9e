"""Whole gradual runs to -70 % on shapes whose bytes do not lie in ordinary linear layers.

    python benchmarks/reach.py [--only gemma3_text ...] [--reduction 0.7]

Models of random weights: a Gemma with a tied, scaled embedding of 262,144 rows, a Mixtral and a GPT-OSS. Their quality
says nothing, so none is asked of them; the table tells which bytes were reached, what stays in full precision, and
whether the saved model gives the same logits when it is loaded again.

Writes results/reach.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import common
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import bitween
from bitween.gradual import GradualQuantizer

TOKENIZER = Path(__file__).parents[1] / "tests" / "tiny" / "model"
_COMMON = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "pad_token_id": 0}
_EXPERTS = {**_COMMON, "vocab_size": 8192, "hidden_size": 512}
SHAPES = {
    "gemma3_text": {
        **_COMMON,
        "vocab_size": 262_144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "mixtral": {**_EXPERTS, "intermediate_size": 1792, "num_local_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": {
        **_EXPERTS,
        "intermediate_size": 512,
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
        "head_dim": 64,
    },
}


def measure(family: str, reduction: float) -> dict[str, object]:
    """One run: what was asked, what was reached, and whether it loads as it was."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SHAPES[family]), dtype=torch.bfloat16).eval()
    options = {"calibration_samples": 8, "evaluation_samples": 4, "sequence_length": 128, "stages": 1}
    started = time.perf_counter()
    quantizer = GradualQuantizer(
        model,
        AutoTokenizer.from_pretrained(TOKENIZER),
        target_memory_reduction=reduction,
        max_perplexity_increase=0.9,
        on_conflict="memory",
        importance=False,
        certify=False,
        **options,
    )
    packed = quantizer.quantize()
    seconds = time.perf_counter() - started
    memory = quantizer.get_quantization_report().memory
    ids = torch.arange(3, 35)[None]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        packed.save_pretrained(folder)
        same = torch.equal(bitween.load(folder)(input_ids=ids).logits, packed(input_ids=ids).logits)
    return {
        "family": family,
        "MiB": round(memory.original_total / 2**20, 1),
        "MiB reached": round(memory.total / 2**20, 1),
        "reduction": round(memory.reduction, 3),
        "in full precision": quantizer.preflight()["full_precision"],
        "loads equal": same,
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--reduction", type=float, default=0.7)
    options = parser.parse_args()
    rows = []
    for family in options.only:
        rows.append(measure(family, options.reduction))
        print(json.dumps(rows[-1]), flush=True)
    print(common.show(rows))
    print("written to", common.save("reach", rows, reduction=options.reduction))


if __name__ == "__main__":
    main()
