"""How many threads the core uses: BITWEEN_NUM_THREADS, else what PyTorch uses, else the CPUs at hand."""

from __future__ import annotations

import os
import sys

from bitween import _core

__all__ = ["follow_torch", "get_num_threads", "set_num_threads"]

_fixed = False
_asked = False  # whether PyTorch's own threads can do the work


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_num_threads(n: int) -> None:
    """Use `n` threads (1 .. 1024) for each call from now on, whatever PyTorch uses."""
    global _fixed
    _core.set_num_threads(n)
    _fixed = True


def get_num_threads() -> int:
    """Threads that work on one call."""
    follow_torch()
    return _core.get_num_threads()


def follow_torch() -> None:
    """Work on PyTorch's threads where that is possible, and on as many, unless a number was set."""
    global _asked
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "get_num_threads"):
        return
    if not _asked:
        _asked = True
        _core.borrow_threads()
    if not _fixed:
        _core.set_num_threads(min(torch.get_num_threads(), 1024))


def _start() -> None:
    text = os.environ.get("BITWEEN_NUM_THREADS", "").strip()
    if not text:
        _core.set_num_threads(min(_cpus(), 1024))
        return
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= 1024):
        raise ValueError(f"BITWEEN_NUM_THREADS: expected 1 .. 1024; got {text!r}")
    set_num_threads(int(text))


_start()
