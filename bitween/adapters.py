"""LoRA adapters on a quantized model: peft's own, told that packed layers are linear layers.

    from peft import get_peft_model
    model = get_peft_model(quantized, lora_config(r=8, target_modules=["q_proj", "v_proj"]))

Packed weights stay frozen; gradients flow through them to the adapters (arXiv 2305.14314 does so with 4 bits).
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora import Linear

from bitween.layers import QuantizedLinear

__all__ = ["PackedLora", "lora_config"]


class PackedLora(Linear):
    """peft's LoRA layer around a QuantizedLinear. The adapter stays apart: no packed weight can take it in."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """TypeError: codes cannot hold what an adapter learned."""
        raise TypeError(f"merge: expected a layer of plain numbers; got {self.get_base_layer()}")


def lora_config(**options: Any) -> LoraConfig:
    """peft's LoraConfig with these options, for models with packed layers."""
    config = LoraConfig(**options)
    config._register_custom_module({QuantizedLinear: PackedLora})  # peft's way in for layers of others
    return config
