"""What other software can run: rules that restrict a plan beforehand, so that the result always loads there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bitween.scheme import Scheme

__all__ = ["TARGETS", "Target", "find_target"]


@dataclass(frozen=True)
class Target:
    """One consumer of quantized models.

    Attributes
    ----------
    name : as options spell it
    runs : whether it has a kernel for a scheme
    fuses : layers that read one tensor (q, k, v; gate, up) become one there and must share a scheme
    embeddings : whether the word embedding may be quantized
    """

    name: str
    runs: Callable[[Scheme], bool]
    fuses: bool = False
    embeddings: bool = True


def _vllm(scheme: Scheme) -> bool:
    return scheme.symmetric and scheme.levels in (4, 8, 16, 32, 64, 256)


def _marlin(scheme: Scheme) -> bool:
    return scheme.symmetric and scheme.bits in (4, 8) and scheme.group_size in (-1, 32, 64, 128)


TARGETS = {
    target.name: target
    for target in (
        Target("any", lambda scheme: True),
        Target("vllm", _vllm, fuses=True, embeddings=False),
        Target("marlin", _marlin, fuses=True, embeddings=False),
    )
}


def find_target(name: str) -> Target:
    """The target of this name.

    Raises
    ------
    ValueError
        naming those there are.
    """
    if name not in TARGETS:
        raise ValueError(f"export_target: expected one of {', '.join(TARGETS)}; got {name!r}")
    return TARGETS[name]
