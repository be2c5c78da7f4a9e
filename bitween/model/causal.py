"""Which way a model runs: block by block, as causal language models do, or only as a whole."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from bitween.model.blocks import BlockRunner, ModelLayout, inspect
from bitween.model.precision import in_float32
from bitween.model.replay import logits_of, settled
from bitween.model.whole import describe

__all__ = ["find_layout", "is_causal"]

_TOKENS = 8
_ROUNDING = 2e-5  # of logits in float32, where experts are given other numbers of tokens


def find_layout(model: nn.Module, *, run: bool = True) -> tuple[ModelLayout | None, str]:
    """The blocks of a causal language model; None, with the reason, of a module that can only run as a whole.

    Parameters
    ----------
    model : a copy that may be run
    run : also compare block by block with an ordinary pass

    Raises
    ------
    TypeError, ValueError
        What no way could work with: no matrix at all, weights that are not loaded, on several devices, or of a dtype
        other than float32, float16 and bfloat16.
    """
    describe(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None, "an encoder stands beside the decoder"
    try:
        layout = inspect(model)
        if run:
            BlockRunner(model, layout)
    except Exception as error:  # whatever a module that is no language model makes of a few token ids
        return None, f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    parts, ends = [block.module for block in layout.blocks], [layout.embedding.module, layout.head.module]
    if not is_causal(model, layout.embedding.shape[0], parts, ends):
        return None, "what it says at a position hangs on later ones, so that it is no causal language model"
    return layout, ""


def is_causal(
    model: nn.Module, vocabulary: int, blocks: Iterable[nn.Module] = (), ends: Iterable[nn.Module] = ()
) -> bool:
    """Whether logits stay the same, to the rounding of sums, when only later tokens change.

    Weights are in float32 meanwhile; those of `blocks` only while each of these runs. So are those of `ends`, embedding
    and head, at first: a model that looks at their dtype from outside may then say no, and is asked again with both in
    float32 throughout.
    """
    device = next(iter(model.parameters())).device
    ids = torch.arange(_TOKENS, device=device)[None] % vocabulary
    other, half = ids.clone(), _TOKENS // 2
    other[:, half:] = (other[:, half:] + vocabulary // 2) % vocabulary
    blocks, ends = list(blocks), list(ends)
    attempts = ([*blocks, *ends], blocks) if ends else (blocks,)
    return any(_agree(model, ids, other, half, parts) for parts in attempts)


def _agree(model: nn.Module, ids: torch.Tensor, other: torch.Tensor, half: int, parts: list[nn.Module]) -> bool:
    """Whether the first `half` tokens, equal in both, have equal logits; those of `parts` are in float32 one by one."""
    try:
        with settled(model), in_float32(model, parts), torch.no_grad():
            one, two = (logits_of(model(x)).float()[0, :half] for x in (ids, other))
    except Exception:
        return False
    spread = (one - one.mean()).abs().mean().item()
    return bool((one - two).abs().max() <= _ROUNDING * spread)
