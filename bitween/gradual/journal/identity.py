"""What determines a run's results, in a form that can be kept and compared: weights, text, options, version."""

from __future__ import annotations

import hashlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

__all__ = ["differences", "identity_of"]

_VOLATILE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype"}  # of a config: names, not mathematics


def identity_of(model: Any, windows: Any, options: dict) -> dict:
    """The identity of a run, for `Journal.open`.

    Parameters
    ----------
    model : torch.nn.Module with its weights in memory; every parameter and buffer is hashed, byte by byte
    windows : the token windows: tensors and arrays in dicts, sequences and dataclasses
    options : JSON values, tensors, paths and dataclasses such as Scheme

    Returns
    -------
    dict of "model", "text", "options" and "version", which must be equal for a resume, and of "machine" (instruction
    set, OpenBLAS core, threads, library versions), which may differ.

    Raises
    ------
    TypeError, ValueError
        naming the place of a value that cannot be told apart from another, such as a function or a meta tensor
    """
    import bitween

    return {
        "model": _model_identity(model),
        "text": _described(windows, "text"),
        "options": _described(options, "options"),
        "version": bitween.__version__,
        "machine": _machine(),
    }


def differences(recorded: Any, now: Any, path: str = "") -> list[str]:
    """One line for each place where two identities differ."""
    if isinstance(recorded, dict) and isinstance(now, dict):
        found = []
        for key in sorted(set(recorded) | set(now)):
            place = f"{path}.{key}" if path else key
            if key not in now:
                found.append(f"{place}: recorded {_short(recorded[key])}; now missing")
            elif key not in recorded:
                found.append(f"{place}: not recorded; now {_short(now[key])}")
            else:
                found += differences(recorded[key], now[key], place)
        return found
    if isinstance(recorded, list) and isinstance(now, list) and len(recorded) == len(now):
        pairs = enumerate(zip(recorded, now, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{path}[{i}]")]
    if type(recorded) is type(now) and recorded == now:
        return []
    return [f"{path}: recorded {_short(recorded)}; now {_short(now)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _machine() -> dict:
    import sys

    import bitween

    info = bitween.info()
    found = {key: info[key] for key in ("isa", "blas_core", "threads")}
    for name in ("numpy", "torch", "transformers"):
        if name in sys.modules:
            found[name] = str(sys.modules[name].__version__)
    return found


def _model_identity(model: Any) -> dict:
    """Class, configuration and one hash over names, types, shapes and bytes of all weights."""
    named = sorted({**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}.items())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
        lines = list(pool.map(lambda item: f"{item[0]} {_tensor_identity(*item)}\n", named))
    config = getattr(model, "config", None)
    config = config.to_dict() if hasattr(config, "to_dict") else {}
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    return {
        "class": type(model).__name__,
        "config": hashlib.sha256(repr(_described(kept, "config", strict=False)).encode()).hexdigest(),
        "n_tensors": len(named),
        "sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
    }


def _tensor_identity(path: str, tensor: Any) -> str:
    """Type, shape and hash of the values: "float32 (3, 4) 9f86d081..."."""
    if isinstance(tensor, np.ndarray):
        if tensor.dtype.hasobject:
            raise TypeError(f"{path}: expected an array of numbers; got dtype {tensor.dtype}")
        array, dtype = np.ascontiguousarray(tensor), str(tensor.dtype)
    else:
        import torch

        if tensor.device.type == "meta":
            raise ValueError(f"{path}: expected a tensor with memory behind it; it is on the meta device")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        array, dtype = flat.view(torch.uint8).numpy(), str(tensor.dtype).removeprefix("torch.")
    data = memoryview(array.reshape(-1).view(np.uint8))
    return f"{dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def _described(value: Any, path: str, strict: bool = True) -> Any:
    """The value as JSON, tensors by their hash. What cannot be told apart is refused, or named when not strict."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.ndarray) or (hasattr(value, "detach") and hasattr(value, "dtype")):
        return _tensor_identity(path, value)
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): _described(value[key], f"{path}.{key}", strict) for key in sorted(value, key=str)}
    if isinstance(value, (list, tuple)):
        return [_described(item, f"{path}[{i}]", strict) for i, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return sorted((_described(item, path, strict) for item in value), key=repr)
    if strict:
        raise TypeError(f"{path}: expected values that can be kept as JSON; got {type(value).__name__}")
    return str(value)
