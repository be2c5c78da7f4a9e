"""How much memory a run takes, told before it begins, and how to do with less."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from bitween.model import blocks
from bitween.model.memory import available_bytes, resident_bytes
from bitween.realise.context import BATCH_TOKENS
from bitween.realise.passes import activation_bytes, fits_one_pass

__all__ = ["MemoryNeed", "need_within"]

_LOGIT_COPIES = 6  # logits, probabilities, running sums and gradients of one window
_ALLOCATOR = 1.13  # bytes held for each byte in use, measured


@dataclass(frozen=True)
class MemoryNeed:
    """About the largest resident size of this process during a run, bytes by what takes them.

    Attributes
    ----------
    resident : there before
    copy : float32 numbers of the model in another basis
    candidate : float32 numbers of the quantized layers, which keep products at full speed during the search
    packed : layers of every stage, as they are stored
    activations : of one block, for all calibration windows at once or for a batch of them
    logits : of one window
    states : what leaves one block and what enters the head, all windows
    one_pass : each block runs once over all windows, not once a batch
    """

    resident: int
    copy: int
    candidate: int
    packed: int
    activations: int
    logits: int
    states: int
    one_pass: bool

    @property
    def total(self) -> int:
        """With what the allocator keeps."""
        parts = self.copy + self.candidate + self.packed + self.activations + self.logits + self.states
        return self.resident + int(_ALLOCATOR * parts)

    def warn(self) -> None:
        """ResourceWarning where the system has less."""
        available, resident = available_bytes(), resident_bytes()
        if available is not None and resident is not None and self.total - resident > available:
            warnings.warn(
                f"memory: about {self.total / 2**30:.1f} GiB needed; {(available + resident) / 2**30:.1f} GiB are "
                "there. max_memory, fewer calibration_samples or a shorter sequence_length need less",
                ResourceWarning,
                stacklevel=4,
            )


def need_within(
    layout: blocks.ModelLayout,
    *,
    copied: bool,
    packed: int,
    calibration: int,
    evaluation: int,
    length: int,
    max_memory: int | None = None,
) -> MemoryNeed:
    """What a run needs; with less than one pass takes where `max_memory` asks for it.

    Parameters
    ----------
    copied : the run works on a float32 copy
    packed : bytes of all stages' packed layers
    calibration, evaluation : windows
    length : tokens of a window
    max_memory : bytes that the process may take, about

    Raises
    ------
    ValueError
        Not even batches fit; the message tells the least.
    """
    numbers = sum(4 * layer.shape[0] * layer.shape[1] for layer in layout.layers)

    def need(one_pass: bool) -> MemoryNeed:
        tokens = calibration * length if one_pass else max(BATCH_TOKENS, length)
        return MemoryNeed(
            resident=resident_bytes() or 0,
            copy=numbers if copied else 0,
            candidate=numbers,
            packed=packed,
            activations=activation_bytes(layout, min(tokens, calibration * length)),
            logits=_LOGIT_COPIES * 4 * length * layout.head.shape[0],
            states=4 * (2 * calibration + evaluation) * length * layout.embedding.shape[1],
            one_pass=one_pass,
        )

    whole = need(fits_one_pass(layout, calibration * length))
    if max_memory is None or whole.total <= max_memory:
        return whole
    pieces = need(False)
    if pieces.total > max_memory:
        raise ValueError(
            f"max_memory: expected at least about {pieces.total:,} bytes for this model and this much text; "
            f"got {max_memory:,}"
        )
    return pieces
