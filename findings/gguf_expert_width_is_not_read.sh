#!/bin/sh
# Expected: a GGUF file of a mixture of experts tells transformers all sizes, as one of a dense model does.
# Seen, transformers 5.24.0 with gguf 0.19.0 and torch 2.13.0: of a qwen3moe or qwen2moe file the reader takes the number
# of experts and how many are chosen, but not qwen3moe.expert_feed_forward_length: moe_intermediate_size stays at its
# class's default, 768 or 1408. Where the file's experts are of another width, from_pretrained ends with size mismatches
# of all their matrices, unless the right config is given by the caller.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
pip="$work/env/bin/python -m pip -q --disable-pip-version-check install"
cpu=https://download.pytorch.org/whl/cpu
$pip torch==2.13.0+cpu 2>/dev/null || $pip torch==2.13.0+cpu --extra-index-url $cpu
$pip transformers==5.24.0 gguf==0.19.0 accelerate
"$work/env/bin/python" - "$work" <<'P' 2>/dev/null
import sys
import gguf, numpy as np, torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

WIDTH, INNER, EXPERTS, WORDS, HEAD = 64, 96, 4, 32, 16
file = gguf.GGUFWriter(sys.argv[1] + "/model.gguf", "qwen3moe")
file.add_vocab_size(WORDS); file.add_context_length(64); file.add_embedding_length(WIDTH); file.add_block_count(1)
file.add_feed_forward_length(128); file.add_expert_feed_forward_length(INNER)
file.add_expert_count(EXPERTS); file.add_expert_used_count(2)
file.add_head_count(4); file.add_head_count_kv(4); file.add_key_length(HEAD); file.add_value_length(HEAD)
file.add_rope_freq_base(10000.0); file.add_layer_norm_rms_eps(1e-6)
random = np.random.default_rng(0)
shapes = {"token_embd": (WORDS, WIDTH), "output": (WORDS, WIDTH), "output_norm": (WIDTH,), "blk.0.attn_norm": (WIDTH,),
          "blk.0.ffn_norm": (WIDTH,), "blk.0.attn_q_norm": (HEAD,), "blk.0.attn_k_norm": (HEAD,),
          **{f"blk.0.attn_{n}": (WIDTH, WIDTH) for n in ("q", "k", "v", "output")}, "blk.0.ffn_gate_inp": (EXPERTS, WIDTH),
          "blk.0.ffn_gate_exps": (EXPERTS, INNER, WIDTH), "blk.0.ffn_up_exps": (EXPERTS, INNER, WIDTH),
          "blk.0.ffn_down_exps": (EXPERTS, WIDTH, INNER)}
for name, shape in shapes.items():
    file.add_tensor(name + ".weight", random.standard_normal(shape).astype(np.float32))
file.write_header_to_file(); file.write_kv_data_to_file(); file.write_tensors_to_file(); file.close()

def load(**given):
    return AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file="model.gguf", dtype=torch.float32, **given)

try:
    load()
    raise SystemExit("loads now")
except RuntimeError as error:
    print(str(error)[:70])
config = Qwen3MoeConfig(vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=128, moe_intermediate_size=INNER,
                        num_experts=EXPERTS, num_experts_per_tok=2, num_hidden_layers=1, num_attention_heads=4,
                        num_key_value_heads=4, head_dim=HEAD, tie_word_embeddings=False)
print(tuple(load(config=config).model.layers[0].mlp.experts.down_proj.shape), "with the config given")
print("as described")
P
