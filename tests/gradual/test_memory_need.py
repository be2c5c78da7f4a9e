"""What a run is told to take, against what it takes: each in a process of its own, whose peak the kernel keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from bitween.gradual.plan import memory_need
from tests.conftest import TINY_MODEL

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads and resets /proc/self")

_RUN = """
import json, re, sys
from pathlib import Path
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from bitween.gradual import GradualQuantizer
from bitween.layers import tiles

place, tokenizer, sizes, options, products = *sys.argv[1:3], *map(json.loads, sys.argv[3:5]), sys.argv[5]
if products == "fp32":
    tiles.cpu_has_bf16 = lambda: False
torch.set_num_threads(1)
torch.manual_seed(0)
config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **sizes)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(place)
AutoTokenizer.from_pretrained(tokenizer).save_pretrained(place)

peaks = {}

def mark(stage):
    text = Path("/proc/self/status").read_text()
    peaks[stage] = max(peaks.get(stage, 0), int(re.search(r"VmHWM:\\s+(\\d+)", text)[1]) * 1024)
    Path("/proc/self/clear_refs").write_text("5")

class Marked(GradualQuantizer):
    def _timed(self, name, work):
        mark("before " + name)
        found = super()._timed(name, work)
        mark(name)
        return found

quantizer = Marked(
    place, None, 0.6, 0.5, evaluation_samples=8, domains=["prose"], stages=1, distillation_steps=0, certify=False,
    **options,
)
mark("opening")
quantizer.quantize()
mark("end")
opening, need = peaks.pop("opening"), quantizer.memory_need
told = {"predicted": need.total, "one_pass": need.one_pass, "need": vars(need)}
print(json.dumps({"peak": max(peaks.values()), "peaks": peaks, "opening": opening, **told}))
"""

HEAD = {"hidden_size": 512, "intermediate_size": 512, "vocab_size": 49152, "tie_word_embeddings": True}
WIDE = {"hidden_size": 256, "intermediate_size": 2560, "vocab_size": 2048}


def measured(place, sizes, products="auto", **options) -> dict:
    """{"peak", "predicted": bytes, "one_pass"} of a run on a random Llama of two blocks."""
    arguments = [str(place), str(TINY_MODEL), json.dumps(sizes), json.dumps(options), products]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", _RUN, *arguments], env=alone, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (HEAD, {"calibration_samples": 4}),  # the head and its logits take most
        (WIDE, {"calibration_samples": 32, "importance": False}),  # activations of all windows
        (WIDE, {"calibration_samples": 32, "importance": False, "products": "fp32"}),
    ],
    ids=["head", "activations", "activations in float32"],
)
def test_the_memory_told_is_within_a_tenth_of_the_peak(tmp_path, sizes, options):
    found = measured(tmp_path, sizes, **options)
    assert found["one_pass"]
    assert found["predicted"] == pytest.approx(found["peak"], rel=0.1), found


def test_a_limit_is_kept(tmp_path):
    """Blocks work through the text in batches, and the peak is told of these."""
    limit = 900 << 20
    found = measured(tmp_path, WIDE, max_memory=limit, calibration_samples=32, importance=False)
    assert not found["one_pass"], found
    assert found["peak"] <= limit, found
    assert found["predicted"] == pytest.approx(found["peak"], rel=0.1), found


def test_what_large_models_take_is_told_from_their_shapes(monkeypatch):
    """Of Llama's at 1, 8 and 70 billion parameters; beyond what the process has, it follows the widest matrices."""
    monkeypatch.setattr(memory_need, "resident_bytes", lambda: 420 << 20)
    told = {}
    for name, (blocks, width, inner, words) in {
        "1B": (16, 2048, 5632, 49152),
        "8B": (32, 4096, 14336, 128256),
        "70B": (80, 8192, 28672, 128256),
    }.items():
        shapes = [(width, width)] * 2 + [(1024, width)] * 2 + [(inner, width)] * 2 + [(width, inner)]
        block = SimpleNamespace(layers=[SimpleNamespace(shape=shape) for shape in shapes])
        end = SimpleNamespace(shape=(words, width))
        layers = [end, end, *block.layers * blocks]
        layout = SimpleNamespace(blocks=[block] * blocks, embedding=end, head=end, layers=layers)
        sizes = {"packed": 0, "delivered": 0, "calibration": 100, "evaluation": 200, "length": 512}
        told[name] = memory_need.need_within(layout, copied=True, **sizes).total / 2**30
    assert told["1B"] < 2.5
    assert told["8B"] < 12
    assert told["1B"] < told["8B"] < told["70B"] < 32
