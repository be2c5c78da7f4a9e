"""Rows 12 and 35 to 38: many threads, forks, interpreters that end, and the GIL left free."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import bitween
from bitween import Scheme, _core
from tests import faults
from tests.boundary.calls import CALLS, INSTANT, arguments, call, tensors_of
from tests.boundary.producers import Producer

WORKING = [name for name in CALLS if name not in INSTANT]
every_function = pytest.mark.parametrize("name", WORKING)


@pytest.fixture(autouse=True)
def threads_stay():
    before = _core.get_num_threads()
    yield
    _core.set_num_threads(before)


def everything(name, given):
    """Bytes of the results and of all arrays afterwards."""
    results = call(name, given)
    return results, [v.tobytes() for v in given.values() if isinstance(v, np.ndarray)]


def medium(name):
    """Large enough for several chunks."""
    return arguments(name, 40, 320) if name == "quantize_gptq" else arguments(name, 150, 1300)


@every_function
def test_row_43_any_number_of_threads_gives_the_same_bytes(name):
    found = []
    for n in (1, 2, 3, 8):
        _core.set_num_threads(n)
        found.append(everything(name, medium(name)))
    assert found.count(found[0]) == 4


@every_function
def test_row_35_threads_call_at_once(name):
    """Six threads, half on the same arrays, while another changes the number of threads."""
    shared = medium(name)
    expected = everything(name, medium(name))
    outputs = any(k in shared for k in ("out", "hessian")) and name != "quantize_gptq"
    wrong, stop = [], threading.Event()

    def caller(own):
        for _ in range(4):
            given = medium(name) if own or outputs else shared
            if everything(name, given) != expected:
                wrong.append(own)

    def changer():
        n = 0
        while not stop.is_set():
            n = n % 5 + 1
            _core.set_num_threads(n)
            time.sleep(0.0005)

    threads = [threading.Thread(target=caller, args=(i % 2 == 0,)) for i in range(6)]
    other = threading.Thread(target=changer)
    for thread in [other, *threads]:
        thread.start()
    for thread in threads:
        thread.join(60)
    stop.set()
    other.join(60)
    assert not any(thread.is_alive() for thread in [other, *threads])
    assert wrong == []


@every_function
def test_row_36_fork_after_the_first_parallel_call(name):
    _core.set_num_threads(2)
    expected = everything(name, medium(name))

    def child():
        assert everything(name, medium(name)) == expected
        assert faults.in_child(lambda: everything(name, medium(name)), timeout=30) == 0  # and a child of the child

    assert faults.in_child(child, timeout=30) == 0
    assert everything(name, medium(name)) == expected


def test_row_36_forks_while_threads_work():
    """Other threads are inside the pool at the moment of the fork; 20 children work on."""
    w = np.random.default_rng(0).standard_normal((300, 2000)).astype(np.float32)
    key, stop = Scheme(4).key, threading.Event()
    _core.set_num_threads(3)
    expected = _core.quantize_rtn(w, key)[0].tobytes()

    def busy():
        while not stop.is_set():
            _core.quantize_rtn(w, key)

    def child():
        assert _core.quantize_rtn(w, key)[0].tobytes() == expected

    threads = [threading.Thread(target=busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        assert {faults.in_child(child, timeout=30) for _ in range(20)} == {0}
    finally:
        stop.set()
        for thread in threads:
            thread.join()


_SPAWNED = """
import multiprocessing, numpy as np
from bitween import Scheme, _core
def work(seed):
    w = np.random.default_rng(seed).standard_normal((200, 500)).astype(np.float32)
    return _core.quantize_rtn(w, Scheme(3).key)[0].tobytes()
if __name__ == "__main__":
    _core.set_num_threads(2)
    expected = [work(i) for i in range(4)]
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(work, range(4)) == expected
"""


def test_row_36_worker_processes(tmp_path):
    script = tmp_path / "spawned.py"
    script.write_text(_SPAWNED)
    subprocess.run([sys.executable, script], env={"PYTHONPATH": "."}, check=True, timeout=60)


@every_function
def test_row_38_the_gil_is_free(name):
    """A thread that waits for the GIL gets it during the call: Python never takes it away by force here."""
    given = arguments(name, 60, 256) if name in ("quantize_gptq", "quantize_clip") else arguments(name, 200, 1000)
    counted, stop = [0], threading.Event()

    def counter():
        while not stop.is_set():
            counted[0] += 1
            time.sleep(0)

    thread, interval = threading.Thread(target=counter), sys.getswitchinterval()
    thread.start()
    sys.setswitchinterval(1000)
    try:
        deadline = time.monotonic() + 20
        before = counted[0]
        while counted[0] == before and time.monotonic() < deadline:
            getattr(_core, name)(**given)
        assert counted[0] > before
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()


def test_row_38_the_counter_waits_while_the_gil_is_held():
    """The test above can fail: work that keeps the GIL leaves the counter where it is."""
    counted, stop = [0], threading.Event()

    def counter():
        while not stop.is_set():
            counted[0] += 1
            time.sleep(0)

    thread, interval = threading.Thread(target=counter), sys.getswitchinterval()
    thread.start()
    sys.setswitchinterval(1000)
    time.sleep(0.02)  # requests made under the old interval are served
    try:
        before = counted[0]
        for _ in range(300):
            _core.layout(Scheme(4).key, 5, 70)
            sum(range(1000))
        assert counted[0] == before
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()


@every_function
def test_row_12_tensors_are_held_during_the_call(name):
    """While the work is on, the producer's tensor is out and not yet given back."""
    given = arguments(name, 60, 512) if name == "quantize_gptq" else arguments(name, 300, 1500)
    key = tensors_of(name)[0]
    producer = given[key] = Producer(given[key])
    thread = threading.Thread(target=call, args=(name, given))
    thread.start()
    seen = []
    while thread.is_alive():
        if producer.n_exports:
            seen.append(producer.n_deleted)
    thread.join()
    assert producer.n_deleted == producer.n_exports == 1
    assert not seen or seen[0] == 0


