"""Numbers that a run works on for a while, kept in files that are mapped, so that only what is in use takes memory.

A model in float32, in another basis, and once more as quantized takes a multiple of the model. Most of it lies still at
any moment: one block runs, the others wait. A kept tensor is an ordinary tensor on the pages of a nameless file;
`let_go` tells the system that this process needs none of those pages now, and the next use brings them back, from the
system's cache as long as other programs leave it room, else from the disk. Numbers never change on that way.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from bitween.model.memory import return_freed_memory
from bitween.quantized_tensor import QuantizedTensor

__all__ = ["Spill", "end_rest"]

LEAST_BYTES = 1 << 17  # of a tensor that is worth a file: small models have hundreds of matrices below a MiB

# Tensors of up to 32 MiB come from a heap that keeps its holes: weights in another basis, made one by one, held a
# gigabyte so. Giving them back takes a millisecond or two, which nobody notices at this pace.
_TRIM_SECONDS = 0.1

_C_LIBRARY = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
_FAILED = ctypes.c_void_p(-1).value
if _C_LIBRARY is not None:
    _C_LIBRARY.mmap.restype = ctypes.c_void_p
    _C_LIBRARY.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_longlong]
    _C_LIBRARY.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    _C_LIBRARY.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_DONTNEED = getattr(mmap, "MADV_DONTNEED", None)


class Spill:
    """Keeps tensors in mapped files of one directory; each file goes when the last tensor on it does.

    Parameters
    ----------
    directory : where the files lie; default the system's for temporary files (TMPDIR)
    least : bytes of a tensor that is kept in a file; smaller ones stay in memory, with None all of them

    Where the system can't map files so (Windows) everything stays in memory.
    """

    def __init__(self, directory: str | os.PathLike | None = None, least: int | None = LEAST_BYTES):
        self.directory, self.least = directory, least
        self._mapped: dict[int, weakref.ref] = {}  # by address; ctypes arrays have no hash
        self._trimmed = 0.0
        self._adopted: list[tuple[torch.Tensor, int, int]] = []  # tensors on files of others, and their whole pages

    @property
    def nbytes(self) -> int:
        """Bytes in files now."""
        return sum(len(pages) for pages in self._living())

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same numbers on the pages of a file; the tensor itself where it is small or not on the CPU.

        Raises
        ------
        OSError
            The directory can't be written or has no room left; the message names it and the bytes wanted.
        """
        tensor = tensor.detach()
        if not self._worth(tensor.nbytes) or tensor.device.type != "cpu":
            return tensor
        flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        pages = self._write(flat)
        self.let_go()  # what the numbers were made of
        return torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)

    def keep_packed(self, tensor: QuantizedTensor) -> QuantizedTensor:
        """The same stored matrix with its codes on the pages of a file."""
        codes = np.ascontiguousarray(tensor.codes)
        if not self._worth(codes.nbytes):
            return tensor
        pages = self._write(codes.reshape(-1).view(np.uint8))
        codes = np.frombuffer(pages, codes.dtype).reshape(codes.shape)
        return QuantizedTensor(codes, tensor.scales, tensor.zeros, tensor.scheme, tensor.shape)

    def adopt(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let go also of those tensors that lie in mapped .safetensors files, which nobody may change from now on.

        Tensors elsewhere are left out. Linux only; on other systems none is found.
        """
        self._adopted += _in_files(tensors)

    def forget(self, tensor: torch.Tensor) -> None:
        """Let go once of a tensor that nobody has changed, if it lies in a mapped .safetensors file."""
        for _, first, nbytes in _in_files([tensor]) if self._worth(tensor.nbytes) and _DONTNEED is not None else ():
            _C_LIBRARY.madvise(first, nbytes, _DONTNEED)

    def let_go(self) -> None:
        """This process needs no kept page now, nor what its allocator holds of memory that was freed."""
        if self.least is None:
            return
        if time.monotonic() - self._trimmed >= _TRIM_SECONDS:
            return_freed_memory()
            self._trimmed = time.monotonic()
        if _DONTNEED is not None:
            for pages in self._living():
                _C_LIBRARY.madvise(ctypes.addressof(pages), len(pages), _DONTNEED)
            for _, first, nbytes in self._adopted:
                _C_LIBRARY.madvise(first, nbytes, _DONTNEED)

    def recall(self, tensor: QuantizedTensor) -> QuantizedTensor:
        """The same stored matrix in ordinary memory."""
        if not isinstance(tensor.codes, np.ndarray) or tensor.codes.ctypes.data not in self._mapped:
            return tensor
        return QuantizedTensor(tensor.codes.copy(), tensor.scales, tensor.zeros, tensor.scheme, tensor.shape)

    def in_memory(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, or a copy of one whose pages may be let go."""
        place = tensor.data_ptr()
        kept = [(ctypes.addressof(pages), len(pages)) for pages in self._living()]
        adopted = [(whole.data_ptr(), whole.nbytes) for whole, _, _ in self._adopted]
        return tensor.clone() if any(a <= place < a + n for a, n in (*kept, *adopted)) else tensor

    def rest_after(self, modules: Iterable[torch.nn.Module]) -> None:
        """Let go of all pages whenever one of these modules has run, until `end_rest`; copies of a module do so too."""
        for module in modules if self.least is not None else ():
            if not any(getattr(hook, "lets_go", False) for hook in module._forward_hooks.values()):
                module.register_forward_hook(_letting_go(self))

    def _worth(self, nbytes: int) -> bool:
        return _C_LIBRARY is not None and self.least is not None and nbytes >= max(1, self.least)

    def _write(self, values: np.ndarray) -> Any:
        """The bytes in a file without a name, mapped: a ctypes array that owns the mapping."""
        try:
            descriptor, path = tempfile.mkstemp(prefix="bitween-", dir=self.directory)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; expected to write", str(self._place)) from error
        try:
            os.unlink(path)
            view, done = memoryview(values), 0
            while done < len(view):  # written, not copied through the mapping: a full disk is an error, not a signal
                done += os.write(descriptor, view[done : done + (1 << 28)])
            address = _C_LIBRARY.mmap(None, len(view), mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, descriptor, 0)
            if address in (None, _FAILED):
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
        except OSError as error:
            wanted = f"{os.strerror(error.errno or errno.EIO)}; a run keeps its working numbers there and wants "
            raise OSError(
                error.errno, f"{wanted}{values.nbytes:,} bytes more. TMPDIR names another", str(self._place)
            ) from error
        finally:
            os.close(descriptor)
        pages = (ctypes.c_char * values.nbytes).from_address(address)
        weakref.finalize(pages, _unmap, self._mapped, address, values.nbytes)
        self._mapped[address] = weakref.ref(pages)
        return pages

    def _living(self) -> Iterator[Any]:
        """Every mapping that something still uses, held while it is looked at."""
        for reference in tuple(self._mapped.values()):
            if (pages := reference()) is not None:
                yield pages

    @property
    def _place(self) -> str:
        return os.fspath(self.directory or tempfile.gettempdir())


def _in_files(tensors: Iterable[torch.Tensor]) -> Iterator[tuple[torch.Tensor, int, int]]:
    """Tensors in mapped .safetensors files, each with the address and the bytes of its whole pages."""
    files = _mapped_files()
    for tensor in tensors:
        tensor = tensor.detach()
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if any(a <= first and last <= b for a, b in files):
            first, last = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
            if first < last:
                yield tensor, first, last - first


def _mapped_files() -> list[tuple[int, int]]:
    """First and last address of every .safetensors file that this process has mapped."""
    try:
        with open("/proc/self/maps") as file:
            lines = [line.split(maxsplit=5) for line in file]
    except OSError:
        return []
    named = [line[0].split("-") for line in lines if len(line) == 6 and line[5].strip().endswith(".safetensors")]
    return [(int(first, 16), int(last, 16)) for first, last in named]


def _letting_go(spill: Spill) -> Callable:
    """A hook that copies of the module share; a bound method would have them copy the object."""

    def hook(*_: Any) -> None:
        spill.let_go()

    hook.lets_go = True
    return hook


def end_rest(model: torch.nn.Module) -> None:
    """Take away the hooks that `Spill.rest_after` put on modules of this model."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if getattr(hook, "lets_go", False)]:
            del module._forward_hooks[key]


def _unmap(mapped: dict, address: int, nbytes: int) -> None:
    mapped.pop(address, None)  # before the pages go: the system may give the address to the next mapping at once
    _C_LIBRARY.munmap(address, nbytes)
