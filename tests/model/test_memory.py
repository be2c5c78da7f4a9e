"""What the process holds."""

import os
import subprocess
import sys

import pytest
import torch

from bitween import Bitween
from bitween.model.memory import analyze_memory, model_bytes, resident_bytes
from tests import tiny_models

_CUT_UP = """
import numpy as np
from bitween.model.memory import resident_bytes, return_freed_memory
many = [np.ones(1 << 17) for _ in range(300)]  # 1 MiB each
kept = many[-1]
del many
before = resident_bytes()
return_freed_memory()
print(before - resident_bytes())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or resident_bytes() is None, reason="glibc's allocator")
def test_freed_memory_goes_back_to_the_system():
    heap = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    done = subprocess.run([sys.executable, "-c", _CUT_UP], env=heap, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 250 << 20


@pytest.mark.parametrize("embeddings", [False, True])
def test_a_head_that_repeats_the_embedding_is_counted_and_quantized_once(embeddings):
    tied = tiny_models.make("llama", tie_word_embeddings=True)
    apart = tiny_models.make("llama", tie_word_embeddings=False)
    apart.load_state_dict({**tied.state_dict(), "lm_head.weight": tied.lm_head.weight.detach().clone()})
    assert apart.lm_head.weight.data_ptr() != apart.model.embed_tokens.weight.data_ptr()
    assert model_bytes(apart) == model_bytes(tied)
    made = [Bitween(model, embeddings=embeddings) for model in (apart, tied)]
    one, other = (quantizer.quantize() for quantizer in made)
    ids = tiny_models.tokens()
    assert torch.equal(tiny_models.logits(one, ids), tiny_models.logits(other, ids))
    assert made[0].get_memory_analysis().by_layer == made[1].get_memory_analysis().by_layer
    assert made[0].get_memory_analysis().original_total == made[1].get_memory_analysis().original_total
    assert one.config.tie_word_embeddings
    assert not apart.config.tie_word_embeddings
    with torch.no_grad():
        apart.lm_head.weight[3, 5] += 1
    assert model_bytes(apart) == model_bytes(tied) + apart.lm_head.weight.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_models_are_counted_in_one_dtype(dtype):
    """`evaluate` loads the original in another dtype than the run that made the candidate."""
    model = tiny_models.make("llama", dtype=dtype)
    quantizer = Bitween(model)
    made = quantizer.quantize()
    told = quantizer.get_memory_analysis()
    for other in (torch.float32, torch.bfloat16):
        again = analyze_memory(made, tiny_models.make("llama", dtype=other))
        assert again.original_by_layer.keys() == told.original_by_layer.keys()
        assert again.by_layer == told.by_layer
        heavy = {n: b for n, b in again.original_by_layer.items() if "rotary" not in n}
        assert heavy == {n: b for n, b in told.original_by_layer.items() if "rotary" not in n}
    assert told.dtype == str(dtype).removeprefix("torch.")
    assert f"plain numbers in {told.dtype}" in str(told)