_LEAVING = """
import threading, time, numpy as np
from bitween import Scheme, _core
_core.set_num_threads(3)
w = np.ones((400, 3000), np.float32)
def busy():
    while True:
        _core.quantize_rtn(w, Scheme(4).key)
for _ in range(3):
    threading.Thread(target=busy, daemon=True).start()
time.sleep(0.15)
"""


def test_row_37_the_interpreter_ends_during_a_kernel():
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", _LEAVING], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr


_SUBINTERPRETER = """
import bitween, numpy as np
from bitween import Scheme, _core
w = np.ones((40, 300), np.float32)
expected = _core.quantize_rtn(w, Scheme(4).key)[0].tobytes()
import _xxsubinterpreters as interpreters
for _ in range(3):
    i = interpreters.create()
    try:
        interpreters.run_string(i, '''
import sys
sys.path[:0] = ["."]
import numpy as np
from bitween import Scheme, _core
_core.quantize_rtn(np.ones((40, 300), np.float32), Scheme(4).key)
''')
        print("works")
    except interpreters.RunFailedError as error:
        assert "ImportError" in str(error), error
        print("refused")
    interpreters.destroy(i)
    assert _core.quantize_rtn(w, Scheme(4).key)[0].tobytes() == expected
"""


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="the module of this version is called otherwise")
def test_row_37_subinterpreters_work_or_are_refused():
    done = subprocess.run([sys.executable, "-c", _SUBINTERPRETER], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= {"works", "refused"}
    assert len(done.stdout.split()) == 3


def test_row_34_ctrl_c_reaches_python_while_workers_sleep():
    """Workers are born with signals blocked, so that the interrupt wakes the thread that sleeps in Python."""
    code = (
        "import signal, time, numpy as np, bitween\n"
        "from bitween import Scheme, _core\n"
        "_core.set_num_threads(4)\n"
        "_core.quantize_rtn(np.ones((900, 900), np.float32), Scheme(4).key)\n"
        "try:\n    print('ready', flush=True)\n    time.sleep(30)\nexcept KeyboardInterrupt:\n    print('answered')\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, preexec_fn=faults.hear_ctrl_c
    )
    assert child.stdout.readline() == "ready\n"
    start = time.monotonic()
    child.send_signal(signal.SIGINT)
    assert child.stdout.readline() == "answered\n"
    assert time.monotonic() - start < 1
    child.wait(10)


class Rang(Exception):
    pass


def long_calls():
    """Calls that take seconds on any machine."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((16384, 512), np.float32)
    basis = rng.standard_normal((512, 512), np.float32)
    hessian = basis @ basis.T
    tokens = rng.standard_normal((6000, 8192), np.float32)
    schemes = tuple(Scheme(bits, 16).key for bits in (2, 3, 4, 5, 6, 8)) * 4
    return {
        "gptq": lambda: _core.quantize_gptq(weight, hessian, Scheme(2).key, 0.01, 50, 0.0),
        "search": lambda: _core.search(weight, schemes, clip=True),
        "hessian": lambda: _core.hessian_add(tokens, np.zeros((8192, 8192), np.float32)),
    }


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("name", ["gptq", "search", "hessian"])
def test_row_34_signals_are_answered_within_a_long_call(name, n_threads):
    work = long_calls()[name]
    _core.set_num_threads(n_threads)

    def ring(*_):
        assert _core.quantize_rtn(np.ones((400, 900), np.float32), Scheme(4).key)  # a handler may use the core too
        raise Rang

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        start = time.monotonic()
        with pytest.raises(Rang):
            work()
        assert time.monotonic() - start < 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(_core.quantize_rtn(np.ones((40, 300), np.float32), Scheme(4).key)) == 3


def test_threads_are_refused_out_of_range():
    for n in (0, -1, 1025, 10**6, 2**70):
        with pytest.raises(ValueError, match=r"^n: expected 1 \.\. 1024"):
            bitween.set_num_threads(n)
