"""Tiny quantized models and their steps both ways, for the tests of decoding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.cache_utils import DynamicCache

from bitween import Scheme, _core
from bitween.decode import attach, detach, path_of, stepping
from bitween.model.experts import unfolded
from tests import quantized_models, tiny_models

SCHEMES = [Scheme(4, 32), Scheme(8, 16, True), Scheme(3, -1), Scheme(1.58, 16)]
OWN = {
    "llama": {"head_dim": 24},  # not a whole number of vectors
    "arcee": {"hidden_act": "relu2", "mlp_bias": True},
    "cwm": {"sliding_window": 6},
    "ministral": {"head_dim": 8},
    "seed_oss": {"head_dim": 8},
    "mistral": {"sliding_window": 6},
    "phi3": {"sliding_window": 6},
    "gemma2": {"head_dim": 8, "sliding_window": 6, "attn_implementation": "eager"},
    "smollm3": {"no_rope_layer_interval": 2},
    "granite": {"residual_multiplier": 0.3, "embedding_multiplier": 2.0, "attention_multiplier": 0.2},
    "olmo3": {"sliding_window": 6},
    "mixtral": {"sliding_window": 6},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "head_dim": 8,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 8, "sliding_window": 6},
}
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")
ROUTERS = {"gpt_oss": "router"}
FAMILIES = (
    "arcee",
    "cwm",
    "llama",
    "mistral",
    "ministral",
    "qwen2",
    "qwen3",
    "seed_oss",
    "smollm3",
    "phi3",
    "granite",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "olmo3",
    *MIXTURES,
)


def make(family: str, dtype: torch.dtype = torch.float32, schemes: list | None = None, **config) -> torch.nn.Module:
    """A quantized model whose decoder may take its steps by the core."""
    model = tiny_models.make(family, dtype=dtype, **{**OWN.get(family, {}), **config})
    for module in model.modules():  # tables that from_pretrained keeps in float32 too
        for name, buffer in module._buffers.items():
            if buffer is not None and "inv_freq" in name:
                module._buffers[name] = buffer.float()
    return attach(quantized_models.quantize(unfolded(model), schemes or SCHEMES))


@contextmanager
def counted() -> Iterator[list[int]]:
    """How many steps the core takes meanwhile."""
    taken = [0]

    class Counting:
        def __getattr__(self, name):
            if name == "decode":
                taken[0] += 1
            return getattr(_core, name)

    stepping._core = Counting()
    try:
        yield taken
    finally:
        stepping._core = _core


def both_ways(model: torch.nn.Module, ids: torch.Tensor, steps: list[torch.Tensor], mask: torch.Tensor | None = None):
    """Logits of given steps after a prompt: by transformers, by the core, and how many the core took."""

    def run() -> torch.Tensor:
        cache, seen, logits = DynamicCache(config=model.config), mask, []
        with torch.no_grad():
            model(ids, attention_mask=seen, past_key_values=cache)
            for step in steps:
                if seen is not None:
                    seen = torch.cat([seen, torch.ones_like(step)], 1)
                logits.append(model(step, attention_mask=seen, past_key_values=cache).logits)
        return torch.cat(logits, 1)

    detach(model)
    theirs = run()
    attach(model)
    run()  # which is checked
    with counted() as taken:
        ours = run()
    assert path_of(model)["path"] == "core", path_of(model)
    return theirs.float(), ours.float(), taken[0]


def miss(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """Root mean square difference, relative."""
    return ((ours - theirs).pow(2).mean().sqrt() / theirs.pow(2).mean().sqrt()).item()


def typical_miss(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """The median over tokens: one whose choice of experts was close may have fallen to another by rounding."""
    return ((ours - theirs).pow(2).mean(-1) / theirs.pow(2).mean(-1)).median().sqrt().item()
