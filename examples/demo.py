"""Gradual quantization of SmolLM2-135M from start to finish; `make demo` runs this.

    python examples/demo.py MODEL_DIR OUTPUT_DIR

Opens the model in bfloat16 from its files, asks for 60 % less memory at no more than 5 % higher perplexity in each of
six domains of text, prints the report, saves the quantized model, loads it again and lets it write a sentence.
"""

import sys
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

import bitween
from bitween.gradual import GradualQuantizer
from bitween.report.progress import Story

PROMPT = "The most important thing about a good night's sleep is"


def main(model_dir: str, output_dir: str) -> None:
    started = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)

    quantizer = GradualQuantizer(
        model_dir,  # its weights stay in their files until they are wanted
        tokenizer,
        dtype=torch.bfloat16,
        target_memory_reduction=0.6,
        max_perplexity_increase=0.05,
        calibration_samples=24,
        evaluation_samples=96,
        stages=2,
        distillation_steps=0,
        progress=Story(),
    )
    quantized = quantizer.quantize()
    report = quantizer.get_quantization_report()
    print(report)

    bitween.save_model(quantized, tokenizer, output_dir, report=report.to_dict(), certificate=report.proof)
    reloaded, tokenizer = bitween.load_model(output_dir)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    text = reloaded.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    print(f"\nthe model saved in {output_dir} and loaded again writes:\n  {tokenizer.decode(text[0])}")
    saved = sum(path.stat().st_size for path in Path(output_dir).glob("*.safetensors"))
    print(f"\n{saved / 2**20:,.1f} MiB on disk; {time.monotonic() - started:.0f} seconds in all")


if __name__ == "__main__":
    main(*sys.argv[1:3])
