"""Rows 1 to 10 of the catalogue: what a tensor may look like, legal or not, for every argument.

A legal form gives the bytes that a plain NumPy array gives, or is refused; a hostile one is refused by name. Either
way the producer's deleter has run exactly once when the call returns, and a refused call has written nothing.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import bitween
from bitween import Scheme, _core
from tests.boundary.calls import CALLS, arguments, call, tensors_of
from tests.boundary.producers import BFLOAT, Producer, Raw, capsule_name, misaligned

ISAS = bitween.info()["isas"]
every_function = pytest.mark.parametrize("name", [name for name in CALLS if tensors_of(name)])


@pytest.fixture(params=ISAS)
def isa(request):
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(None)


def bytes_of(given):
    return {k: (v.array if isinstance(v, Producer) else v).tobytes() for k, v in given.items() if array_like(v)}


def array_like(value):
    return isinstance(value, (np.ndarray, Producer))


def settled(*producers):
    """Every tensor given out was deleted once, and no other."""
    for p in producers:
        assert p.problems == []
        assert p.n_deleted == (p.n_exports if p.changes.get("deleter", True) else 0)


def refused(name, given, error, match):
    """The call raises, writes nothing and settles every producer."""
    before = bytes_of(given)
    with pytest.raises(error, match=match):
        call(name, given)
    assert bytes_of(given) == before
    settled(*(v for v in given.values() if isinstance(v, Producer)))


def outcome(name, given):
    """(results, arrays afterwards), or the ValueError or BufferError that refused the call."""
    try:
        results = call(name, given)
    except (ValueError, IndexError, BufferError) as error:
        return error
    finally:
        settled(*(v for v in given.values() if isinstance(v, Producer)))
    return results, bytes_of(given)


def same_as_plain(name, key, form, rows=5, cols=70):
    """`form(array)` in place of the array gives the same bytes, or a refusal that names the argument."""
    given = arguments(name, rows, cols)
    expected = outcome(name, arguments(name, rows, cols))
    given[key] = form(given[key])
    found = outcome(name, given)
    if isinstance(expected, Exception):
        assert str(found) == str(expected)
        return str(found)
    if isinstance(found, Exception):
        assert str(found).startswith(f"{key}: expected "), found
        return str(found)
    assert found == expected
    return None


def is_output(name, key):
    given = arguments(name)
    given[key] = Producer(given[key], flags=1)
    found = outcome(name, given)
    return isinstance(found, Exception) and "writable" in str(found)


@every_function
def test_row_01_null_data_is_refused(name):
    for key in tensors_of(name):
        given = arguments(name)
        given[key] = Producer(given[key], data=None)
        refused(name, given, ValueError, f"^{key}: expected a tensor with memory behind it; got a null pointer")


@every_function
def test_row_01_null_data_of_an_empty_tensor(name):
    for key in tensors_of(name):
        for rows, cols in [(0, 70), (5, 0), (0, 0)]:
            given = arguments(name, rows, cols)
            if given[key].size == 0:
                same_as_plain(name, key, lambda a: Producer(a, data=None), rows, cols)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_row_01_fake_tensor():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weight = torch.randn(4, 64)
    with pytest.raises((ValueError, BufferError), match=r"weight|null|Cannot"):
        _core.quantize_rtn(weight, Scheme(4).key)


@every_function
def test_row_02_byte_offset(isa, name):
    for key in tensors_of(name):
        form = lambda a: Producer(a, data=a.ctypes.data - 4096, byte_offset=4096)  # noqa: E731
        assert same_as_plain(name, key, form) is None


@every_function
@pytest.mark.parametrize("versioned", [True, False], ids=["versioned", "legacy"])
def test_row_03_null_strides_are_row_major(name, versioned):
    for key in tensors_of(name):
        assert same_as_plain(name, key, lambda a: Producer(a, strides=None, versioned=versioned)) is None


FORMS = {
    "transposed": lambda a: a.T.copy().T,
    "rows reversed": lambda a: a[::-1].copy()[::-1],
    "columns reversed": lambda a: a[..., ::-1].copy()[..., ::-1],
    "every second row": lambda a: np.repeat(a, 2, axis=0)[::2],
    "every third column": lambda a: np.repeat(a, 3, axis=-1)[..., ::3],
    "wide rows": lambda a: np.concatenate([a, a], axis=-1)[..., : a.shape[-1]],
}


@every_function
@pytest.mark.parametrize("form", FORMS)
def test_row_03_strides(isa, name, form):
    for key in tensors_of(name):
        said = same_as_plain(name, key, FORMS[form])
        assert said is None or "contiguous" in said


@every_function
def test_row_03_strides_of_one_element_mean_nothing(name):
    for key in tensors_of(name):

        def form(a):
            strides = [s // a.itemsize if n != 1 else 2**62 + 3 for n, s in zip(a.shape, a.strides, strict=True)]
            return Producer(a, strides=strides)

        for rows, cols in [(1, 70), (5, 1), (1, 1)]:
            assert same_as_plain(name, key, form, rows, cols) is None


@every_function
def test_row_03_broadcast(isa, name):
    """Stride 0: as an input the same as a copy, as an output refused."""
    for key in tensors_of(name):
        if is_output(name, key):
            given = arguments(name)
            given[key] = Producer(given[key], strides=[0] * given[key].ndim)
            refused(name, given, ValueError, f"^{key}: expected contiguous")
            return
        plain, broadcast = arguments(name), arguments(name)
        row = plain[key][:1]
        plain[key] = np.broadcast_to(row, plain[key].shape).copy()
        broadcast[key] = Producer(np.broadcast_to(row, plain[key].shape))
        found, expected = outcome(name, broadcast), outcome(name, plain)
        if isinstance(found, Exception):
            assert str(found) == str(expected) or f"{key}: expected contiguous" in str(found)
        else:
            assert found[0] == expected[0]


# Of two outputs that share memory the first one is named.
OUTPUT_PAIRS = [
    (name, out, key)
    for name in CALLS
    for i, out in enumerate(tensors_of(name))
    if is_output(name, out)
    for j, key in enumerate(tensors_of(name))
    if j > i or (j < i and not is_output(name, key))
]


@pytest.mark.parametrize(("name", "out", "key"), OUTPUT_PAIRS, ids=lambda part: part)
def test_row_03_output_on_top_of_an_input_is_refused(name, out, key):
    given = arguments(name)
    a, b = given[out], given[key]
    memory = np.zeros(a.nbytes + b.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    given[key] = memory[start : start + b.nbytes].view(b.dtype).reshape(b.shape)
    given[key][...] = b
    at = start + (b.nbytes - 1) // a.itemsize * a.itemsize  # only the last bytes are shared
    given[out] = memory[at : at + a.nbytes].view(a.dtype).reshape(a.shape)
    refused(name, given, ValueError, f"^{out}: expected memory of its own; it overlaps {key}")
    given[out] = memory[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    refused(name, given, ValueError, f"^{out}: expected memory of its own; it overlaps {key}")


@every_function
def test_row_04_misaligned(isa, name):
    for key in tensors_of(name):
        said = same_as_plain(name, key, misaligned)
        assert said is None or "aligned memory" in said


@every_function
@pytest.mark.parametrize("form", ["flag", "numpy"])
def test_row_05_read_only(name, form):
    for key in tensors_of(name):
        given = arguments(name)
        if form == "flag":
            given[key] = Producer(given[key], flags=1)
        else:
            given[key].flags.writeable = False
        if is_output(name, key):
            refused(name, given, ValueError, f"^{key}: expected writable memory; got a read-only tensor")
        else:
            assert outcome(name, given) == outcome(name, arguments(name))


def test_row_05_some_arguments_are_outputs():
    assert {pair[:2] for pair in OUTPUT_PAIRS} >= {("dequantize", "out"), ("matmul", "out"), ("hessian_add", "hessian")}


@every_function
def test_row_06_versions(name):
    for key in tensors_of(name):
        assert same_as_plain(name, key, lambda a: Producer(a)) is None
        assert same_as_plain(name, key, lambda a: Producer(a, versioned=False)) is None
        for major in (0, 2, 2**32 - 1):  # nothing but the deleter may be touched
            given = arguments(name)
            given[key] = Producer(given[key], major=major, data=None, ndim=10**9, no_shape=True, flags=2**64 - 1)
            refused(name, given, BufferError, f"^{key}: expected DLPack version 1; got {major}")


WRONG_DTYPES = [
    (2, 24, "float24"), (2, 64, "float64"), (2, 8, "float8"), (6, 8, "bool"), (6, 32, "bool32"), (10, 8, "float8"),
    (17, 4, "float4"), (5, 64, "complex64"), (0, 8, "int8"), (0, 16, "int16"), (1, 16, "uint16"), (1, 64, "uint64"),
    (3, 64, "handle64"), (255, 255, "float255"), (BFLOAT, 32, "bfloat32"), (2, 0, "float0"),
]  # fmt: skip


@every_function
@pytest.mark.parametrize(("code", "bits", "text"), WRONG_DTYPES, ids=[f"{c}-{b}" for c, b, _ in WRONG_DTYPES])
def test_row_07_dtypes(name, code, bits, text):
    for key in tensors_of(name):
        given = arguments(name)
        if str(given[key].dtype) == text:
            continue
        given[key] = Producer(given[key], code=code, bits=bits)
        refused(name, given, (TypeError, ValueError), f"^{key}: expected (dtype .*got {text}|aligned)")


@every_function
@pytest.mark.parametrize("lanes", [0, 2, 65535])
def test_row_07_lanes(name, lanes):
    for key in tensors_of(name):
        given = arguments(name)
        given[key] = Producer(given[key], lanes=lanes)
        refused(name, given, TypeError, f"^{key}: expected single elements; got vectors of {lanes}")


@every_function
def test_row_08_consumed_twice(name):
    for key in tensors_of(name):
        producer = Producer(arguments(name)[key])
        capsule = producer.__dlpack__(max_version=(1, 0))
        given = {**arguments(name), key: Raw(capsule)}
        call(name, given)
        assert capsule_name(capsule) == b"used_dltensor_versioned"
        assert producer.n_deleted == 1
        with pytest.raises(BufferError, match=f"^{key}: expected an unused DLPack capsule"):
            call(name, given)
        settled(producer)


@every_function
@pytest.mark.parametrize("wrong", [b"used_dltensor", b"used_dltensor_versioned", b"dltensor_v", b"", None])
def test_row_08_wrong_capsule_name(name, wrong):
    for key in tensors_of(name):
        producer = Producer(arguments(name)[key], name=wrong)
        with pytest.raises(BufferError, match=f"^{key}: expected an unused DLPack capsule"):
            call(name, {**arguments(name), key: producer})
        assert producer.n_deleted == 0  # it belongs to whoever named it


@every_function
@pytest.mark.parametrize("result", [None, 5, "dltensor", object(), np.zeros(3)], ids=type)
def test_row_08_not_a_capsule(name, result):
    for key in tensors_of(name):
        refused(name, {**arguments(name), key: Raw(result)}, BufferError, f"^{key}: expected an unused DLPack capsule")


@every_function
@pytest.mark.parametrize("error", [KeyError, TypeError, MemoryError, KeyboardInterrupt])
def test_row_08_the_producers_error_passes(name, error):
    for key in tensors_of(name):
        refused(name, {**arguments(name), key: Raw(error)}, error, "mine")


@every_function
@pytest.mark.parametrize("versioned", [True, False], ids=["versioned", "legacy"])
def test_row_08_null_deleter(name, versioned):
    for key in tensors_of(name):
        assert same_as_plain(name, key, lambda a: Producer(a, deleter=False, versioned=versioned)) is None


class Busy(Producer):
    """Its deleter runs Python code that raises and catches."""

    computed = 0

    def _delete(self, address):
        try:
            int("not a number")
        except ValueError:
            self.computed = sum(i for i in range(10))
        super()._delete(address)


@every_function
def test_row_08_deleter_that_runs_python_keeps_the_error(name):
    """The deleter runs while the refusal is on its way; neither may disturb the other."""
    for key in tensors_of(name):
        given = arguments(name)
        busy = given[key] = Busy(given[key], lanes=2)
        refused(name, given, TypeError, f"^{key}: expected single elements")
        assert busy.computed == 45


@every_function
def test_row_09_other_devices(name):
    for key in tensors_of(name):
        for device in (2, 10, 13, -1, 2**31 - 1):
            given = arguments(name)
            given[key] = Producer(given[key], device=device)
            refused(
                name, given, TypeError, rf"^{key}: expected a tensor on the CPU; got .*{device} \(call .cpu\(\) first\)"
            )


def test_row_09_what_torch_does_not_export():
    key = Scheme(4).key
    for weight in (
        torch.randn(4, 64, requires_grad=True),
        torch.randn(4, 64, dtype=torch.complex64).conj(),
        torch.randn(4, 64, device="meta"),
        torch.randn(4, 64).to_sparse(),
    ):
        with pytest.raises((BufferError, TypeError, ValueError, RuntimeError), match=r".{20}"):
            _core.quantize_rtn(weight, key)


def test_row_09_wrapper_detaches():
    weight = torch.nn.Parameter(torch.randn(4, 64))
    negative = torch.randn(4, 64, dtype=torch.complex64).conj().imag  # a lazy negation
    for tensor in (weight, negative):
        found = bitween.quantize(tensor, Scheme(4)).dequantize()
        expected = bitween.quantize(tensor.detach().resolve_neg().numpy().copy(), Scheme(4)).dequantize()
        np.testing.assert_array_equal(found, expected)
    assert weight.requires_grad
    assert weight.grad is None


BAD_SHAPES = {
    "negative": {"shape": (-1, 70)},
    "both negative": {"shape": (-5, -70)},
    "wraps to one": {"shape": (2**32, 2**32)},
    "wraps to zero": {"shape": (2**62, 4)},
    "largest": {"shape": (2**63 - 1, 2)},
    "bytes wrap": {"shape": (2**61, 1)},
    "rows beyond reach": {"shape": (3, 3), "strides": (2**62, 1)},
    "columns beyond reach": {"shape": (3, 3), "strides": (1, -(2**63))},
    "reaches add up": {"shape": (3, 3), "strides": (2**61, 2**61)},
    "rank 0": {"shape": ()},
    "rank 9": {"shape": (1,) * 9},
    "rank -1": {"ndim": -1},
    "rank 1000000": {"ndim": 10**6},
    "no shape": {"no_shape": True},
}


@every_function
@pytest.mark.parametrize("bad", BAD_SHAPES)
def test_row_10_shapes(name, bad):
    for key in tensors_of(name):
        given = arguments(name)
        changes = {"strides": None, **BAD_SHAPES[bad]}
        given[key] = Producer(given[key], **changes)
        refused(name, given, ValueError, f"^{key}: ")


@every_function
def test_row_10_ranks(name):
    """Another rank is refused, unless it folds into the same rows."""
    for key in tensors_of(name):
        given = arguments(name)
        for rank in range(1, 9):
            array = given[key]
            if rank != array.ndim and not (name.startswith("matmul") and key in ("x", "out") and rank > 1):
                shape = (array.shape[0],) if rank == 1 else (1,) * (rank - array.ndim) + array.shape
                changed = {**given, key: Producer(array, shape=shape[-rank:] if rank > 1 else shape, strides=None)}
                refused(name, changed, ValueError, f"^{key}: expected ")


@every_function
def test_row_10_absurd_empty_shapes(name):
    for key in tensors_of(name):
        for shape in [(0, 2**63 - 1), (2**63 - 1, 0), (2**62, 0), (0, 0)]:
            given = arguments(name)
            given[key] = Producer(given[key], shape=shape, strides=None)
            found = outcome(name, given)
            if isinstance(found, Exception):
                assert re.match(rf"({key}|{key}, \w+|\w+, {key}): |\w+: expected shape", str(found)), found
            else:  # nothing to do is legal where nothing else has a shape
                assert all(result in (b"", b"None", b"0.0") for result in found[0]), found
