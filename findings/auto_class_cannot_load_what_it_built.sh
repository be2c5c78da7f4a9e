#!/bin/sh
# Expected: what AutoModelForCausalLM builds from a configuration and save_pretrained writes, AutoModelForCausalLM loads.
# Seen, transformers 5.24.0 with torch 2.13.0: from an Emu3 or Mllama configuration the class takes the text part and
# builds the text model. Saved, its config.json carries the text part's own model_type, which the Auto class does not
# list: from_pretrained raises "Unrecognized configuration class". The class named in `architectures` loads it.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
pip="$work/env/bin/python -m pip -q --disable-pip-version-check install"
cpu=https://download.pytorch.org/whl/cpu
$pip torch==2.13.0+cpu 2>/dev/null || $pip torch==2.13.0+cpu --extra-index-url $cpu
$pip transformers==5.24.0
"$work/env/bin/python" - "$work" <<'P' 2>/dev/null
import json, sys
import transformers
from transformers import AutoModelForCausalLM, Emu3Config, Emu3TextConfig

small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=64, pad_token_id=0)
model = AutoModelForCausalLM.from_config(Emu3Config(text_config=Emu3TextConfig(**small).to_dict()))
folder = sys.argv[1] + "/model"
model.save_pretrained(folder)
config = json.load(open(folder + "/config.json"))
print(config["architectures"], config["model_type"])
assert config["architectures"] == ["Emu3ForCausalLM"] and config["model_type"] == "emu3_text_model", config["model_type"]
try:
    AutoModelForCausalLM.from_pretrained(folder)
    raise SystemExit("loads now")
except ValueError as error:
    print(str(error)[:90])
    assert "Unrecognized configuration class" in str(error)
named = getattr(transformers, config["architectures"][0])
assert type(named.from_pretrained(folder)) is type(model)
print("as described")
P
