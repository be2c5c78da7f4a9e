"""How much memory a run takes, told before it begins, and how to do with less."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from bitween.layers import tiles
from bitween.model import blocks
from bitween.model.head import position_blocks
from bitween.model.memory import available_bytes, resident_bytes, return_freed_memory
from bitween.realise.context import BATCH_TOKENS
from bitween.realise.passes import activation_bytes, fits_one_pass

__all__ = ["MemoryNeed", "need_within"]

_LOGIT_COPIES = 8  # logits, probabilities, running sums and gradients of some positions
_PROBED = 128  # positions that a trial of importance is scored at: every fourth of two windows of 256 tokens
_PROBED_COPIES = 5  # the untouched model's logits, the candidate's, and what their losses take
_COMPARED = 64 * 24  # bytes a word: logits of 64 tokens in float64, before and after a change of basis, and on the way
_ALLOCATOR = 1.05  # bytes held for each byte in use
_LIBRARIES = 64 << 20  # that are imported on the way, what is small, and holes of the heap between two moments of rest
_EDITING = 32 << 20  # rows of a weight in float64 while it is turned into another basis


@dataclass(frozen=True)
class MemoryNeed:
    """About the largest resident size of this process during a run: what is there before, and the largest step.

    The model in float32, what of it is quantized, states between blocks and stages that are done lie in files
    (`bitween.model.spill`); each step needs a part of them.

    Attributes
    ----------
    resident : there before
    preparing : the largest weight turned into another basis, old and new
    analysing : the head with logits of some positions and their gradients; or one block, a batch's activations and
        moments of its inputs, one factored in float64
    rounding : one block and a layer of it on its way to codes, activations for all calibration windows or a batch of
        them, and the moments of its widest layer, with their factor in float64
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
    return_freed_memory()
    resident = resident_bytes() or 0
    found = _sizes(layout, length)
    everything = calibration * length
    batch = min(max(BATCH_TOKENS, length), everything)
    states = 4 * (3 * calibration + 2 * evaluation) * length * layout.embedding.shape[1]

    def need(one_pass: bool) -> MemoryNeed:
        return MemoryNeed(
            resident=resident,
            preparing=found.preparing if copied else 0,
            analysing=max(found.gradients, found.trials, found.moments + activation_bytes(layout, batch)),
            rounding=_rounding(layout, everything if one_pass else batch),
            measuring=found.measuring,
            delivering=delivered,
            disk=(2 if copied else 1) * found.numbers + packed + states,
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


@dataclass(frozen=True)
class _Sizes:
    """Bytes of each step but for activations, whose number hangs on the text."""

    numbers: int  # of all layers in float32
    preparing: int
    gradients: int
    trials: int
    moments: int
    measuring: int


def _sizes(layout: blocks.ModelLayout, length: int) -> _Sizes:
    """What is in use at once in each step, in bytes; weights in float32, and where the CPU multiplies in bfloat16 the
    one in use also as such."""
    bf16 = tiles.cpu_has_bf16()
    cast = 3 / 2 if bf16 else 1
    embedding, head = (4 * layer.shape[0] * layer.shape[1] for layer in (layout.embedding, layout.head))
    parts = [[4 * layer.shape[0] * layer.shape[1] for layer in part.layers] for part in layout.blocks]
    block = max(map(sum, parts))
    inputs = [[layer.shape[1] for layer in part.layers] for part in layout.blocks]
    moments = max(sum(4 * n**2 for n in {*part}) + 8 * max(part, default=0) ** 2 for part in inputs)
    words = layout.head.shape[0]
    positions = next(position_blocks(length, words))
    logits = 4 * (positions.stop - positions.start) * words
    return _Sizes(
        numbers=sum(4 * x.shape[0] * x.shape[1] for x in layout.layers),
        preparing=2 * max(embedding, head) + _COMPARED * words + _EDITING,
        gradients=int(cast * head) + _LOGIT_COPIES * logits,
        trials=int(cast * head) + _PROBED_COPIES * 4 * _PROBED * words,
        moments=block + moments,
        measuring=(3 * head if bf16 else 2 * head) + _LOGIT_COPIES * logits,
    )


def _rounding(layout: blocks.ModelLayout, tokens: int) -> int:
    """Bytes in use at once while a block is rounded on the inputs of so many tokens.

    Three moments compete: the block runs, in float32 or bfloat16; moments of the widest inputs, of the untouched and of
    the quantized model, are gathered in float32; or a layer is rounded, beside six matrices of moments and factors.
    """
    bf16 = tiles.cpu_has_bf16()
    layers = [layer for part in layout.blocks for layer in part.layers]
    block = max(sum(4 * layer.shape[0] * layer.shape[1] for layer in part.layers) for part in layout.blocks)
    square = max(4 * layer.shape[1] ** 2 for layer in layers)
    inputs = tokens * max(layer.shape[1] for layer in layers)
    running = activation_bytes(layout, tokens) // (2 if bf16 else 1)
    gathering = (12 if bf16 else 8) * inputs + 2 * square
    factoring = (4 if bf16 else 8) * inputs + 6 * square + 3 * max(4 * x.shape[0] * x.shape[1] for x in layers)
    return block + 8 * tokens * layout.embedding.shape[1] + max(running, gathering, factoring)
