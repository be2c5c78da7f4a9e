"""Scheme: how one tensor is stored."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bitween import _core

__all__ = ["BITS", "COMMON_BITS", "GROUP_SIZES", "TRELLIS_BITS", "TRELLIS_WIDTHS", "Scheme"]

TERNARY = 1.58
BITS: tuple[float, ...] = (1, TERNARY, 2, 3, 4, 5, 6, 8)
COMMON_BITS = (2, 3, 4, 5, 6, 8)  # that other projects' formats hold too, in the same stream of bits
GROUP_SIZES: tuple[int, ...] = (16, 32, 64, 128, -1)
TRELLIS_BITS: tuple[float, ...] = (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5)
TRELLIS_WIDTHS = range(10, 17)
TILE = 16  # rows and columns of weights that one trellis path codes
TURN = 128  # rows and columns of a Hadamard transform of a turned trellis
WIDTH = 12  # bits of a trellis state, unless more effort is asked for


def can_turn(shape: tuple[int, int]) -> bool:
    """Whether a matrix has whole blocks of 128 rows and columns, as a turned trellis wants them."""
    return shape[0] % TURN == 0 and shape[1] % TURN == 0


@dataclass(frozen=True, order=True)
class Scheme:
    """How a matrix is stored: bits per code, columns per group, symmetric or not.

    Parameters
    ----------
    bits : 1, 1.58 (ternary; "ternary" is accepted), 2, 3, 4, 5, 6 or 8
    group_size : 16, 32, 64, 128, or -1 for a whole row; the last group of a row may be shorter
    symmetric : True stores no zero points; the levels lie around 0
    coding : "grid", levels at equal distances, or "trellis"; `Scheme.trellis` makes the latter
    width : bits of a trellis state; 0 for a grid
    turned : a trellis stored between two Hadamard transforms; see `Scheme.trellis`

    Raises
    ------
    TypeError, ValueError
        naming the argument, what was expected and what came.
    """

    bits: float
    group_size: int = 64
    symmetric: bool = False
    coding: str = "grid"
    width: int = 0
    turned: bool = False

    def __post_init__(self) -> None:
        if self.coding == "trellis":
            self._check_trellis()
            return
        if self.coding != "grid" or self.width != 0 or self.turned is not False:
            found = f"{self.coding!r}, {self.width!r}, {self.turned!r}"
            raise ValueError(f"coding: expected 'grid' with width 0 and turned False, or 'trellis'; got {found}")
        bits = TERNARY if self.bits == "ternary" else self.bits
        if isinstance(bits, bool) or not isinstance(bits, (int, float)):
            raise TypeError(f"bits: expected a number or 'ternary'; got {self.bits!r}")
        if bits not in BITS:
            raise ValueError(f"bits: expected one of {', '.join(map(str, BITS))}; got {self.bits!r}")
        if bits != TERNARY and not isinstance(bits, int):
            raise TypeError(f"bits: expected an integer or 1.58; got {self.bits!r}")
        if isinstance(self.group_size, bool) or not hasattr(self.group_size, "__index__"):
            raise TypeError(f"group_size: expected an integer; got {self.group_size!r}")
        if self.group_size not in GROUP_SIZES:
            choices = ", ".join(map(str, GROUP_SIZES))
            raise ValueError(f"group_size: expected one of {choices}; got {self.group_size}")
        if not isinstance(self.symmetric, bool):
            raise TypeError(f"symmetric: expected True or False; got {self.symmetric!r}")
        object.__setattr__(self, "bits", bits)
        object.__setattr__(self, "group_size", int(self.group_size))

    @classmethod
    def trellis(cls, bits: float, width: int = WIDTH, turned: bool = False) -> Scheme:
        """Trellis-coded weights (QTIP, arXiv 2406.11235): the last `width` bits of a stream are a value by themselves.

        Tiles of 16 x 16 weights are coded together, with one scale a row. At equal bits the squared error is about
        .6 of a grid's.

        Parameters
        ----------
        bits : 1 to 5 in steps of one half; half steps store the more costly half of the column tiles with one bit more
        width : 10 to 16, bits of a state; more lose a little less and take longer to quantize
        turned : stored between Hadamard transforms of 128 rows and 128 columns, which even out weights far from the
            others, and in the order of EXL3's tiles; only with width 16, whole bits, and rows and columns that are
            multiples of 128
        """
        return cls(bits, -1, True, "trellis", width, turned)

    def _check_trellis(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, (int, float)):
            raise TypeError(f"bits: expected a number; got {self.bits!r}")
        if self.bits not in TRELLIS_BITS:
            raise ValueError(
                f"bits: expected one of {', '.join(map(str, TRELLIS_BITS))} for a trellis; got {self.bits!r}"
            )
        if isinstance(self.width, bool) or not hasattr(self.width, "__index__"):
            raise TypeError(f"width: expected an integer; got {self.width!r}")
        if self.width not in TRELLIS_WIDTHS:
            raise ValueError(f"width: expected 10 to 16 bits of a trellis state; got {self.width}")
        if self.group_size != -1 or self.symmetric is not True:
            raise ValueError("group_size, symmetric: expected -1 and True for a trellis, which has one scale a row")
        object.__setattr__(self, "bits", int(self.bits) if float(self.bits).is_integer() else float(self.bits))
        if not isinstance(self.turned, bool):
            raise TypeError(f"turned: expected True or False; got {self.turned!r}")
        if self.turned and (self.width != TRELLIS_WIDTHS[-1] or isinstance(self.bits, float)):
            raise ValueError(
                f"turned: expected False, or True with whole bits and a width of {TRELLIS_WIDTHS[-1]}; got True with "
                f"{self.bits:g} bits and width {self.width}"
            )

    @property
    def levels(self) -> int:
        """Number of code values: 2, 3, 4, 8, 16, 32, 64 or 256; 0 for a trellis, which has no fixed levels."""
        if self.coding == "trellis":
            return 0
        return 3 if self.bits == TERNARY else 1 << int(self.bits)

    @property
    def zero(self) -> float:
        """The zero point of a symmetric scheme, in codes."""
        return 0.5 if self.levels == 2 else float(self.levels // 2)

    @property
    def rows_together(self) -> int:
        """Rows that are stored together: a matrix can be split at multiples of so many."""
        return TURN if self.turned else TILE if self.coding == "trellis" else 1

    @property
    def key(self) -> tuple[int, int, bool]:
        """(levels, group_size, symmetric), as the core takes it."""
        if self.coding == "trellis":
            raise ValueError(f"scheme: expected a grid of levels; got {self}")
        return self.levels, self.group_size, self.symmetric

    def layout(self, rows: int, cols: int) -> dict[str, int]:
        """Exact sizes of a stored (rows, cols) matrix: row_bytes, n_groups, row_zero_bytes, n_bytes.

        Of a trellis `row_bytes` are those of 16 rows, and `row_zero_bytes` the rates of the column tiles.
        """
        if self.turned and not can_turn((rows, cols)):
            raise ValueError(f"shape: expected multiples of {TURN} for {self}; got {rows} x {cols}")
        if self.coding == "trellis":
            down, across, half = -(-rows // TILE), -(-cols // TILE), round(2 * self.bits)
            row_bytes = 2 * TILE * (half // 2 * across + half % 2 * ((across + 1) // 2))
            n_bytes = down * row_bytes + 2 * rows + across
            return {"row_bytes": row_bytes, "n_groups": 1, "row_zero_bytes": across, "n_bytes": n_bytes}
        return _core.layout(self.key, rows, cols)

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of a stored (rows, cols) matrix: codes, scales and zeros."""
        return self.layout(rows, cols)["n_bytes"]

    def bits_per_weight(self, rows: int, cols: int) -> float:
        """8 * nbytes / (rows * cols)."""
        return 8 * self.nbytes(rows, cols) / (rows * cols)

    def __str__(self) -> str:
        if self.coding == "trellis":
            return f"{self.bits:g}b trellis L{self.width}{' turned' if self.turned else ''}"
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        return f"{self.bits:g}b {group} {'sym' if self.symmetric else 'asym'}"

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """The scheme that `str(scheme)` wrote, as in "4b g64 sym", "3b row asym" or "2.5b trellis L12"."""
        if match := re.fullmatch(r"\s*([\d.]+)b\s+trellis\s+L(\d+)(\s+turned)?\s*", text):
            return cls.trellis(float(match[1]), int(match[2]), bool(match[3]))
        match = re.fullmatch(r"\s*([\d.]+)b\s+(?:g(\d+)|row)\s+(sym|asym)\s*", text)
        if not match:
            raise ValueError(f'scheme: expected a text like "4b g64 sym"; got {text!r}')
        bits = float(match[1])
        return cls(int(bits) if bits.is_integer() else bits, int(match[2] or -1), match[3] == "sym")
