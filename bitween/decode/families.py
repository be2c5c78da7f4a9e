"""The families of decoders whose forward passes are known: transformers' class, and how its blocks differ."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

__all__ = ["FAMILIES", "Family", "family_of"]


@dataclass(frozen=True)
class Family:
    """How a family's blocks are put together.

    Attributes
    ----------
    norms : names of a block's norms before and after attention, before and after the MLP; None where there is none
    window : where a block's window stands: "block" its attention's `sliding_window`, "config" the config's for all,
        "none" nowhere
    ropes : whether each type of layer has a rotary table of its own
    caps : whether eager attention caps its logits by the attention's `attn_logit_softcapping`
    embedding_scale : attribute of the decoder by which embedded tokens are multiplied; None: by nothing
    residual_scale : attribute of a block by which each branch is multiplied; None: by nothing
    sinks : whether attention has a logit for each head, its `sinks`, that takes a share and gives nothing
    halves : whether rotary tables hold each frequency once
    router : attribute of a block's MLP that chooses experts; None: no block has any
    """

    norms: tuple[str | None, str | None, str | None, str | None] = (
        "input_layernorm",
        None,
        "post_attention_layernorm",
        None,
    )
    window: str = "block"
    ropes: bool = False
    caps: bool = False
    embedding_scale: str | None = None
    residual_scale: str | None = None
    sinks: bool = False
    halves: bool = False
    router: str | None = None


_AROUND = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_AFTER = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")

# Class of the decoder -> its family; the class has to be transformers' own.
FAMILIES = {
    "ArceeModel": Family(window="none"),
    "CwmModel": Family(),
    "LlamaModel": Family(window="none"),
    "MistralModel": Family(window="config"),
    "MinistralModel": Family(),
    "Qwen2Model": Family(),
    "Qwen3Model": Family(),
    "SeedOssModel": Family(window="none"),
    "SmolLM3Model": Family(),
    "Phi3Model": Family(window="config"),
    "GraniteModel": Family(window="none", embedding_scale="embedding_multiplier", residual_scale="residual_multiplier"),
    "GemmaModel": Family(window="none"),
    "Gemma2Model": Family(norms=_AROUND, caps=True),
    "Gemma3TextModel": Family(norms=_AROUND, ropes=True),
    "Olmo2Model": Family(norms=_AFTER, window="none"),
    "Olmo3Model": Family(norms=_AFTER, ropes=True),
    "MixtralModel": Family(window="config", router="gate"),
    "Qwen2MoeModel": Family(router="gate"),
    "Qwen3MoeModel": Family(window="config", router="gate"),
    "OlmoeModel": Family(window="none", router="gate"),
    "GptOssModel": Family(sinks=True, halves=True, router="router"),
}


def family_of(kind: type[nn.Module]) -> Family | None:
    """The family of a decoder's class, None for any class but transformers' own of a known name."""
    if not kind.__module__.startswith("transformers.models."):
        return None
    return FAMILIES.get(kind.__name__)
