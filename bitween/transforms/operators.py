"""Invertible linear maps on the channels of a weight, applied in float64.

Each map M offers ``right(x)``, the product x M for rows x, and nothing else is ever needed: a layer whose
input becomes x M has its weight W replaced by W M (M orthogonal), and a layer whose output y becomes y M
has W replaced by Mᵀ W, which is (Wᵀ M)ᵀ.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

_LARGEST_FACTOR = 64


class Operator(Protocol):
    """A map on the last dimension."""

    def right(self, x: torch.Tensor) -> torch.Tensor:
        """x M for float64 rows x (n, width)."""
        ...


@dataclass(frozen=True, eq=False)
class Diagonal:
    """Multiply each channel by its own number: `factors` (width,)."""

    factors: torch.Tensor

    def right(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factors.to(x)


@dataclass(frozen=True, eq=False)
class Rotation:
    """Random signs, then a Kronecker product of small orthogonal matrices: `signs` (width,), `factors` of (n, n).

    A product of factors of at most 64 costs width x 128 multiplications per row where a dense matrix
    would cost width x width.
    """

    signs: torch.Tensor
    factors: tuple[torch.Tensor, ...]

    def right(self, x: torch.Tensor) -> torch.Tensor:
        y = (x * self.signs).reshape(-1, *(factor.shape[0] for factor in self.factors))
        for axis, factor in enumerate(self.factors, start=1):
            y = torch.tensordot(y, factor, dims=([axis], [0])).movedim(-1, axis)
        return y.reshape(x.shape)


@dataclass(frozen=True, eq=False)
class PerHead:
    """A matrix of its own for each run of channels: `matrices` (heads, size, size)."""

    matrices: torch.Tensor

    def right(self, x: torch.Tensor) -> torch.Tensor:
        heads, size, _ = self.matrices.shape
        return torch.einsum("nhi,hij->nhj", x.reshape(-1, heads, size), self.matrices).reshape(x.shape)


def orthogonal(size: int, generator: torch.Generator) -> torch.Tensor:
    """A uniformly random orthogonal matrix, float64: QR of a Gaussian, signs fixed so that it is unique."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def hadamard(size: int) -> torch.Tensor:
    """The orthogonal Hadamard matrix of Sylvester's construction, float64; `size` is a power of two."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"size: expected a power of two; got {size}")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def rotation(size: int, kind: str, generator: torch.Generator) -> Rotation:
    """A random rotation of `size` channels.

    "random" is a uniformly random orthogonal matrix. "hadamard" is random signs and a Hadamard matrix of
    the largest power of two that divides `size`, times a random orthogonal matrix for the odd rest
    (576 = 64 x 9), which spreads an outlier over all channels just as evenly and is much cheaper.
    """
    if kind == "random":
        return Rotation(torch.ones(size, dtype=torch.float64), (orthogonal(size, generator),))
    if kind != "hadamard":
        raise ValueError(f'rotation: expected "hadamard" or "random"; got {kind!r}')
    power = size & -size
    signs = 2.0 * torch.randint(2, (size,), generator=generator, dtype=torch.float64) - 1
    factors = [orthogonal(size // power, generator)] if power < size else []
    while power > 1:
        factor = min(power, _LARGEST_FACTOR)
        factors.append(hadamard(factor))
        power //= factor
    return Rotation(signs, tuple(factors) or (torch.ones(1, 1, dtype=torch.float64),))
