"""What the gradual classes work on together: the model in blocks, its text, and the reference it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import bitween
from bitween._progress import Progress, no_progress
from bitween.model import blocks
from bitween.model.attachments import check_own_weights
from bitween.model.experts import unfolded
from bitween.model.spill import Spill
from bitween.text import calibration, mix

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
    domain, domains : int64 (windows,), places of the windows' kinds of text in these names
    """

    windows: torch.Tensor
    final: Sequence[torch.Tensor]
    log_likelihood: torch.Tensor
    domain: torch.Tensor | None = None
    domains: tuple[str, ...] = ("text",)

    def by_domain(self) -> dict[str, np.ndarray]:
        """{domain: indices of its windows}; empty where there is one domain only."""
        if self.domain is None or len(self.domains) < 2:
            return {}
        return {name: np.flatnonzero(self.domain.numpy() == place) for place, name in enumerate(self.domains)}


def cut_text(
    model: Any,
    layout: blocks.ModelLayout,
    tokenizer: Any,
    *,
    calibration_data: Any = None,
    domains: Any = None,
    calibration_samples: int = 100,
    evaluation_samples: int = 200,
    selection_samples: int | None = None,
    length: int = 512,
    seed: int = 0,
    bounded: bool = True,
) -> calibration.Splits:
    """Text for a model: `calibration_data` and `domains` are what `mix.checked` takes, or the Mix that it gave.

    Sample counts are windows of `length` tokens, at most, or of what the model takes, of all domains together; left
    out, 8 windows are for selection, or two of each domain where that is more. With `bounded`, a domain too small for a
    bound is refused.
    """
    data = (
        calibration_data if isinstance(calibration_data, mix.Mix) else mix.checked(calibration_data, domains, tokenizer)
    )
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and limit > 0:
        length = min(length, limit)
    return mix.prepare(
        tokenizer,
        data,
        length=length,
        calibration_windows=calibration_samples,
        selection=max(8, 2 * len(data.sources)) if selection_samples is None else selection_samples,
        certification=evaluation_samples,
        seed=seed,
        bounded=bounded,
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
        domain = getattr(self.text, split).domain[windows]
        return Reference(ids[windows], final, torch.stack(likelihood), domain, self.text.domains)

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
