#!/bin/sh
# Expected: a hybrid of state-space and attention layers also runs when none of its layers is an attention layer.
# Seen, transformers 5.24.0 with torch 2.13.0: Bamba, Jamba and GraniteMoeHybrid with only state-space layers raise in
# the forward pass with a cache, which is the default: the cache is asked for its length and answers that only attention
# layers have one. Four layers of their default patterns are such models; with use_cache=False Bamba's runs.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
pip="$work/env/bin/python -m pip -q --disable-pip-version-check install"
cpu=https://download.pytorch.org/whl/cpu
$pip torch==2.13.0+cpu 2>/dev/null || $pip torch==2.13.0+cpu --extra-index-url $cpu
$pip transformers==5.24.0
"$work/env/bin/python" - <<'P' 2>/dev/null
import torch
from transformers import AutoModelForCausalLM, BambaConfig

torch.manual_seed(0)
sizes = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=128, mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_chunk_size=16,
)
ids = torch.arange(12)[None]
model = AutoModelForCausalLM.from_config(BambaConfig(**sizes)).eval()
print("no attention layer, no cache:", tuple(model(ids, use_cache=False).logits.shape))
try:
    model(ids)
    raise SystemExit("runs now")
except ValueError as error:
    print("no attention layer, cache:", str(error)[:70])
    assert "can only be called on Attention layers" in str(error)
mixed = AutoModelForCausalLM.from_config(BambaConfig(**sizes, attn_layer_indices=[1])).eval()
print("one attention layer, cache:", tuple(mixed(ids).logits.shape))
print("as described")
P
