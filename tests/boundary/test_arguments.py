"""Rows 11 and 23: arguments that are not tensors, tensors that do not fit together, and every function's own list."""

from __future__ import annotations

import contextlib
import inspect

import numpy as np
import pytest

from bitween import Scheme, _core
from tests.boundary.calls import CALLS, FUNCTIONS, arguments, as_bytes, call, tensors_of

every_function = pytest.mark.parametrize("name", CALLS)


@pytest.fixture(autouse=True)
def settings_stay():
    threads = _core.get_num_threads()
    yield
    _core.set_num_threads(threads)
    _core.set_isa(None)


def test_every_function_has_its_line():
    assert sorted(CALLS) == FUNCTIONS, "tests/boundary/calls.py: one line in CALLS for every function of the core"


@every_function
def test_signature_names_the_arguments(name):
    parameters = inspect.signature(getattr(_core, name)).parameters
    assert set(arguments(name)) <= set(parameters)
    assert getattr(_core, name).__doc__
    required = {key for key, p in parameters.items() if p.default is inspect.Parameter.empty}
    for key in required:
        with pytest.raises(TypeError, match=rf"{name}\(\) missing required argument '\w+'"):
            call(name, {k: v for k, v in arguments(name).items() if k != key})
    given = arguments(name)
    for key in set(parameters) - required:
        if (name, key) != ("hessian_add", "y"):  # without y the sums have another shape
            call(name, {**given, key: None})


@every_function
def test_positions_and_keywords_are_the_same(name):
    given = arguments(name)
    order = list(inspect.signature(getattr(_core, name)).parameters)
    positions = [given.get(key) for key in order]
    expected = call(name, arguments(name))
    result = getattr(_core, name)(*positions)
    assert as_bytes(result) == expected


@every_function
def test_row_23_wrong_call(name):
    function, given = getattr(_core, name), arguments(name)
    n = len(inspect.signature(function).parameters)
    with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'levles'"):
        function(**given, levles=3)
    with pytest.raises(TypeError, match=rf"{name}\(\) takes at most {n} arguments; got {n + 1}"):
        function(*[None] * (n + 1))
    if given:
        first = next(iter(inspect.signature(function).parameters))
        with pytest.raises(TypeError, match=rf"{name}\(\) got multiple values for argument '{first}'"):
            function(given.get(first), **{first: given.get(first)})


@every_function
@pytest.mark.parametrize("value", [None, 5, 2.5, "text", [1.0, 2.0], object(), b"bytes", (), np.float32(1)], ids=type)
def test_row_08_not_a_tensor(name, value):
    for key in tensors_of(name):
        given = {**arguments(name), key: value}
        if value is None:
            continue
        if hasattr(value, "__dlpack__"):
            with pytest.raises((TypeError, ValueError, BufferError)):
                call(name, given)
        else:
            with pytest.raises(TypeError, match=f"^{key}: expected a tensor with __dlpack__ .*; got <class"):
                call(name, given)


def scalars_of(name):
    return [key for key in arguments(name) if key not in tensors_of(name)]


@every_function
@pytest.mark.parametrize(
    "value", [2.5, "4", [4], object, True, 10**30, -(2**63), float("nan"), np.array([1, 2])], ids=repr
)
def test_row_23_wrong_scalar(name, value):
    for key in scalars_of(name):
        if inspect.signature(getattr(_core, name)).parameters[key].default is False and isinstance(value, bool):
            continue
        if (
            name in ("quantize_trellis", "trellis_rates")
            and key == "bits"
            and isinstance(value, float)
            and value == 2.5
        ):
            continue  # bits of a trellis come in half steps
        if (name, key) == ("unchanged", "key") and isinstance(value, str):
            continue
        with pytest.raises((TypeError, ValueError), match=r"^\w+: expected "):
            call(name, {**arguments(name), key: value})


