"""Reading checkpoints that may come from anyone: safetensors and JSON, every field checked before it is used.

Nothing here runs code from a file, follows a name out of its directory, or reserves memory that the file's own size
does not justify. Tensors are read, not mapped, so a file that shrinks meanwhile is an error rather than a signal.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["MANIFEST", "SCHEMA_VERSION", "CheckpointError", "TensorFiles", "read_header", "read_json", "sha256"]

MANIFEST = "bitween.json"
SCHEMA_VERSION = 1

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_HEADER = _MAX_JSON = 100_000_000
_MAX_RANK = 8
_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8}
_TORCH = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "F16": "float16", "BF16": "bfloat16",
    "I32": "int32", "F32": "float32", "I64": "int64", "F64": "float64",
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted. Attributes: `file`, `tensor` (either may be None) and `reason`."""

    def __init__(self, reason: str, file: str | os.PathLike | None = None, tensor: str | None = None) -> None:
        self.reason, self.file, self.tensor = reason, None if file is None else str(file), tensor
        super().__init__(": ".join(part for part in (self.file, tensor, reason) if part))

    def __reduce__(self) -> tuple:
        return type(self), (self.reason, self.file, self.tensor)


@dataclass(frozen=True)
class _Entry:
    """Where one tensor lies: its file, dtype as safetensors writes it, shape, first byte and number of bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    n_bytes: int


def read_json(path: Path, data: bytes | None = None) -> dict[str, Any]:
    """A JSON object: UTF-8, at most 100 MB, no key twice, no NaN or infinity, no nesting beyond Python's stack.

    Raises
    ------
    CheckpointError
    """
    if data is None:
        _regular_size(path, _MAX_JSON)
        data = path.read_bytes()
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except RecursionError:
        raise CheckpointError("nested too deeply", path) from None
    except ValueError as error:  # bad UTF-8, bad JSON, and what the hooks refuse
        raise CheckpointError(f"not valid JSON: {error}", path) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"expected a JSON object; got {type(value).__name__}", path)
    return value


def sha256(path: Path) -> str:
    """Digest of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TensorFiles:
    """The tensors of a checkpoint directory: `model.safetensors`, or the shards its index names.

    Raises
    ------
    CheckpointError
        naming file, tensor and reason. All headers are read and checked at once, no tensor is.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError("expected a directory with a model", self.directory)
        self.files, weight_map = self._shards()
        self.entries: dict[str, _Entry] = {}
        self.converted: dict[str, Any] = {}  # tensors of this checkpoint that lie in the files in another form
        for path in self.files:
            for name, entry in read_header(path).items():
                if name in self.entries:
                    raise CheckpointError(f"also in {self.entries[name].file.name}", path, name)
                self.entries[name] = entry
        if weight_map is not None:
            self._compare(weight_map)

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return [*self.entries, *self.converted]

    def read(self, name: str) -> Any:
        """One tensor, as a torch tensor on the CPU that owns its memory."""
        import torch

        if name in self.converted:
            return self.converted[name]
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=getattr(torch, _TORCH[entry.dtype]))
        if not entry.n_bytes:
            return tensor
        with open(entry.file, "rb") as file:
            file.seek(entry.begin)
            target = memoryview(tensor.view(torch.uint8).reshape(-1).numpy() if tensor.ndim else _scalar_bytes(tensor))
            if file.readinto(target) != entry.n_bytes:
                raise CheckpointError("the file became shorter while it was read", entry.file, name)
        if entry.dtype == "BOOL" and int(tensor.view(torch.uint8).max()) > 1:
            raise CheckpointError("expected booleans; got other bytes", entry.file, name)
        return tensor

    def error(self, reason: str, name: str) -> CheckpointError:
        """A CheckpointError about a tensor here."""
        entry = self.entries.get(name)
        return CheckpointError(reason, entry.file if entry else self.directory, name)

    def _shards(self) -> tuple[list[Path], dict[str, str] | None]:
        single, index = self.directory / _WEIGHTS, self.directory / _INDEX
        if os.path.lexists(index):
            if os.path.lexists(single):
                raise CheckpointError(f"both {_WEIGHTS} and {_INDEX} are here", self.directory)
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError("weight_map: expected names and their files", index)
            for tensor, name in weight_map.items():
                if not isinstance(name, str) or not _plain_name(name) or not name.endswith(".safetensors"):
                    raise CheckpointError(
                        f"expected the name of a .safetensors file in this directory; got {name!r}", index, tensor
                    )
            return [self.directory / name for name in sorted(set(weight_map.values()))], weight_map
        if os.path.lexists(single):
            return [single], None
        pickles = sorted(p.name for p in self.directory.iterdir() if p.suffix in _PICKLES)
        if pickles:
            raise CheckpointError("pickled weights can run code and are not read; convert to safetensors", pickles[0])
        raise CheckpointError(f"expected {_WEIGHTS} or {_INDEX}; neither is here", self.directory)

    def _compare(self, weight_map: dict[str, str]) -> None:
        for name, file in weight_map.items():
            if name not in self.entries or self.entries[name].file.name != file:
                raise CheckpointError(f"the index says it is in {file}; it is not", self.directory / _INDEX, name)
        for name in self.entries:
            if name not in weight_map:
                raise self.error("not named by the index", name)


def read_header(path: Path) -> dict[str, _Entry]:
    """The header of a safetensors file: every tensor lies inside the file, none overlap, nothing is left over.

    Raises
    ------
    CheckpointError
    """
    size = _regular_size(path, None)
    with open(path, "rb") as file:
        n_header = int.from_bytes(file.read(8), "little") if size >= 8 else -1
        if not 2 <= n_header <= min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"not a whole safetensors file ({size:,} bytes)", path)
        header = read_json(path, file.read(n_header))
    start, entries = 8 + n_header, {}
    for name, fields in header.items():
        if name == "__metadata__":
            continue
        entries[name] = _entry(path, name, fields, start, size)
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].n_bytes)):
        if entry.begin != position:
            raise CheckpointError(f"expected to begin at byte {position:,}; begins at {entry.begin:,}", path, name)
        position += entry.n_bytes
    if position != size:
        raise CheckpointError(f"expected {position:,} bytes; the file has {size:,}", path)
    return entries


def _entry(path: Path, name: str, fields: Any, start: int, size: int) -> _Entry:
    if not name or len(name) > 1024 or "\0" in name or ".." in name or "/" in name or "\\" in name:
        raise CheckpointError(f"unusable tensor name {name[:80]!r}", path)
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError("expected dtype, shape and data_offsets", path, name)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise CheckpointError(f"dtype: expected one of {', '.join(_ITEM_BYTES)}; got {dtype!r}", path, name)
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(_is_size(n, size) for n in shape):
        raise CheckpointError(f"shape: expected sizes that fit in {size:,} bytes; got {str(shape)[:80]}", path, name)
    n_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n, size) for n in offsets):
        raise CheckpointError(f"data_offsets: expected two positions; got {str(offsets)[:80]}", path, name)
    if offsets[1] - offsets[0] != n_bytes or start + offsets[1] > size:
        raise CheckpointError(f"data_offsets {offsets}: expected {n_bytes:,} bytes inside the file", path, name)
    return _Entry(path, dtype, tuple(shape), start + offsets[0], n_bytes)


def _is_size(value: Any, limit: int) -> bool:
    return type(value) is int and 0 <= value <= limit


def _plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and not any(c in name for c in "/\\\0")


def _regular_size(path: Path, limit: int | None) -> int:
    """Bytes of a regular file. Links are followed (caches are made of them), pipes and devices refused."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(getattr(error, "strerror", None) or str(error), path) from None
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError("expected a regular file", path)
    if limit is not None and found.st_size > limit:
        raise CheckpointError(f"expected at most {limit:,} bytes; got {found.st_size:,}", path)
    return found.st_size


def _scalar_bytes(tensor: Any) -> Any:
    import torch

    return tensor.reshape(1).view(torch.uint8).numpy()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{twice[:80]!r} appears twice")
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large")
    return value
