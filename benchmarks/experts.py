"""Seconds of one token through mixture-of-experts models, packed against the bfloat16 model they came from.

    python benchmarks/experts.py [--bits 4] [--group-size 64] [--tokens 16] [--rounds 7]

The models are random, of Mixtral's and GPT-OSS's shape, since only the time counts here. Batch 1, one token a forward
pass, as in generation; the two take turns, and "x bf16" is the median over rounds of bfloat16's time over ours.

Writes results/experts.json.
"""

from __future__ import annotations

import argparse
import json

import common
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bitween import Bitween
from bitween.model.memory import model_bytes

_COMMON = {
    "vocab_size": 1000,
    "hidden_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
}
SHAPES = {
    "mixtral": {"intermediate_size": 3584, "num_local_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": {"intermediate_size": 1024, "num_local_experts": 16, "num_experts_per_tok": 4, "head_dim": 64},
}


def measure(family: str, options: argparse.Namespace) -> dict[str, object]:
    """One shape: seconds of both, their ratio, bytes of both."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**_COMMON, **SHAPES[family]), dtype=torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model = model.eval()
    packed = Bitween(model, bits=options.bits, group_size=options.group_size).quantize()
    ids = torch.randint(3, 1000, (options.tokens, 1, 1), generator=torch.Generator().manual_seed(1))

    def forward(which: torch.nn.Module) -> None:
        with torch.inference_mode():
            for token in ids:  # different tokens choose different experts
                which(token, use_cache=False)

    seconds = common.alternate({"bf16": lambda: forward(model), "packed": lambda: forward(packed)}, options.rounds)
    ratio = common.median_ratio(seconds["bf16"], seconds["packed"])
    nbytes = {"bf16": model_bytes(model), "packed": model_bytes(packed)}
    print(f"{family:10s} {ratio:5.2f} x bf16   {nbytes['packed'] / nbytes['bf16']:.1%} of its bytes", flush=True)
    return {"seconds": seconds, "times_bf16": ratio, "bytes": nbytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    found = {family: measure(family, options) for family in SHAPES}
    common.RESULTS.mkdir(exist_ok=True)
    result = {"machine": common.machine(), "options": vars(options), "models": found}
    (common.RESULTS / "experts.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
