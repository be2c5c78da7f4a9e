"""LoRA adapters on a quantized model: peft's own, told that packed layers are linear layers.

    from peft import LoraConfig, PeftModel, get_peft_model
    model = get_peft_model(quantized, LoraConfig(r=8, target_modules="all-linear"))
    model.save_pretrained("adapter")                       # the adapters alone
    model = PeftModel.from_pretrained(quantized, "adapter")

Packed weights stay frozen; gradients flow through them to the adapters (arXiv 2305.14314 does so with 4 bits). Where
bitween is imported, peft's LoraConfig knows packed layers whoever makes it, also when it is read from a directory.
"""

from __future__ import annotations

from functools import wraps
from importlib import import_module
from typing import Any

from peft.tuners.lora import Linear, LoraConfig

from bitween.layers import QuantizedLinear

__all__ = ["PackedLora", "lora_config"]


class PackedLora(Linear):
    """peft's LoRA layer around a QuantizedLinear. The adapter stays apart: no packed weight can take it in."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """TypeError: codes cannot hold what an adapter learned."""
        raise TypeError(f"merge: expected a layer of plain numbers; got {self.get_base_layer()}")


def lora_config(**options: Any) -> LoraConfig:
    """peft's LoraConfig with these options. Kept for programs of before peft knew packed layers by itself."""
    return LoraConfig(**options)


def _register() -> None:
    """Tell peft once: every LoraConfig has packed layers among its own, and "all-linear" names them too."""
    if getattr(LoraConfig, "_knows_packed_layers", False):
        return
    own = LoraConfig.__post_init__

    @wraps(own)
    def knowing(self: LoraConfig) -> None:
        own(self)
        self._register_custom_module({QuantizedLinear: PackedLora})  # peft's way in for layers of others

    LoraConfig.__post_init__ = knowing
    LoraConfig._knows_packed_layers = True
    utils = import_module("peft.tuners.tuners_utils")
    if hasattr(utils, "_maybe_include_all_linear_layers"):
        utils._maybe_include_all_linear_layers = _with_packed(utils._maybe_include_all_linear_layers)


def _with_packed(find: Any) -> Any:
    """peft looks for classes that it knows; what it finds, and the packed layers beside it but the head."""

    @wraps(find)
    def found(config: Any, model: Any) -> Any:
        wanted = getattr(config, "target_modules", None)
        everything = isinstance(wanted, str) and wanted.lower() == "all-linear"
        config = find(config, model)
        if everything:
            ends = getattr(model, "get_output_embeddings", lambda: None)()
            packed = {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear) and m is not ends}
            config.target_modules = set(config.target_modules) | packed
        return config

    return found


_register()
