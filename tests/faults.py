"""Faults for tests: children that die at a chosen moment, system calls that fail at the n-th use."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator

# The calls by which bitween.store.files and the journal change the disk.
CALLS = ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "ftruncate", "pwrite")


def hear_ctrl_c() -> None:
    """For `preexec_fn`: Ctrl-C reaches the child though whoever started the tests ignores it, as a shell's `&` does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def in_child(work: Callable[[], object], kill_after: float | None = None, timeout: float = 60) -> int:
    """Run `work` in a forked child; its exit status: 0, 1 after an exception, -9 when killed.

    `kill_after` sends SIGKILL after so many seconds. A child that hangs is killed and reported as a failure.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError(f"the child did not end within {timeout} s")
        time.sleep(0.001)


@contextlib.contextmanager
def every_call(act: Callable[[int, str], None]) -> Iterator[list[int]]:
    """While inside, `act(n, name)` runs before the n-th disk-changing call (1, 2, ...). Yields [calls so far]."""
    counted = [0]
    originals = {name: getattr(os, name) for name in CALLS}
    lock = threading.Lock()

    def wrap(name: str) -> Callable:
        def call(*args, **keywords):
            with lock:
                counted[0] += 1
                n = counted[0]
            act(n, name)
            return originals[name](*args, **keywords)

        return call

    for name in CALLS:
        setattr(os, name, wrap(name))
    try:
        yield counted
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def kill_at(n: int) -> Callable[[int, str], None]:
    """An action for `every_call`: the process dies at the n-th call."""

    def act(i: int, name: str) -> None:
        if i == n:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def fail_at(n: int, number: int = errno.ENOSPC, for_good: bool = False) -> Callable[[int, str], None]:
    """An action for `every_call`: the n-th call fails, or all from the n-th on."""

    def act(i: int, name: str) -> None:
        if i == n or (for_good and i > n):
            raise OSError(number, os.strerror(number))

    return act


def until_none_is_hit(attempt: Callable[[int], int]) -> int:
    """Run attempt(1), attempt(2), ... until one makes fewer calls than its number. Returns how many were hit."""
    for n in itertools.count(1):
        if attempt(n) < n:
            return n - 1


def tree_bytes(folder) -> dict[str, bytes]:
    """Every file below a directory, by its relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
