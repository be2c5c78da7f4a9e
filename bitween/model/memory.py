"""Exact memory of a model in bytes: what its parameters and buffers take, shared ones counted once."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "MemoryAnalysis",
    "analyze_memory",
    "available_bytes",
    "model_bytes",
    "peak_memory_bytes",
    "resident_bytes",
    "return_freed_memory",
    "stored_again",
]

_C_LIBRARY = ctypes.CDLL(None) if os.name == "posix" else None  # what is loaded already


@dataclass(frozen=True)
class MemoryAnalysis:
    """Bytes of a model, and of the model it came from.

    Attributes
    ----------
    total, original_total : bytes of all parameters and persistent or other buffers, as the model needs them: what is
        stored twice with equal numbers (an embedding and an untied head) counts once, and plain numbers of both
        models count in `dtype`
    by_layer, original_by_layer : {module name: bytes}; scales, zeros and bias included
    by_block, original_by_block : {block name or top-level part: bytes}
    peak : bytes, the largest resident size of this process so far, or None where the system does not tell
    dtype : in which plain numbers of both models are counted: the one that this model keeps them in
    """

    total: int
    original_total: int
    by_layer: dict[str, int] = field(repr=False)
    original_by_layer: dict[str, int] = field(repr=False)
    by_block: dict[str, int] = field(repr=False)
    original_by_block: dict[str, int] = field(repr=False)
    peak: int | None = None
    dtype: str = ""

    @property
    def reduction(self) -> float:
        """1 - total / original_total."""
        return 1 - self.total / self.original_total if self.original_total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, bytes, for JSON."""
        names = ("total", "original_total", "reduction", "by_layer", "original_by_layer", "by_block")
        return {name: getattr(self, name) for name in (*names, "original_by_block", "peak", "dtype")}

    def __str__(self) -> str:
        counted = f", plain numbers in {self.dtype}" if self.dtype else ""
        return f"memory {_mib(self.total)} of {_mib(self.original_total)} ({self.reduction:.1%} less){counted}" + (
            f", peak of this process {_mib(self.peak)}" if self.peak else ""
        )


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"


def _tensors(model: Any, dtype: Any = None) -> dict[tuple, tuple[str, int]]:
    """{memory: (module name, bytes)}, each memory under the first module that holds it.

    With `dtype`, parameters of floating point count as if they were kept in it.
    """
    found: dict[tuple, tuple[str, int]] = {}
    again = stored_again(model)
    for name, module in model.named_modules():
        parameters = list(module.parameters(recurse=False))
        for tensor in (*parameters, *module.buffers(recurse=False)):
            if not tensor.numel() or tensor is again:
                continue
            key = (tensor.data_ptr(), tensor.nbytes, str(tensor.device)) if not tensor.is_meta else (id(tensor),)
            cast = dtype is not None and tensor.is_floating_point() and any(tensor is p for p in parameters)
            found.setdefault(key, (name, tensor.numel() * dtype.itemsize if cast else tensor.nbytes))
    return found


def stored_again(model: Any) -> Any:
    """The head's weight where it repeats the embedding's number by number in memory of its own, else None."""
    try:
        ends = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # no language model
        return None
    table, head = (getattr(end, "_parameters", {}).get("weight") for end in ends)
    if table is None or head is None or table.is_meta or head.is_meta or table.data_ptr() == head.data_ptr():
        return None
    same = table.shape == head.shape and table.dtype == head.dtype and table.device == head.device
    return head if same and bool((table == head).all()) else None


def model_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers; shared memory, and a head that repeats the embedding, counted once."""
    return sum(nbytes for _, nbytes in _tensors(model).values())


def _by_layer(model: Any, dtype: Any = None) -> dict[str, int]:
    sums: dict[str, int] = {}
    for name, nbytes in _tensors(model, dtype).values():
        sums[name] = sums.get(name, 0) + nbytes
    return sums


def _dtype_of(model: Any) -> Any:
    """The dtype of most of a model's plain numbers, None where there are none."""
    sizes: dict[Any, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=sizes.get) if sizes else None


def _by_block(layers: dict[str, int]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for name, nbytes in layers.items():
        match = re.match(r"(.*?\.\d+)(\.|$)", name)  # up to the first index: model.layers.3
        block = match[1] if match else name
        sums[block] = sums.get(block, 0) + nbytes
    return sums


def analyze_memory(model: Any, original: Any = None) -> MemoryAnalysis:
    """Memory of `model` by layer and block, beside that of the model it came from.

    Parameters
    ----------
    original : model or MemoryAnalysis, default `model` itself
    """
    dtype = _dtype_of(model)
    now = _by_layer(model, dtype)
    if isinstance(original, MemoryAnalysis):
        before = original.original_by_layer
    else:
        before = now if original is None else _by_layer(original, dtype)
    sums = sum(now.values()), sum(before.values())
    name = str(dtype).removeprefix("torch.") if dtype is not None else ""
    return MemoryAnalysis(*sums, now, before, _by_block(now), _by_block(before), peak_memory_bytes(), name)


def resident_bytes() -> int | None:
    """Resident size of this process now, where the system tells (Linux)."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def available_bytes() -> int | None:
    """Memory that a process can still get without swapping, where the system tells (Linux)."""
    try:
        with open("/proc/meminfo") as file:
            found = re.search(r"MemAvailable:\s+(\d+) kB", file.read())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def return_freed_memory() -> None:
    """Let the system have back what the C allocator holds of memory that was freed (glibc; elsewhere nothing happens).

    Activations of a few ten megabytes come and go thousands of times in a run; the heap, cut up between what stays,
    held twice as much as was in use.
    """
    trim = getattr(_C_LIBRARY, "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_memory_bytes() -> int | None:
    """Largest resident size of this process so far, bytes."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
