#!/bin/sh
# Expected: of a compressed-tensors checkpoint with config groups of several widths every layer is unpacked by its own
# group, or loading is refused.
# Seen, transformers 5.24.0 with compressed-tensors 0.20.1 and torch 2.13.0: with CompressedTensorsConfig(dequantize=True)
# the first group that names no experts by a pattern serves all dense layers. Of 4-bit attention and an 8-bit MLP, the
# MLP's weights come out with the right shapes and other numbers, without an error or a warning about it. The same
# files loaded without that option hold the right ones.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
pip="$work/env/bin/python -m pip -q --disable-pip-version-check install"
cpu=https://download.pytorch.org/whl/cpu
$pip torch==2.13.0+cpu 2>/dev/null || $pip torch==2.13.0+cpu --extra-index-url $cpu
$pip transformers==5.24.0 compressed-tensors==0.20.1 accelerate
"$work/env/bin/python" - "$work" <<'P' 2>/dev/null
import json, sys
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig

torch.manual_seed(0)
config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
                     num_key_value_heads=4, vocab_size=128, tie_word_embeddings=False)
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
packer, state = BaseCompressor.get_value_from_registry("pack-quantized"), model.state_dict()
groups, wanted = {}, {}
for bits, part in ((4, "self_attn"), (8, "mlp")):
    names = [n for n, m in model.named_modules() if part in n and isinstance(m, torch.nn.Linear)]
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    groups[f"group_{bits}"] = {"targets": names, "weights": weights, "format": "pack-quantized"}
    scheme = QuantizationScheme(targets=names, weights=QuantizationArgs(**weights), format="pack-quantized")
    for name in names:
        weight = state.pop(name + ".weight").half()
        scale = weight.view(len(weight), -1, 32).abs().amax(2) / (2 ** (bits - 1) - 1)
        parts = packer.compress({"weight": weight, "weight_scale": scale}, scheme)
        state |= {f"{name}.{key}": value.contiguous() for key, value in parts.items()}
        wanted[name] = packer.decompress(dict(parts), scheme)["weight"].float()
save_file(state, sys.argv[1] + "/model.safetensors", {"format": "pt"})
settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "ignore": ["lm_head"], "config_groups": groups}
with open(sys.argv[1] + "/config.json", "w") as file:
    json.dump({**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float32",
               "quantization_config": settings}, file)

def right(part, **given):
    loaded = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, **given)
    with torch.no_grad():
        loaded(torch.arange(10)[None])  # the first forward pass unpacks what is still packed
    found = {n: loaded.get_submodule(n).weight for n in wanted if part in n}
    assert all(found[n].shape == wanted[n].shape for n in found)
    return all(torch.allclose(found[n].float(), wanted[n], atol=1e-3) for n in found)

unpacked = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
seen = right("self_attn"), right("mlp"), right("self_attn", **unpacked), right("mlp", **unpacked)
print("as stored: attention %s, MLP %s; dequantize=True: attention %s, MLP %s" % seen)
if seen != (True, True, True, False):
    raise SystemExit("changed")
print("as described")
P
