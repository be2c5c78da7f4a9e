"""How long work tells what it has done."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "no_progress", "tell"]

# Called with (stage, done, total, message); done and total count the stage's steps.
Progress = Callable[[str, int, int, str], None]


def no_progress(stage: str, done: int, total: int, message: str) -> None:
    """Report nothing."""


def tell(progress: Progress, sentence: str) -> None:
    """Say what is being tried and why, where the callback wants to hear it: it then has a `tell` of its own."""
    listen = getattr(progress, "tell", None)
    if listen is not None:
        listen(sentence)
