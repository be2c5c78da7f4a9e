"""What the gradual classes work on together: the model in blocks, its text, and the reference it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import bitween
from bitween._progress import Progress, no_progress
from bitween.model import blocks
from bitween.model.attachments import check_own_weights
from bitween.model.experts import unfolded
from bitween.model.spill import Spill
from bitween.text import calibration

__all__ = ["Reference", "RunContext", "cut_text"]

BATCH_TOKENS = 2048  # of one pass through a block: products are efficient, activations stay small


@dataclass(frozen=True)
class Reference:
    """What the full-precision model says about some windows.

    Attributes
    ----------
    windows : int64 (windows, length)
    final : float32 (length, width) of each window, what enters the head: logits are recomputed from it when needed,
        since they would take vocabulary / width times the memory
    log_likelihood : float32 (windows, length - 1), ln p of each next token
    """

    windows: torch.Tensor
    final: Sequence[torch.Tensor]
    log_likelihood: torch.Tensor


def cut_text(
    model: Any,
    layout: blocks.ModelLayout,
    tokenizer: Any,
    *,
    calibration_data: Any = None,
    calibration_samples: int = 100,
    evaluation_samples: int = 200,
    selection_samples: int = 8,
    length: int = 512,
    seed: int = 0,
) -> calibration.Splits:
    """Text for a model. Sample counts are windows of `length` tokens, at most, or of what the model takes."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and limit > 0:
        length = min(length, limit)
    return calibration.prepare(
        tokenizer,
        calibration_data,
        length=length,
        calibration=calibration_samples,
        selection=selection_samples,
        certification=evaluation_samples,
        seed=seed,
        vocabulary=layout.embedding.shape[0],
    )


@dataclass
class RunContext:
    """One model under study.

    Attributes
    ----------
    model : the model in full precision; its weights are the originals
    layout : blocks.ModelLayout
    text : calibration.Splits, documents kept apart between calibration, selection and certification
    runner : blocks.BlockRunner over `model`
    spill : where numbers wait while they are not in use; by default in memory
    """

    model: Any
    tokenizer: Any
    layout: blocks.ModelLayout
    text: calibration.Splits
    runner: blocks.BlockRunner
    seed: int = 0
    progress: Progress = no_progress
    references: dict[str, dict] = field(default_factory=dict)
    spill: Spill = field(default_factory=lambda: Spill(least=None))

    @classmethod
    def build(
        cls,
        model: Any,
        tokenizer: Any,
        *,
        text: calibration.Splits | None = None,
        seed: int = 0,
        products: str = "auto",
        progress: Progress = no_progress,
        spill: Spill | None = None,
        **options: Any,
    ) -> RunContext:
        """Inspect the model, and cut the text into windows as `cut_text` does with the remaining options."""
        check_own_weights(model)
        model = unfolded(model)
        layout = blocks.inspect(model)
        if spill is None:  # numbers that are kept there come from a model that was checked
            blocks.check_finite(model)
        text = text or cut_text(model, layout, tokenizer, seed=seed, **options)
        runner = blocks.BlockRunner(model, layout, products=products)
        spill = spill or Spill(least=None)
        spill.rest_after(block.module for block in layout.blocks)
        return cls(model, tokenizer, layout, text, runner, seed, progress, spill=spill)

    def reference(self, split: str, windows: slice = slice(None)) -> Reference:
        """The original model's view of "selection" or "certification" windows; each window is computed once."""
        ids = getattr(self.text, split).ids
        wanted = range(len(ids))[windows]
        known = self.references.setdefault(split, {})
        missing = [i for i in wanted if i not in known]
        if missing:
            for i, states in zip(missing, self.final_states(self.runner, ids[missing]), strict=True):
                known[i] = states, self._likelihood(ids[i], states)
        final, likelihood = zip(*(known[i] for i in wanted), strict=True)
        return Reference(ids[windows], final, torch.stack(likelihood))

    def batches(self, windows: torch.Tensor) -> Iterator[torch.Tensor]:
        """Windows in batches of about 2,048 tokens."""
        yield from windows.split(max(1, BATCH_TOKENS // windows.shape[1]))

    def final_states(self, runner: blocks.BlockRunner, windows: torch.Tensor) -> list[torch.Tensor]:
        """What enters the head, float32 (length, width), for each window."""
        found: list[torch.Tensor] = []
        with runner:
            for ids in self.batches(windows):
                hidden, context = runner.embed(ids)
                for i in range(len(runner.layout.blocks)):
                    hidden = runner.run_block(i, hidden, context)
                found += map(self.spill.keep, runner.final(hidden).float())
        return found

    def reference_logits(self, final: torch.Tensor) -> torch.Tensor:
        """The original model's logits for rows of final states, float32 (rows, vocabulary)."""
        with self.runner:
            return self.runner.logits(final).float()

    def _likelihood(self, window: torch.Tensor, final: torch.Tensor) -> torch.Tensor:
        words = self.layout.head.shape[0]
        losses = bitween.head_cross_entropy(self.reference_logits, final[:-1], window[1:], vocabulary=words)
        return -torch.as_tensor(losses)
