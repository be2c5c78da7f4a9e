"""How much memory a run takes, told before it begins, and how to do with less."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from bitween.model import blocks
from bitween.model.head import position_blocks
from bitween.model.memory import available_bytes, resident_bytes
from bitween.realise.context import BATCH_TOKENS
from bitween.realise.passes import activation_bytes, fits_one_pass

__all__ = ["MemoryNeed", "need_within"]

_LOGIT_COPIES = 8  # logits, probabilities, running sums and gradients of some positions
_ALLOCATOR = 1.1  # bytes held for each byte in use
_LIBRARIES = 80 << 20  # that are imported on the way, and what is small
_EDITING = 56 << 20  # rows of a weight in float64 while it is turned into another basis


@dataclass(frozen=True)
class MemoryNeed:
    """About the largest resident size of this process during a run: what is there before, and the largest step.

    The model in float32, what of it is quantized, states between blocks and stages that are done lie in files
    (`bitween.model.spill`); each step needs a part of them.

    Attributes
    ----------
    resident : there before
    preparing : the largest weight turned into another basis, old and new
    analysing : the head, one block, logits of some positions with their gradients, a batch's activations
    rounding : one block as it was and as quantized, its activations for all calibration windows or a batch of them, and
        the moments of its widest layer
    measuring : the head as it was, as quantized, and the difference; logits of some positions
    delivering : the packed model
    disk : bytes in files, at most about
    one_pass : each block runs once over all windows, not once a batch
    """

    resident: int
    preparing: int
    analysing: int
    rounding: int
    measuring: int
    delivering: int
    disk: int
    one_pass: bool

    @property
    def total(self) -> int:
        """Of the largest step, with what the allocator keeps."""
        step = max(self.preparing, self.analysing, self.rounding, self.measuring, self.delivering)
        return self.resident + _LIBRARIES + int(_ALLOCATOR * step)

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
    delivered: int,
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
    delivered : bytes of the model that comes out
    calibration, evaluation : windows
    length : tokens of a window
    max_memory : bytes that the process may take, about

    Raises
    ------
    ValueError
        Not even batches fit; the message tells the least.
    """
    numbers = sum(4 * layer.shape[0] * layer.shape[1] for layer in layout.layers)
    ends = [4 * layer.shape[0] * layer.shape[1] for layer in (layout.embedding, layout.head)]
    block = max(sum(4 * layer.shape[0] * layer.shape[1] for layer in part.layers) for part in layout.blocks)
    widest = max(layer.shape[1] for part in layout.blocks for layer in part.layers)
    positions = next(position_blocks(length, layout.head.shape[0]))
    logits = 4 * (positions.stop - positions.start) * layout.head.shape[0]
    batch = activation_bytes(layout, min(max(BATCH_TOKENS, length), calibration * length))
    states = 4 * (3 * calibration + 2 * evaluation) * length * layout.embedding.shape[1]

    def need(one_pass: bool) -> MemoryNeed:
        activations = activation_bytes(layout, calibration * length) if one_pass else batch
        return MemoryNeed(
            resident=resident_bytes() or 0,
            preparing=2 * max(ends) + _EDITING if copied else 0,
            analysing=ends[1] + block + _LOGIT_COPIES * logits + batch,
            rounding=2 * block + activations + 4 * 4 * widest**2,
            measuring=2 * ends[1] + ends[1] // 2 + _LOGIT_COPIES * logits,
            delivering=delivered,
            disk=(2 if copied else 1) * numbers + packed + states,
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
