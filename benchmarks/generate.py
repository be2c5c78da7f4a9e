"""Tokens a second of transformers' generate, batch 1: a quantized model against the bfloat16 model it came from.

    python benchmarks/generate.py MODEL_DIR [--bits 4] [--group-size 64] [--quantized DIR] [--tokens 48] [--rounds 5]

Both models take turns in one process. Without --quantized the model is rounded to one scheme, embedding and head
included, since only the time counts here. "x bf16" is the median over rounds of the ratio of the two.
"""

from __future__ import annotations

import argparse
import statistics

import common
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitween
from bitween import Bitween
from bitween.memory import model_bytes

PROMPT = "The most important thing about a good night's sleep is"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory of a causal language model")
    parser.add_argument("--quantized", help="directory of the same model, quantized")
    parser.add_argument("--bits", type=float, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48, help="to generate")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    original = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    if options.quantized:
        quantized, name = bitween.load_model(options.quantized)[0], options.quantized
    else:
        maker = Bitween(original, bits=options.bits, group_size=options.group_size, embeddings=True)
        quantized, name = maker.quantize(rtn=True), str(maker.scheme)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    quiet = {"do_sample": False, "pad_token_id": tokenizer.eos_token_id, "min_new_tokens": options.tokens}

    def writer(model, mode=None):
        def write():
            if mode:
                bitween.set_matmul_mode(model, mode)
            model.generate(ids, max_new_tokens=options.tokens, **quiet)

        return write

    modes = ("int16", "int8", "exact")
    candidates = {"bf16": writer(original), **{mode: writer(quantized, mode) for mode in modes}}
    seconds = common.alternate(candidates, options.rounds)
    rows = [
        {
            "model": "original, bfloat16" if name_of == "bf16" else f"{name}, mode {name_of}",
            "MiB": model_bytes(original if name_of == "bf16" else quantized) / 2**20,
            "tokens/s": options.tokens / statistics.median(took),
            "x bf16": common.median_ratio(seconds["bf16"], took),
        }
        for name_of, took in seconds.items()
    ]
    print(common.show(rows))
    print("written to", common.save("generate", rows, tokens=options.tokens, rounds=options.rounds))


if __name__ == "__main__":
    main()
