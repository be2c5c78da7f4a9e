"""Types of the C core's functions. Tensors are anything with __dlpack__ on the CPU; results are NumPy arrays."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

_Tensor: TypeAlias = Any
_Scheme: TypeAlias = tuple[int, int, bool]  # levels, group_size, symmetric
_Stored: TypeAlias = tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.uint8] | None]  # codes, scales, zeros

FEW_TOKENS: int  # at most so many are multiplied straight from the packed codes
MOST_TOGETHER: int  # layers in one call of matmul_together

def quantize_rtn(weight: _Tensor, scheme: _Scheme) -> _Stored: ...
def quantize_clip(weight: _Tensor, scheme: _Scheme, importance: _Tensor | None = None) -> _Stored: ...
def search(
    weight: _Tensor,
    schemes: tuple[_Scheme, ...],
    importance: _Tensor | None = None,
    row_importance: _Tensor | None = None,
    clip: bool = False,
) -> NDArray[np.float64]: ...
def cross_entropy(logits: _Tensor, targets: _Tensor) -> NDArray[np.float32]: ...
def kl_divergence(reference: _Tensor, logits: _Tensor) -> NDArray[np.float32]: ...
def total(x: _Tensor) -> float: ...
def encode(weight: _Tensor, scales: _Tensor, zeros: _Tensor | None, scheme: _Scheme) -> NDArray[np.uint8]: ...
def dequantize(
    codes: _Tensor,
    scales: _Tensor,
    zeros: _Tensor | None,
    scheme: _Scheme,
    cols: int,
    out: _Tensor,
    rows: _Tensor | None = None,
) -> None: ...
def matmul(
    x: _Tensor,
    codes: _Tensor,
    scales: _Tensor,
    zeros: _Tensor | None,
    scheme: _Scheme,
    cols: int,
    bias: _Tensor | None,
    out: _Tensor,
    mode: int = 0,
) -> None: ...
def matmul_together(
    x: _Tensor,
    layers: tuple[tuple[_Tensor, _Tensor, _Tensor | None, _Scheme, int, _Tensor | None], ...],
    outs: tuple[_Tensor, ...],
    mode: int = 0,
) -> None: ...
def pack(codes: _Tensor, levels: int) -> NDArray[np.uint8]: ...
def unpack(packed: _Tensor, cols: int, levels: int) -> NDArray[np.uint8]: ...
def hessian_add(x: _Tensor, hessian: _Tensor, y: _Tensor | None = None, weights: _Tensor | None = None) -> None: ...
def mirror_upper(hessian: _Tensor) -> None: ...
def train_forward(
    weight: _Tensor, offset: _Tensor, low: _Tensor | None, high: _Tensor, scheme: _Scheme, out: _Tensor
) -> None: ...
def train_backward(
    weight: _Tensor,
    offset: _Tensor,
    low: _Tensor | None,
    high: _Tensor,
    scheme: _Scheme,
    grad: _Tensor,
    into_offset: _Tensor,
    into_low: _Tensor | None,
    into_high: _Tensor,
) -> None: ...
def align(
    weight: _Tensor, hessian: _Tensor, cross: _Tensor, share: float = 1.0, damping: float = 0.01
) -> tuple[NDArray[np.float32], float]: ...
def quantize_gptq(
    weight: _Tensor,
    hessian: _Tensor,
    scheme: _Scheme,
    damping: float = 0.01,
    sweeps: int = 0,
    tolerance: float = 0.001,
    by_activation: bool = False,
) -> tuple[_Stored, NDArray[np.float64], float, int]: ...
def quantize_trellis(
    weight: _Tensor,
    hessian: _Tensor | None,
    bits: float,
    width: int = 12,
    importance: _Tensor | None = None,
    damping: float = 0.01,
    by_activation: bool = True,
    refit: bool = True,
    thorough: bool = False,
    turned: bool = False,
) -> tuple[
    tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.uint8]], NDArray[np.float64], float, int
]: ...  # codes, scales, rates
def trellis_rates(importance: _Tensor, bits: float, turned: bool = False) -> NDArray[np.uint8]: ...
def dequantize_trellis(
    codes: _Tensor,
    scales: _Tensor,
    rates: _Tensor,
    width: int,
    cols: int,
    out: _Tensor,
    first: int = 0,
    turned: bool = False,
) -> None: ...
def matmul_trellis(
    x: _Tensor,
    codes: _Tensor,
    scales: _Tensor,
    rates: _Tensor,
    width: int,
    cols: int,
    bias: _Tensor | None,
    out: _Tensor,
    mode: int = 0,
    turned: bool = False,
) -> None: ...
def decoder(
    sizes: tuple[int, int, int, int, bool, float, float, float, int, float, float, int],
    linears: tuple[tuple[Any, ...], ...],
    blocks: tuple[tuple[Any, ...], ...],
    final: tuple[int, float, _Tensor | None] | None,
) -> Any: ...  # a capsule for decode
def decode(
    decoder: Any,
    x: _Tensor,
    out: _Tensor,
    ropes: tuple[tuple[_Tensor, _Tensor, bool], ...],
    rooms: tuple[tuple[_Tensor, int, int, int], ...],
    padding: _Tensor | None = None,
    experts: _Tensor | None = None,
) -> None: ...
def route(
    logits: _Tensor, experts: _Tensor, weights: _Tensor, over_all: bool = False, divided: bool = False, dtype: int = 0
) -> None: ...
def unchanged(
    empty: tuple[dict, ...], absent: tuple[dict, ...], key: Any, same: tuple[Any, ...], answers: tuple[Any, ...]
) -> bool: ...
def layout(scheme: _Scheme, rows: int, cols: int) -> dict[str, int]: ...
def info() -> dict[str, Any]: ...
def set_isa(name: str | None = None) -> None: ...
def set_num_threads(n: int) -> None: ...
def get_num_threads() -> int: ...
def borrow_threads() -> bool: ...
