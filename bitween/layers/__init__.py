"""Torch modules on packed bytes."""

from bitween.layers.embedding import QuantizedEmbedding
from bitween.layers.linear import QuantizedLinear, set_matmul_mode
from bitween.layers.packed import packed_layers

__all__ = ["QuantizedEmbedding", "QuantizedLinear", "packed_layers", "set_matmul_mode"]
