"""How long work tells what it has done."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "no_progress"]

# Called with (stage, done, total, message); done and total count the stage's steps.
Progress = Callable[[str, int, int, str], None]


def no_progress(stage: str, done: int, total: int, message: str) -> None:
    """Report nothing."""
