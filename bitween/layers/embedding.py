"""QuantizedEmbedding: a lookup table whose rows are the packed bytes and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bitween.functional import quantize
from bitween.layers.decoding import decode
from bitween.layers.packed import Packed, by_torch_alone, empty_stored
from bitween.quantized_tensor import QuantizedTensor
from bitween.scheme import Scheme

__all__ = ["QuantizedEmbedding"]


class QuantizedEmbedding(Packed):
    """A lookup table with stored rows.

    Parameters
    ----------
    stored : QuantizedTensor
        The table, (num_embeddings, embedding_dim).
    dtype : torch.dtype
        Of the output; follows `module.to(dtype)`.
    padding_idx : int, optional
        Kept as a mark only.
    """

    def __init__(
        self, stored: QuantizedTensor, dtype: torch.dtype = torch.float32, padding_idx: int | None = None
    ) -> None:
        super().__init__(stored)
        self.num_embeddings, self.embedding_dim = self._shape
        self.padding_idx = padding_idx
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the output."""
        return self._like.dtype

    @classmethod
    def from_quantized(
        cls, stored: QuantizedTensor, dtype: torch.dtype = torch.float32, padding_idx: int | None = None
    ) -> QuantizedEmbedding:
        """A table on the memory of `stored`."""
        return cls(stored, dtype, padding_idx)

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, scheme: Scheme, method: str = "rtn", **options: Any
    ) -> QuantizedEmbedding:
        """Quantize an nn.Embedding; `options` go to `bitween.quantize`."""
        if embedding.max_norm is not None:
            raise ValueError(f"embedding: expected max_norm=None; got {embedding.max_norm}")
        weight = embedding.weight.detach()
        stored = quantize(weight.cpu(), scheme, method=method, **options)
        table = cls(stored, weight.dtype, embedding.padding_idx).to(weight.device)
        return table.train(embedding.training)

    @classmethod
    def empty(
        cls,
        num_embeddings: int,
        embedding_dim: int,
        scheme: Scheme,
        dtype: torch.dtype = torch.float32,
        padding_idx: int | None = None,
        device: Any = None,
    ) -> QuantizedEmbedding:
        """A table of zero codes, to be filled by `load_state_dict`."""
        return cls(empty_stored(num_embeddings, embedding_dim, scheme, device), dtype, padding_idx)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        flat = ids.reshape(-1).to(torch.int64)
        if not by_torch_alone(ids):
            rows = self.quantized.dequantize(self.dtype, rows=flat)
        else:
            zeros = None if self.zeros is None else self.zeros[flat]
            rows = decode(self.codes[flat], self.scales[flat], zeros, self.scheme, self.embedding_dim, self.dtype)
        return rows.reshape(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme='{self.scheme}', dtype={self.dtype}"
