"""DLPack tensors made by hand, legal and hostile, and the count of what became of them."""

from __future__ import annotations

import ctypes
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p

import numpy as np

CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
BFLOAT = 4


class Device(ctypes.Structure):
    _fields_ = [("type", c_int32), ("id", c_int32)]


class DataType(ctypes.Structure):
    _fields_ = [("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16)]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("device", Device),
        ("ndim", c_int32),
        ("dtype", DataType),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]


class Managed(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("context", c_void_p), ("deleter", c_void_p)]


class ManagedVersioned(ctypes.Structure):
    _fields_ = [
        ("major", c_uint32),
        ("minor", c_uint32),
        ("context", c_void_p),
        ("deleter", c_void_p),
        ("flags", c_uint64),
        ("tensor", Tensor),
    ]


Deleter = CFUNCTYPE(None, c_void_p)
_api = ctypes.pythonapi
_new = ctypes.PYFUNCTYPE(ctypes.py_object, c_void_p, c_char_p, c_void_p)(("PyCapsule_New", _api))
_name = ctypes.PYFUNCTYPE(c_char_p, ctypes.py_object)(("PyCapsule_GetName", _api))


class Producer:
    """An object with __dlpack__ that exports an array as it is told, right or wrong.

    Parameters
    ----------
    array : what is exported; kept alive by this object
    **changes : fields that differ from the truth: data, shape, strides (None: NULL), ndim, code, bits, lanes, device,
        byte_offset, major, flags; and versioned (True), deleter (True: counted; False: NULL), name (of the capsule)

    Attributes
    ----------
    n_exports, n_deleted : capsules given out, deleter calls
    capsules : kept only when keep_capsules is true
    """

    def __init__(self, array: np.ndarray, **changes):
        self.array = array
        self.changes = changes
        self.n_exports = self.n_deleted = 0
        self.problems: list[str] = []
        self.capsules: list[object] = []
        self.keep_capsules = False
        self._alive: dict[int, object] = {}
        self._deleter = Deleter(self._delete)
        self._deleter_address = ctypes.cast(self._deleter, c_void_p).value if changes.get("deleter", True) else None

    def _delete(self, address):
        self.n_deleted += 1
        if self._alive.pop(address, None) is None:
            self.problems.append(f"deleter called twice or for a stranger: {address:#x}")

    def _tensor(self) -> Tensor:
        a, c = self.array, self.changes
        shape = tuple(c.get("shape", a.shape))
        strides = c.get("strides", tuple(s // a.itemsize for s in a.strides))
        t = Tensor()
        t.data = c.get("data", a.ctypes.data)
        t.device = Device(c.get("device", 1), 0)
        t.ndim = c.get("ndim", len(shape))
        t.dtype = DataType(c.get("code", CODES[a.dtype.kind]), c.get("bits", a.itemsize * 8), c.get("lanes", 1))
        t.shape = None if c.get("no_shape") else (c_int64 * max(1, len(shape)))(*shape)
        t.strides = None if strides is None else (c_int64 * max(1, len(strides)))(*strides)
        t.byte_offset = c.get("byte_offset", 0)
        return t

    def __dlpack__(self, *, max_version=None, **_):
        if self.changes.get("versioned", True):
            if max_version is None:
                raise TypeError("max_version is required")
            m = ManagedVersioned(major=self.changes.get("major", 1), minor=7, flags=self.changes.get("flags", 0))
        else:
            if max_version is not None:
                raise TypeError("unexpected keyword argument 'max_version'")
            m = Managed()
        m.tensor = self._tensor()
        m.deleter = self._deleter_address
        self._alive[ctypes.addressof(m)] = m
        self.n_exports += 1
        plain = b"dltensor_versioned" if self.changes.get("versioned", True) else b"dltensor"
        self._name = self.changes.get("name", plain)  # the capsule borrows it
        capsule = _new(ctypes.addressof(m), self._name, None)
        if self.keep_capsules:
            self.capsules.append(capsule)
        return capsule

    def __dlpack_device__(self):
        return (self.changes.get("device", 1), 0)


class Raw:
    """An object whose __dlpack__ returns what it is given, or raises it, when that is an exception's type."""

    def __init__(self, result):
        self.result = result

    def __dlpack__(self, **_):
        if isinstance(self.result, type):
            raise self.result("mine")
        return self.result


def capsule_name(capsule) -> bytes:
    return _name(capsule)


def misaligned(array: np.ndarray) -> np.ndarray:
    """The same values, contiguous, at an address that is odd."""
    memory = np.empty(array.nbytes + 17, np.uint8)
    start = 1 + -memory.ctypes.data % 16
    view = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view
