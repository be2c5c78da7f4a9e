"""No call leaves anything behind, whether it ends well or badly."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import sys

import numpy as np
import pytest

from tests.boundary.calls import CALLS, arguments, call, tensors_of
from tests.boundary.producers import Producer, Raw

every_function = pytest.mark.parametrize("name", CALLS)


@pytest.fixture(autouse=True, scope="module")
def quick_collector():
    """Collections look at nothing older than this file, so that they take no time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def leaked(work, givens=(), times=40):
    """Python's memory blocks that every round of so many calls leaves allocated, at least; 0 when one leaves few.

    What a round keeps besides leaks, such as a grown table, it keeps once; a leak shows in every round.
    References to the arguments must not change.
    """
    least = None
    for _ in range(12):
        gc.collect()  # empties Python's free lists, too
        counts, before = [references(given) for given in givens], sys.getallocatedblocks()
        for _ in range(times):
            work()
        gc.collect()
        kept = sys.getallocatedblocks() - before
        assert [references(given) for given in givens] == counts
        least = kept if least is None else min(least, kept)
        if least < times // 2:
            return 0
    return least


def references(given):
    """Reference counts of the arrays and producers; small constants are shared with everyone."""
    return {k: sys.getrefcount(v) for k, v in given.items() if isinstance(v, (np.ndarray, Producer, Raw))}


def fails(name, given):
    try:
        call(name, given)
    except (TypeError, ValueError, BufferError, KeyError, IndexError):
        return
    raise AssertionError("expected a refusal")


def bad_calls(name):
    """(what, arguments) of calls that fail at every stage: parsing, the capsule, its tensor, the partners."""
    good = arguments(name)
    function_arguments = list(good)
    yield "unknown keyword", {**good, "levles": 1}
    for key in function_arguments:
        yield f"{key} is an object", {**good, key: object()}
    for key in tensors_of(name):
        array = good[key]
        yield f"{key} raises", {**good, key: Raw(KeyError)}
        yield f"{key} is no capsule", {**good, key: Raw(5)}
        yield f"{key} on a device", {**good, key: Producer(array, device=2)}
        yield f"{key} of version 2", {**good, key: Producer(array, major=2)}
        yield f"{key} of vectors", {**good, key: Producer(array, lanes=4)}
        yield f"{key} of complex numbers", {**good, key: Producer(array, code=5, bits=64)}
        yield f"{key} without memory", {**good, key: Producer(array, data=None)}
        yield f"{key} too large", {**good, key: Producer(array, shape=(2**32, 2**32), strides=None)}
        yield f"{key} of rank 0", {**good, key: Producer(array, shape=(), versioned=False)}
        if name not in ("quantize_rtn", "pack", "total", "cross_entropy"):
            yield f"{key} without rows", {**good, key: array[..., :0]}


@every_function
def test_good_calls_keep_nothing(name):
    given = arguments(name)
    assert leaked(lambda: call(name, given), [given]) == 0


@every_function
def test_bad_calls_keep_nothing(name):
    cases = dict(bad_calls(name))
    assert leaked(lambda: [fails(name, given) for given in cases.values()], list(cases.values())) == 0
    for what, given in cases.items():
        for producer in given.values():
            if isinstance(producer, Producer):
                assert producer.n_deleted == producer.n_exports >= 40, what
                assert producer.problems == []


@every_function
def test_memory_stays_flat(name):
    """What Python's counters do not see: the core's own memory and NumPy's, over 1,000 calls."""
    given = arguments(name, 64, 512) if name not in ("quantize_gptq", "search") else arguments(name, 8, 64)
    bad = dict(given)
    if tensors_of(name):
        bad[tensors_of(name)[-1]] = object()

    def both():
        call(name, given)
        if tensors_of(name):
            fails(name, bad)

    for _ in range(50):
        both()
    before = resident()
    for _ in range(1000 if name not in ("hessian_add", "quantize_gptq", "quantize_clip") else 200):
        both()
    assert resident() - before < 2**20, f"grew by {resident() - before:,} bytes"


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_the_meter_sees_a_leak():
    kept = []
    before = resident()
    kept.append(np.ones(5 << 20))  # 40 MiB: above what malloc serves from memory freed before
    assert resident() - before > 2**20
    assert leaked(lambda: kept.append(object())) > 30


@every_function
def test_row_33_out_of_memory(name):
    """RLIMIT_AS leaves nothing for the result: MemoryError, and the process goes on."""
    from tests import faults

    if not tensors_of(name) or name == "mirror_upper":
        return

    def work():
        small = arguments(name)
        expected = call(name, arguments(name))
        large = arguments(name, 64, 512) if name == "quantize_gptq" else arguments(name, 700, 1 << 11)
        call(name, large)  # OpenBLAS and the threads take what they keep
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 16), resource.RLIM_INFINITY))
        for _ in range(3):
            with contextlib.suppress(MemoryError):
                call(name, large)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert call(name, small) == expected
        call(name, large)

    assert faults.in_child(work) == 0
