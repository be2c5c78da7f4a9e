#!/bin/sh
# Expected: the default configuration of a model type builds that type's model, as `LlamaConfig()` does.
# Seen, transformers 5.24.0 with torch 2.13.0: for ten of the causal-LM types it does not, and the error comes from
# inside the model's constructor (a size that is None, a key that is missing), not from a check of the configuration.
# HunYuan, Ministral and Nemotron lack a head size or a number of heads, LFM2-MoE a list of layer types, Dots1 its number
# of experts, Qwen4-Exp the sizes of its index, Cohere Compass rotary parameters by layer type, and DBRX asks its
# attention configuration for a field that it does not have. Whoever makes small models of every type must name these.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
pip="$work/env/bin/python -m pip -q --disable-pip-version-check install"
cpu=https://download.pytorch.org/whl/cpu
$pip torch==2.13.0+cpu 2>/dev/null || $pip torch==2.13.0+cpu --extra-index-url $cpu
$pip transformers==5.24.0
"$work/env/bin/python" - <<'P' 2>/dev/null
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

expected = {
    "cohere_compass_text": "KeyError",
    "dbrx": "AttributeError",
    "dots1": "TypeError",
    "hunyuan_v1_dense": "TypeError",
    "hunyuan_v1_moe": "TypeError",
    "lfm2_moe": "TypeError",
    "ministral": "TypeError",
    "nemotron": "TypeError",
    "qwen4_exp": "TypeError",
    "qwen4_exp_text": "TypeError",
}
for name in (*expected, "llama"):
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(CONFIG_MAPPING[name]())
        got = "builds"
    except Exception as error:
        got = type(error).__name__
        print(f"{name}: {got}: {str(error)[:70]}")
    assert got == expected.get(name, "builds"), (name, got)
print("as described")
P
