"""One legal call of every function of the core: what the boundary tests vary. A new function is one line in CALLS."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import numpy as np

from bitween import Scheme, _core

KEY = Scheme(3, 16).key
Arguments = dict[str, object]

# Functions that compute nothing worth releasing the GIL for.
INSTANT = {"decoder", "unchanged", "layout", "info", "set_isa", "set_num_threads", "get_num_threads", "borrow_threads"}


def floats(*shape: int) -> np.ndarray:
    return (np.random.default_rng(sum(shape)).standard_normal(shape) * 0.1).astype(np.float32)


def stored(rows: int, cols: int) -> Arguments:
    codes, scales, zeros = _core.quantize_rtn(floats(rows, cols), KEY)
    return {"codes": codes, "scales": scales, "zeros": zeros, "scheme": KEY, "cols": cols}


def encode(rows: int, cols: int) -> Arguments:
    s = stored(rows, cols)
    return {"weight": floats(rows, cols), "scales": s["scales"], "zeros": s["zeros"], "scheme": s["scheme"]}


def moments(cols: int) -> np.ndarray:
    x = floats(2 * cols, cols)
    return x.T @ x


def codes_of(rows: int, cols: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, (rows, cols), np.uint8)


def rounding(rows: int, cols: int) -> Arguments:
    groups = Scheme(3, 16).layout(rows, cols)["n_groups"]
    return {
        "weight": floats(rows, cols),
        "offset": floats(rows, cols),
        "low": -np.abs(floats(rows, groups)) - 0.1,
        "high": np.abs(floats(rows, groups)) + 0.1,
        "scheme": KEY,
    }


def tiles(rows: int, cols: int) -> Arguments:
    (codes, scales, rates), *_ = _core.quantize_trellis(floats(rows, cols), None, 2.0, 10)
    return {"codes": codes, "scales": scales, "rates": rates, "width": 10, "cols": cols}


def decoder(inner: int, hidden: int) -> Arguments:
    """Two heads of 16 that share keys, one block, two experts beside an MLP; never empty."""
    inner, hidden = max(inner, 1), max(hidden, 1)

    def packed(rows: int, cols: int) -> tuple:
        return ("packed", *stored(rows, cols).values(), floats(rows), 2)

    shapes = [(32, hidden), (16, hidden), (16, hidden), (hidden, 32), (inner, hidden), (inner, hidden), (hidden, inner)]
    gain = (1, 1e-6, floats(hidden))
    parts = tuple((i, 0, rows) for i, (rows, _) in enumerate(shapes))
    mixture = ((7, 0, 2), (7, 1, 1), (parts[4:], parts[4:]), 1, True, False, False, 0)
    return {
        "sizes": (hidden, 2, 1, 16, True, 0.25, 0.0, 1.0, 0, 0.0, 0.0, 0),
        "linears": (*(packed(*shape) for shape in shapes), ("plain", floats(2, hidden), None)),
        "blocks": ((parts, (gain, None, None, None, gain, None), 0, 0, 0, 0, mixture, floats(2)),),
        "final": gain,
    }


def step(inner: int, hidden: int) -> Arguments:
    hidden = max(hidden, 1)
    return {
        "decoder": _core.decoder(**decoder(inner, hidden)),
        "x": floats(1, 1, hidden),
        "out": floats(1, 1, hidden),
        "ropes": ((floats(1, 16), floats(1, 16), False),),
        "rooms": ((floats(1, 2, 1, 1, 8, 16), 0, 3, 3),),
        "padding": np.zeros(1, np.int64),
        "experts": np.ones(1, np.int64),
    }


# name: (rows, cols) -> keyword arguments
CALLS: dict[str, Callable[[int, int], Arguments]] = {
    "quantize_rtn": lambda r, c: {"weight": floats(r, c), "scheme": KEY},
    "quantize_clip": lambda r, c: {"weight": floats(r, c), "scheme": KEY, "importance": floats(r, c) ** 2},
    "quantize_gptq": lambda r, c: {"weight": floats(r, c), "hessian": moments(c), "scheme": KEY, "sweeps": 1},
    "align": lambda r, c: {
        "weight": floats(r, c),
        "hessian": moments(c),
        "cross": moments(c) + floats(c, c),
    },
    "train_forward": lambda r, c: {**rounding(r, c), "out": floats(r, c)},
    "train_backward": lambda r, c: {
        **rounding(r, c),
        "grad": floats(r, c),
        "into_offset": floats(r, c),
        "into_low": rounding(r, c)["low"],
        "into_high": rounding(r, c)["high"],
    },
    "search": lambda r, c: {
        "weight": floats(r, c),
        "schemes": (KEY, Scheme(8, -1, True).key),
        "importance": floats(r, c) ** 2,
        "row_importance": np.arange(1.0, r + 1),
    },
    "cross_entropy": lambda r, c: {"logits": floats(r, c), "targets": np.arange(r) % max(c, 1)},
    "kl_divergence": lambda r, c: {"reference": floats(r, c), "logits": floats(r, c) ** 2},
    "total": lambda r, c: {"x": floats(r, c)},
    "encode": encode,
    "dequantize": lambda r, c: {**stored(r, c), "out": floats(r, c), "rows": np.arange(r)},
    "matmul": lambda r, c: {**stored(r, c), "x": floats(7, c), "bias": floats(r), "out": floats(7, r)},
    "matmul_together": lambda r, c: {
        "x": floats(7, c),
        "layers": ((*stored(r, c).values(), floats(r)),),
        "outs": (floats(7, r),),
    },
    "quantize_trellis": lambda r, c: {"weight": floats(r, c), "hessian": moments(c), "bits": 2.0, "width": 10},
    "trellis_rates": lambda r, c: {"importance": np.linspace(1, 40, c), "bits": 2.0},
    "dequantize_trellis": lambda r, c: {**tiles(r, c), "out": floats(r, c)},
    "matmul_trellis": lambda r, c: {"x": floats(7, c), **tiles(r, c), "bias": floats(r), "out": floats(7, r)},
    "decoder": decoder,
    "decode": step,
    "route": lambda r, c: {
        "logits": floats(r, max(c, 1)),
        "experts": np.zeros((r, 1), np.int64),
        "weights": floats(r, 1),
        "over_all": True,
        "divided": False,
    },
    "unchanged": lambda r, c: {"empty": ({},), "absent": ({},), "key": "a", "same": ({"b": r}, "b", r), "answers": ()},
    "pack": lambda r, c: {"codes": codes_of(r, c), "levels": 3},
    "unpack": lambda r, c: {"packed": _core.pack(codes_of(r, c), 3), "cols": c, "levels": 3},
    "hessian_add": lambda r, c: {
        "x": floats(r, c),
        "hessian": floats(c, 9),
        "y": floats(r, 9),
        "weights": floats(r) ** 2,
    },
    "mirror_upper": lambda r, c: {"hessian": floats(c, c)},
    "layout": lambda r, c: {"scheme": KEY, "rows": r, "cols": c},
    "info": lambda r, c: {},
    "set_isa": lambda r, c: {"name": None},
    "set_num_threads": lambda r, c: {"n": 2},
    "get_num_threads": lambda r, c: {},
    "borrow_threads": lambda r, c: {},
}

FUNCTIONS = sorted(name for name, value in vars(_core).items() if inspect.isbuiltin(value))


@functools.cache
def _arguments(name: str, rows: int, cols: int) -> Arguments:
    return CALLS[name](rows, cols)


def arguments(name: str, rows: int = 5, cols: int = 70) -> Arguments:
    """Fresh arguments of a legal call, the same ones each time."""
    given = _arguments(name, rows, cols)
    return {key: value.copy() if isinstance(value, np.ndarray) else value for key, value in given.items()}


def tensors_of(name: str) -> list[str]:
    return [key for key, value in arguments(name).items() if isinstance(value, np.ndarray)]


def as_bytes(result: object) -> list[bytes]:
    """The bytes of a result, array by array."""
    if isinstance(result, tuple):
        return [data for part in result for data in as_bytes(part)]
    if type(result).__name__ == "PyCapsule":
        return [b"a capsule"]
    return [result.tobytes() if isinstance(result, np.ndarray) else repr(result).encode()]


def call(name: str, given: Arguments) -> list[bytes]:
    """Call a function of the core by keyword; the bytes of its results."""
    return as_bytes(getattr(_core, name)(**given))
