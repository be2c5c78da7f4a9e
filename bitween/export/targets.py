"""What other software can run: rules that restrict a plan beforehand, so that the result always loads there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bitween.scheme import Scheme, can_turn

__all__ = ["TARGETS", "Target", "find_target"]


@dataclass(frozen=True)
class Target:
    """One consumer of quantized models.

    Attributes
    ----------
    name : as options spell it
    runs : whether it has a kernel for a scheme
    fits : whether it can hold a (rows, cols) matrix under a scheme that it runs
    fuses : layers that read one tensor (q, k, v; gate, up) become one there and must share a scheme
    stacks : the matrices of all experts (their gates and ups, their downs) become one tensor and must share a scheme
    embeddings : whether the word embedding may be quantized
    turned : whether it holds turned trellis codes, and nothing else
    in_place : whether tables of positions and layers with arithmetic of their own may be quantized
    """

    name: str
    runs: Callable[[Scheme], bool]
    fits: Callable[[Scheme, tuple[int, int]], bool] = lambda scheme, shape: True
    fuses: bool = False
    stacks: bool = False
    embeddings: bool = True
    turned: bool = False
    in_place: bool = False


def _vllm(scheme: Scheme) -> bool:
    return scheme.symmetric and scheme.levels in (4, 8, 16, 32, 64, 256)


def _marlin(scheme: Scheme) -> bool:
    return (
        scheme.coding == "grid"
        and scheme.symmetric
        and scheme.bits in (4, 8)
        and scheme.group_size in (-1, 32, 64, 128)
    )


def _gguf(scheme: Scheme) -> bool:
    return scheme.coding == "grid" and scheme.group_size != 16 and (scheme.symmetric or scheme.levels < 256)


def _exl3(scheme: Scheme) -> bool:
    return scheme.turned


def _auto_round(scheme: Scheme) -> bool:
    return scheme.coding == "grid" and scheme.bits in (2, 3, 4, 5, 6, 8)


def _whole_turns(scheme: Scheme, shape: tuple[int, int]) -> bool:
    return not scheme.turned or can_turn(shape)


def _whole_groups(scheme: Scheme, shape: tuple[int, int]) -> bool:
    return scheme.group_size == -1 or shape[1] % scheme.group_size == 0


def _blocks_of_32(scheme: Scheme, shape: tuple[int, int]) -> bool:
    return shape[1] % 32 == 0


def _tiles_of_32(scheme: Scheme, shape: tuple[int, int]) -> bool:
    return shape[0] % 32 == 0 and shape[1] % 32 == 0 and _whole_groups(scheme, shape)


TARGETS = {
    target.name: target
    for target in (
        Target("any", lambda scheme: True, _whole_turns, in_place=True),
        Target("vllm", _vllm, _whole_groups, fuses=True, stacks=True, embeddings=False),
        Target("marlin", _marlin, _whole_groups, fuses=True, stacks=True, embeddings=False),
        Target("gguf", _gguf, _blocks_of_32, stacks=True),
        Target("exl3", _exl3, _whole_turns, embeddings=False, turned=True),
        Target("auto-round", _auto_round, _tiles_of_32, embeddings=False),
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
