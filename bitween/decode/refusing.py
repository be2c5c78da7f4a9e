"""What is raised where a decoder is none that the core can run."""

from __future__ import annotations

__all__ = ["UnrecognisedError", "refuse"]


class UnrecognisedError(Exception):
    """A decoder that the core cannot run; the text says why."""


def refuse(reason: str) -> UnrecognisedError:
    return UnrecognisedError(reason)