class Index:
    """An integer by its __index__, or an error."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value


def test_row_23_integers_are_what_has_an_index():
    codes = np.zeros((2, 8), np.uint8)
    expected = _core.pack(codes, 4)
    for levels in (np.int64(4), Index(4)):
        np.testing.assert_array_equal(_core.pack(codes, levels), expected)
    with pytest.raises(ZeroDivisionError):
        _core.pack(codes, Index(ZeroDivisionError()))


BAD_SCHEMES = [
    (4, 64), (4, 64, True, 1), [16, 64, True], None, 16, "4b g64 sym", (5, 64, False), (0, 64, False), (-16, 64, False),
    (2**32 + 16, 64, False), (16, 0, False), (16, -2, False), (16, 7, False), (16, 2**63, False), (16, 64, 1),
    (16, 64, None), (True, 64, False), (16.0, 64, False), (16, 64.0, False), ("16", 64, False),
]  # fmt: skip


@every_function
@pytest.mark.parametrize("scheme", BAD_SCHEMES, ids=repr)
def test_row_23_bad_schemes(name, scheme):
    key = next((key for key in ("scheme", "schemes") if key in arguments(name)), None)
    if key is None:
        return
    value = (scheme,) if key == "schemes" else scheme
    with pytest.raises((TypeError, ValueError), match=r"^(scheme|schemes|levels|group_size|symmetric): expected "):
        call(name, {**arguments(name), key: value})


def grown(array, axis, by):
    shape = list(array.shape)
    shape[axis] += by
    return np.zeros(shape, array.dtype)


@every_function
def test_row_11_partners_of_other_shapes(name):
    """One tensor at a time has a row or a column too many or too few, or none: both shapes are in the message."""
    keys = tensors_of(name)
    for key in keys:
        for axis in range(arguments(name)[key].ndim):
            size = arguments(name)[key].shape[axis]
            step = 1 if size < 20 else 20  # enough columns to need another group
            for by in (-step, step, -size):
                given = arguments(name)
                given[key] = grown(given[key], axis, by)
                before = {k: v.tobytes() for k, v in given.items() if isinstance(v, np.ndarray)}
                if name in ("quantize_rtn", "pack", "total") or free_axis(name, key, axis):
                    with contextlib.suppress((ValueError, IndexError) if by == -size else ()):
                        call(name, given)
                    continue
                with pytest.raises(ValueError, match=r"^\w+: expected (shape \(.*\); got \(|\d dimensions)"):
                    call(name, given)
                assert {k: v.tobytes() for k, v in given.items() if isinstance(v, np.ndarray)} == before


def free_axis(name, key, axis):
    """May this axis change alone?"""
    return (name, key, axis) in {
        ("unpack", "packed", 0),
        ("quantize_gptq", "weight", 0),
        ("quantize_trellis", "weight", 0),
        ("align", "weight", 0),
        ("cross_entropy", "logits", 1),
        ("route", "logits", 1),
        ("trellis_rates", "importance", 0),
    }


def test_row_11_zeros_and_symmetry():
    w = np.ones((3, 40), np.float32)
    for scheme in (Scheme(4, 16, True), Scheme(4, 16, False)):
        codes, scales, zeros = _core.quantize_rtn(w, scheme.key)
        wrong = np.zeros((3, 2), np.uint8) if zeros is None else None
        expected = "expected None" if zeros is None else "expected an array"
        with pytest.raises(ValueError, match=f"^zeros: {expected}, since the scheme is"):
            _core.dequantize(codes, scales, wrong, scheme.key, 40, np.empty_like(w))
        with pytest.raises(ValueError, match=f"^zeros: {expected}, since the scheme is"):
            _core.encode(w, scales, wrong, scheme.key)


@pytest.mark.parametrize("bad", [0x0000, 0x8000, 0x8001, 0x7C00, 0xFC00, 0x7E00, 0xBC00])
def test_row_27_bad_scales_are_refused(bad):
    """0, -0, negative, infinite and NaN."""
    w = np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32)
    scheme = Scheme(3, 16)
    codes, scales, zeros = _core.quantize_rtn(w, scheme.key)
    scales.view(np.uint16)[2, 3] = bad
    x, y = np.ones((2, 50), np.float32), np.empty((2, 4), np.float32)
    for work in (
        lambda: _core.dequantize(codes, scales, zeros, scheme.key, 50, np.empty_like(w)),
        lambda: _core.matmul(x, codes, scales, zeros, scheme.key, 50, None, y),
        lambda: _core.encode(w, scales, zeros, scheme.key),
    ):
        with pytest.raises(ValueError, match=r"^scales: expected finite values > 0"):
            work()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_row_17_encode_refuses_non_finite(bad):
    w = np.ones((4, 50), np.float32)
    _, scales, zeros = _core.quantize_rtn(w, Scheme(3, 16).key)
    w[3, 49] = bad
    with pytest.raises(ValueError, match=r"^weight: expected finite values"):
        _core.encode(w, scales, zeros, Scheme(3, 16).key)


def test_row_27_codes_beyond_the_scheme_are_refused():
    scheme = Scheme(1.58, 16)
    codes, scales, zeros = _core.quantize_rtn(np.ones((2, 40), np.float32), scheme.key)
    out = np.empty((2, 40), np.float32)
    for array, byte in ((codes, 243), (codes, 255), (zeros, 0xFF), (zeros, 0x03)):
        kept = array[1, 0]
        array[1, 0] = byte
        with pytest.raises(ValueError, match=r"^codes: expected codes within the scheme"):
            _core.dequantize(codes, scales, zeros, scheme.key, 40, out)
        array[1, 0] = kept
    with pytest.raises(ValueError, match=r"^codes: expected codes within the scheme"):
        _core.pack(np.full((2, 40), 3, np.uint8), 3)


@pytest.mark.parametrize("bad", [-1, 5, 2**63 - 1, -(2**63)])
def test_row_11_rows_that_do_not_exist(bad):
    given = arguments("dequantize")
    given["rows"][3] = bad
    with pytest.raises(IndexError, match=r"^rows: expected indices of rows"):
        call("dequantize", given)
    given = arguments("cross_entropy")
    given["targets"][3] = bad if bad != 5 else 70
    with pytest.raises(IndexError, match=r"^targets: expected indices of rows or classes"):
        call("cross_entropy", given)


@pytest.mark.parametrize(
    ("rows", "cols"), [(1 << 40, 1 << 40), (1 << 33, 1 << 31), (1 << 50, (1 << 14) + 1), (3, 1 << 60)]
)
def test_row_10_sizes_that_wrap_around_are_refused(rows, cols):
    """Whose product is 0, or small, in 64 bits."""
    for scheme in (Scheme(1, -1), Scheme(4, 64), Scheme(8, 16)):
        with pytest.raises(ValueError, match="size beyond the address range in layout"):
            scheme.layout(rows, cols)
