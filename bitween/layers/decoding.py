"""Stored matrices as numbers by plain torch operations: for devices that the core does not reach, and for tracing.

The same value as the core gives, (q - zero) * scale in fp32, rounded once to the dtype asked for. Bits are taken out by
division and remainder, not by shifts, which ONNX has for unsigned numbers only.
"""

from __future__ import annotations

import torch

from bitween.scheme import TILE, TURN, Scheme

__all__ = ["decode"]


def decode(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    scheme: Scheme,
    cols: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The matrix (rows, cols) in `dtype`, on the device of its parts (meta included)."""
    if scheme.coding == "trellis":
        return decode_trellis(codes, scales, zeros, scheme, cols, dtype)
    rows, n_groups = scales.shape
    q = unpack_ternary(codes, cols) if scheme.levels == 3 else unpack_dense(codes, cols, _bits(scheme))
    q = q.to(torch.float32)
    group = cols if scheme.group_size == -1 else scheme.group_size
    pad = n_groups * group - cols
    if pad:
        q = torch.nn.functional.pad(q, (0, pad))
    zero = scheme.zero if zeros is None else unpack_dense(zeros, n_groups, _bits(scheme)).to(torch.float32)[:, :, None]
    values = (q.reshape(rows, n_groups, group) - zero) * scales.to(torch.float32)[:, :, None]
    return values.reshape(rows, n_groups * group)[:, :cols].to(dtype)


def _bits(scheme: Scheme) -> int:
    return (scheme.levels - 1).bit_length()


def unpack_dense(packed: torch.Tensor, n: int, bits: int) -> torch.Tensor:
    """Codes int32 (rows, n): code i takes bits i*bits .. i*bits+bits-1 of its row, least significant first."""
    start = torch.arange(n, device=packed.device) * bits
    first = start // 8
    wide = torch.nn.functional.pad(packed, (0, 1)).to(torch.int32)  # a code may reach into the next byte
    window = wide[:, first] + wide[:, first + 1] * 256
    below = torch.pow(2, start % 8).to(torch.int32)
    return torch.div(window, below, rounding_mode="floor") % (1 << bits)


def unpack_ternary(packed: torch.Tensor, n: int) -> torch.Tensor:
    """Codes int32 (rows, n), five a byte, the first one the least significant digit in base 3."""
    place = torch.arange(n, device=packed.device)
    power = torch.tensor([1, 3, 9, 27, 81], dtype=torch.int32, device=packed.device)[place % 5]
    return torch.div(packed.to(torch.int32)[:, place // 5], power, rounding_mode="floor") % 3


def _hash_constants(width: int) -> tuple[int, int]:
    """Multiplier and addend of the hash that makes a state a value, as in csrc/core/codec/trellis.h."""
    return (0x83DCD12D, 0) if width == 16 else (34038481, 76625530)


def decode_trellis(
    codes: torch.Tensor, scales: torch.Tensor, rates: torch.Tensor, scheme: Scheme, cols: int, dtype: torch.dtype
) -> torch.Tensor:
    """Weights of trellis tiles: the window of `width` bits that ends with a weight's own bits is hashed."""
    down, rows = codes.shape[0], scales.shape[0]
    width = scheme.width
    multiplier, addend = _hash_constants(width)
    bits = (codes[..., None] >> torch.arange(7, -1, -1, device=codes.device, dtype=torch.uint8) & 1).reshape(down, -1)
    weights = torch.empty(down, len(rates), TILE, TILE, device=codes.device)  # tile, tile, column, row
    sizes = [TILE * TILE * rate for rate in rates.tolist()]
    starts = [sum(sizes[:t]) for t in range(len(sizes))]
    place = 2 ** torch.arange(width - 1, -1, -1, device=codes.device)
    for rate in sorted({size // (TILE * TILE) for size in sizes}):
        tiles = [t for t, size in enumerate(sizes) if size == rate * TILE * TILE]
        ends = torch.arange(1, TILE * TILE + 1, device=codes.device) * rate
        window = (ends[:, None] - width + torch.arange(width, device=codes.device)) % (rate * TILE * TILE)
        first = torch.tensor([starts[t] for t in tiles], device=codes.device)
        state = (bits[:, first[:, None, None] + window].to(torch.int64) * place).sum(-1)
        hashed = state * multiplier + addend
        total = sum(hashed >> shift & 255 for shift in (0, 8, 16, 24)) - 510
        weights[:, tiles] = total.reshape(down, len(tiles), TILE, TILE).to(torch.float32)
    if scheme.turned:
        weights = weights.flatten(2)[..., _turned_order(codes.device)].unflatten(2, (TILE, TILE))
    matrix = weights.permute(0, 3, 1, 2).reshape(down * TILE, len(rates) * TILE)[:rows, :cols]
    if scheme.turned:
        turn, signs = _turn(codes.device)
        blocks = matrix.reshape(rows // TURN, TURN, cols // TURN, TURN)
        matrix = torch.einsum("ij,ajbk,kl->aibl", turn, blocks, turn) * signs[:, None, None] * signs / TURN
        matrix = matrix.reshape(rows, cols)
    return (matrix * (scales.to(torch.float32) / 128)).to(dtype)


def _turned_order(device: torch.device) -> torch.Tensor:
    """Of each weight of a tile, column by column, its place in a turned tile's sequence (csrc/core/codec/trellis.h)."""
    i = torch.arange(TILE * TILE, device=device)
    column = (i & 1) | (i >> 2 & 6) | (i << 2 & 8)
    row = i >> 5 | (i << 1 & 8)
    return torch.argsort(TILE * column + row)


def _turn(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The Hadamard matrix (128, 128) of entries 1 and -1, and the signs (128,) of rows and columns."""
    i = torch.arange(TURN, device=device)

    def parity(x: torch.Tensor) -> torch.Tensor:
        return sum(x >> shift & 1 for shift in range(7)) % 2

    turn, signs = 1 - 2 * parity(i[:, None] & i), 1 - 2 * parity(i & i >> 1 & 0x15)
    return turn.to(torch.float32), signs.to(torch.float32)
