"""Torch modules on packed bytes."""

from __future__ import annotations

from bitween._lazy import lazily

_PUBLIC = {
    "QuantizedEmbedding": "embedding",
    "QuantizedLinear": "linear",
    "packed_layers": "packed",
    "set_matmul_mode": "linear",
}

__all__ = list(_PUBLIC)
__getattr__, __dir__ = lazily(__name__, _PUBLIC)
