"""Rows added to a packed matrix or taken from it, in place: a vocabulary that grows by a few tokens or shrinks.

The rows that stay keep their very bytes. New ones are rounded by the matrix's own scheme, and are as packed as the
others: they can be looked up and multiplied, not trained.
"""

from __future__ import annotations

import torch
from torch import nn

from bitween.functional import quantize
from bitween.layers.packed import MOVES, Borrowed, Packed
from bitween.quantized_tensor import QuantizedTensor

__all__ = ["can_resize", "owner_of", "resize"]

_ROWS = 4096  # unpacked at once for their mean


def owner_of(module: Packed) -> Packed:
    """The layer that holds the bytes: the module itself, or the one that it borrows from."""
    while isinstance(module, Borrowed):
        module = module._owner
    return module


def can_resize(module: Packed) -> bool:
    """Whether each row is stored by itself; those of a trellis stand in tiles of 16."""
    return module.scheme.coding != "trellis"


def resize(model: nn.Module, module: Packed, rows: int, spread: float | None = None) -> None:
    """Give a packed matrix, and all layers of `model` on its bytes, another number of rows.

    Parameters
    ----------
    module : an embedding, a head, or another layer; the owner of its bytes is changed
    rows : how many there are to be
    spread : new rows are drawn with this standard deviation around 0; default the mean of the rows that there are

    Raises
    ------
    ValueError
        No rows, or rows that are stored in tiles.
    """
    if rows < 1:
        raise ValueError(f"rows: expected at least 1; got {rows}")
    if not can_resize(module):
        raise ValueError(f"module: expected rows stored one by one; got {module.scheme}")
    owner = owner_of(module)
    had, cols = owner._shape
    stored = owner.quantized
    parts = [stored.codes, stored.scales, stored.zeros]
    kept = [None if part is None else part[:rows].clone() for part in parts]
    if rows > had:
        new = _new_rows(owner, rows - had, spread)
        kept = [None if a is None else torch.cat([a, b.to(a.device)]) for a, b in zip(kept, new, strict=True)]
    owner._hold(*kept)
    for user in {owner, *model.modules()}:
        if isinstance(user, Packed) and owner_of(user) is owner:
            _tell(user, rows, cols)
    MOVES[0] += 1


def _new_rows(owner: Packed, count: int, spread: float | None) -> list[torch.Tensor | None]:
    rows, cols = owner._shape
    if spread is None:
        total = torch.zeros(cols, dtype=torch.float64)
        for part in torch.arange(rows, device=owner.codes.device).split(_ROWS):
            total += owner.rows(part).double().sum(0).cpu()
        values = (total / rows).float().expand(count, cols)
    else:
        values = torch.randn(count, cols) * spread
    new: QuantizedTensor = quantize(values.contiguous(), owner.scheme)
    return [None if part is None else torch.as_tensor(part) for part in (new.codes, new.scales, new.zeros)]


def _tell(user: Packed, rows: int, cols: int) -> None:
    """Sizes as the module's kind names them; a bias takes its own mean for what is new."""
    user._shape = (rows, cols)
    for name in ("num_embeddings", "out_features"):
        if hasattr(user, name):
            setattr(user, name, rows)
    if (padding := getattr(user, "padding_idx", None)) is not None and padding >= rows:
        user.padding_idx = None
    bias = user._parameters.get("bias")
    if bias is not None:
        values = bias.detach()
        added = values.mean().expand(max(0, rows - len(values)))
        user.bias = nn.Parameter(torch.cat([values[:rows], added]), bias.requires_grad)
