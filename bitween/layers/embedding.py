"""QuantizedEmbedding: a lookup table whose rows are the packed bytes and nothing else."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import nn

from bitween.functional import quantize
from bitween.layers.packed import Borrowed, Packed, empty_stored
from bitween.quantized_tensor import QuantizedTensor
from bitween.scheme import Scheme

__all__ = ["QuantizedEmbedding", "is_lookup", "lookup_scale", "stored_scale"]

_PROBE_ROWS = 8


def lookup_scale(embedding: nn.Embedding) -> float | None:
    """The number by which an embedding multiplies the rows that it looks up; None where it does anything else.

    Found by running the module beside a plain lookup, since families name and keep their scale each in its own way.
    The answer does not hang on the values of the table, which may be zero or on the meta device.
    """
    if type(embedding).forward is nn.Embedding.forward:
        return 1.0
    if any(t.is_meta for t in (*embedding.parameters(), *embedding.buffers())):
        return None
    return _scale_of(embedding)


def is_lookup(embedding: nn.Embedding) -> bool:
    """Whether an embedding does no more than look rows up and multiply them by a number, on the meta device too."""
    return type(embedding).forward is nn.Embedding.forward or _scale_of(embedding) is not None


def _scale_of(embedding: nn.Embedding) -> float | None:
    if not embedding.num_embeddings:
        return None
    rows, width = min(_PROBE_ROWS, embedding.num_embeddings), embedding.embedding_dim
    device = "cpu" if embedding.weight.is_meta else embedding.weight.device
    table = torch.linspace(0.5, 1.5, rows * width, device=device).reshape(rows, width)
    probe = copy.copy(embedding)  # shares everything but the table, and what has no values
    probe._parameters = {**embedding._parameters, "weight": nn.Parameter(table.to(embedding.weight.dtype), False)}
    probe._buffers = {
        name: torch.full_like(buffer, 2, device=device) if buffer is not None and buffer.is_meta else buffer
        for name, buffer in embedding._buffers.items()
    }
    ids = torch.arange(rows, device=device)[None]
    try:
        with torch.no_grad(), torch.device(device):  # loaders lay models out with "meta" as the default
            got = probe(ids)
    except Exception:  # a module of another signature, as positions that count the mask: not a lookup
        return None
    plain = probe.weight[ids]
    if not isinstance(got, torch.Tensor) or got.shape != plain.shape or got.dtype != plain.dtype:
        return None
    scale = (got.double() / plain.double()).mean().item()
    close = torch.allclose(got.double(), plain.double() * scale, rtol=4 * torch.finfo(got.dtype).eps, atol=0)
    return float(np.float32(scale)) if close and math.isfinite(scale) and scale else None


def stored_scale(embedding: nn.Embedding) -> float | None:
    """`lookup_scale` where a packed table is to hold it, else None.

    A class with arithmetic of its own always has one, though it be 1: whoever lays the model out anew can't ask a
    table without memory for its number, and expects one in the file by the class alone.
    """
    return None if type(embedding).forward is nn.Embedding.forward else lookup_scale(embedding)


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
    scale : float, optional
        Rows are multiplied by it, as Gemma's embeddings do; a head that shares the codes is not. It is saved with
        the codes, as `multiplier`.
    """

    multiplier: torch.Tensor | None

    def __init__(
        self,
        stored: QuantizedTensor,
        dtype: torch.dtype = torch.float32,
        padding_idx: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__(stored, dtype)
        self.num_embeddings, self.embedding_dim = self._shape
        self.padding_idx = padding_idx
        self._hold_scale(scale)

    def _hold_scale(self, scale: float | None) -> None:
        device = self.codes.device
        number = None if scale is None else torch.tensor(scale, dtype=torch.float32, device=device)
        self.register_buffer("multiplier", number)

    @classmethod
    def from_quantized(
        cls,
        stored: QuantizedTensor,
        dtype: torch.dtype = torch.float32,
        padding_idx: int | None = None,
        scale: float | None = None,
    ) -> QuantizedEmbedding:
        """A table on the memory of `stored`."""
        return cls(stored, dtype, padding_idx, scale)

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, scheme: Scheme, method: str = "rtn", **options: Any
    ) -> QuantizedEmbedding:
        """Quantize an nn.Embedding, a scaled one too; `options` go to `bitween.quantize`."""
        if embedding.max_norm is not None:
            raise ValueError(f"embedding: expected max_norm=None; got {embedding.max_norm}")
        if lookup_scale(embedding) is None:
            kind = type(embedding).__name__
            raise ValueError(f"embedding: expected rows looked up and multiplied by a number at most; got {kind}")
        weight = embedding.weight.detach()
        stored = quantize(weight.cpu(), scheme, method=method, **options)
        table = cls(stored, weight.dtype, embedding.padding_idx, stored_scale(embedding)).to(weight.device)
        return table.train(embedding.training)

    @staticmethod
    def tied_to(embedding: QuantizedEmbedding) -> QuantizedEmbedding:
        """A second table on the memory of a first one, as an encoder and a decoder have: `state_dict` holds it once."""
        return _TiedEmbedding(embedding)

    @classmethod
    def empty(
        cls,
        num_embeddings: int,
        embedding_dim: int,
        scheme: Scheme,
        dtype: torch.dtype = torch.float32,
        padding_idx: int | None = None,
        device: Any = None,
        scale: float | None = None,
    ) -> QuantizedEmbedding:
        """A table of zero codes, to be filled by `load_state_dict`; any `scale` makes room for one."""
        return cls(empty_stored(num_embeddings, embedding_dim, scheme, device), dtype, padding_idx, scale)

    @classmethod
    def empty_like(cls, module: nn.Module, scheme: Scheme) -> QuantizedEmbedding | None:
        """An empty table for an nn.Embedding that looks up and scales at most; None for any other module."""
        if not isinstance(module, nn.Embedding) or not is_lookup(module):
            return None
        # One with arithmetic of its own keeps a number in the checkpoint; a skeleton on meta cannot be asked for it.
        scale = None if type(module).forward is nn.Embedding.forward else 0.0
        shape, weight = (module.num_embeddings, module.embedding_dim), module.weight
        return cls.empty(*shape, scheme, weight.dtype, module.padding_idx, weight.device, scale)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.rows(ids, self.dtype)
        return rows if self.multiplier is None else rows * self.multiplier

    def extra_repr(self) -> str:
        scale = "" if self.multiplier is None else f", scale={float(self.multiplier):g}"
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme='{self.scheme}', dtype={self.dtype}{scale}"


class _TiedEmbedding(Borrowed, QuantizedEmbedding):
    """A lookup table that reads its rows from another, which owns them."""

    def __init__(self, owner: QuantizedEmbedding) -> None:
        self._borrow(owner)
        super().__init__(owner.quantized, owner.dtype, owner.padding_idx)

    def _hold_scale(self, scale: float | None) -> None:
        """Holds none either."""

    @property
    def multiplier(self) -> torch.Tensor | None:
        return self._owner.multiplier
