"""How far a candidate is from the model it came from: KL, perplexity with its interval, memory.

Damage is the mean over tokens of KL(reference || candidate) in nats. Products run in bfloat16 where the CPU has
it; logits are then computed as the reference's plus what the candidate adds, so that rounding, which would drown
small damage, cancels: base + head(h_q - h) + (W_q - W) h.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

import bitween
from bitween.gradual.measurement import Measurement, summary
from bitween.gradual.proof import by_domain, certificate
from bitween.gradual.proof.tails import tails
from bitween.gradual.utils import budget_nats
from bitween.model import blocks
from bitween.model.head import position_blocks
from bitween.realise.context import Reference, RunContext
from bitween.text.calibration import Splits
from bitween.text.control_tokens import control_tokens

__all__ = ["Evaluation", "GradualEvaluator", "Measurement"]

_CHUNK = 1 << 20  # numbers of two heads that are compared at once


@dataclass(frozen=True)
class Evaluation:
    """Result of `GradualEvaluator.comprehensive_evaluation`: quality on held-out text and memory in bytes."""

    quality: Measurement
    memory: Any
    certificate: Any = None

    def to_dict(self) -> dict[str, Any]:
        """Nested plain numbers, for JSON."""
        proof = None if self.certificate is None else self.certificate.to_dict()
        return {"quality": self.quality.to_dict(), "memory": self.memory.to_dict(), "certificate": proof}

    def __str__(self) -> str:
        lines = [str(self.quality), str(self.memory)]
        return "\n".join(lines if self.certificate is None else [*lines, str(self.certificate)])


class GradualEvaluator:
    """Compares candidates with one reference model.

    Parameters
    ----------
    model, tokenizer
        The reference, in full precision.
    context : RunContext, optional
        Shared with the other gradual classes; built from the remaining options otherwise.
    **options
        As for `RunContext.build`: calibration_data, evaluation_samples, length, seed, ...
    """

    def __init__(self, model: Any, tokenizer: Any, *, context: RunContext | None = None, **options: Any):
        self.context = context or RunContext.build(model, tokenizer, **options)

    def measure(self, candidate: Any = None, *, split: str = "selection", stride: int = 1) -> Measurement:
        """KL and perplexity of a candidate model on "selection" or "certification" windows.

        Parameters
        ----------
        candidate : model of the same tokens; default the reference itself, which shows the noise of the arithmetic
        stride : score every stride-th position only; the head is computed for these alone
        """
        reference = self.context.reference(split)
        runner = self._runner(candidate)
        return self.measure_states(self.context.final_states(runner, reference.windows), runner, reference, stride)

    def measure_states(
        self, final: Sequence[torch.Tensor], runner: blocks.BlockRunner, reference: Reference, stride: int = 1
    ) -> Measurement:
        """The same from final states (length, width) of each window that are already computed."""
        divergence, gain, agree = self._score(_quality, final, runner, reference, stride)
        nll = -reference.log_likelihood[:, ::stride].double().numpy()
        return summary(divergence, gain, agree, nll, reference.by_domain())

    def log_ratios(self, candidate: Any, *, split: str = "certification", windows: slice = slice(None)) -> np.ndarray:
        """ln p_reference - ln p_candidate of each next token, float64 (windows, length - 1)."""
        part = self.context.reference(split, windows)
        runner = self._runner(candidate)
        return self._score(_gain, self.context.final_states(runner, part.windows), runner, part, 1)[0]

    def certify(
        self,
        candidate: Any,
        max_perplexity_increase: float,
        *,
        confidence: float = 0.95,
        budgets: Mapping[str, float] | None = None,
        keep: Callable[[str, Callable[[], np.ndarray]], np.ndarray] = lambda _, work: work(),
    ) -> certificate.Certificate:
        """Prove on held-out documents that a candidate's perplexity increase is within the budget in every domain.

        Parameters
        ----------
        candidate : model, or a BlockRunner over one
        max_perplexity_increase : relative, 0.05 = 5 %
        confidence : one-sided
        budgets : {domain: relative increase allowed there instead}
        keep : called with a name and the work that measures some windows; returns its result, or that of an earlier run

        Returns
        -------
        certificate.Certificate; text of each domain is drawn in a few looks until the answer is clear or it ends. Of
        several domains it is what `by_domain.together` makes of theirs.
        """
        text = self.context.text

        control = control_tokens(self.context.tokenizer)

        def prove(name: str, first: int, last: int) -> certificate.Certificate:
            documents, seen = text.certification.document[first:last].numpy(), []

            def measure(a: int, b: int) -> np.ndarray:
                rows = slice(first + a, first + b)
                work = partial(self._certified, candidate, rows, list(control.values()))
                seen.append(keep(f"windows {first + a} to {first + b}", work))
                return seen[-1][0].mean(axis=1)

            found = certificate.certify(
                measure,
                [text.certification.ids.shape[1] - 1] * (last - first),
                documents,
                budget=budget_nats((budgets or {}).get(name, max_perplexity_increase)),
                confidence=confidence,
                text=str(text.report["source"]) if len(text.domains) == 1 else name,
            )
            gain, changed, *mass = np.concatenate(seen, axis=1)
            pairs = dict(zip(control, zip(mass[::2], mass[1::2], strict=True), strict=True))
            return replace(found, tails=tails(gain, changed, pairs, documents[: len(gain)], confidence))

        return by_domain.together(
            {name: prove(name, *span) for name, span in _spans(text).items()}, str(text.report["source"]), text.domains
        )

    def comprehensive_evaluation(
        self, candidate: Any = None, *, max_perplexity_increase: float | None = None
    ) -> Evaluation:
        """Perplexity, KL and memory of a candidate on the certification text; with a budget, a certificate too."""
        from bitween.model.memory import analyze_memory

        target = self.context.model if candidate is None else candidate
        proof = None if max_perplexity_increase is None else self.certify(target, max_perplexity_increase)
        memory = analyze_memory(target, original=self.context.model)
        return Evaluation(self.measure(target, split="certification"), memory, proof)

    # ---- inside ----------------------------------------------------------------------------------

    def _certified(self, candidate: Any, windows: slice, control: list[list[int]]) -> np.ndarray:
        """(2 + 2 kinds, windows, length - 1): ln p_ref - ln p_q, 1 where the first choice changed, and the probability
        of each kind of control tokens by the reference and the candidate."""
        part = self.context.reference("certification", windows)
        runner = self._runner(candidate)
        judge = partial(_proof, control)
        return np.stack(self._score(judge, self.context.final_states(runner, part.windows), runner, part, 1))

    def _runner(self, candidate: Any) -> blocks.BlockRunner:
        if candidate is None or candidate is self.context.model:
            return self.context.runner
        if isinstance(candidate, blocks.BlockRunner):
            return candidate
        layout = blocks.inspect(candidate)
        words, own = layout.head.shape[0], self.context.layout.head.shape[0]
        if words != own:
            raise ValueError(f"candidate: expected a model of the reference's {own:,} tokens; got one of {words:,}")
        return blocks.BlockRunner(candidate, layout, products=self.context.runner.products, check=False)

    def _score(
        self,
        judge: _Judge,
        final: Sequence[torch.Tensor],
        runner: blocks.BlockRunner,
        reference: Reference,
        stride: int,
    ) -> tuple[np.ndarray, ...]:
        """What `judge` says of each position, every part as float64 (windows, positions)."""
        change = _HeadChange(self.context.runner, runner)
        rows = []
        for w, (ids, ref, cand) in enumerate(zip(reference.windows, reference.final, final, strict=True)):
            ref, cand, targets = ref[:-1][::stride], cand[:-1][::stride], ids[1:][::stride]
            known = reference.log_likelihood[w, ::stride].numpy()
            scored = []
            for part in position_blocks(len(targets), self.context.layout.head.shape[0]):
                base = self.context.reference_logits(ref[part])
                lost = not torch.isfinite(cand[part]).all()  # a candidate that overflowed has lost everything
                logits = None if lost else change.logits(base, ref[part], cand[part])
                scored.append(judge(base, logits, targets[part], known[part]))
            rows.append([np.concatenate(kind) for kind in zip(*scored, strict=True)])
        return tuple(np.stack(kind).astype(np.float64) for kind in zip(*rows, strict=True))


# (reference logits, the candidate's or None when they are lost, next tokens, their log-likelihoods by the reference)
_Judge = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor, np.ndarray], tuple[np.ndarray, ...]]


def _gain(base: torch.Tensor, logits: torch.Tensor | None, targets: torch.Tensor, known: np.ndarray) -> tuple:
    """(ln p_ref - ln p_q)."""
    if logits is None:
        return (np.full(len(targets), math.inf),)
    return (np.asarray(bitween.cross_entropy(logits, targets)) + known,)


def _quality(base: torch.Tensor, logits: torch.Tensor | None, targets: torch.Tensor, known: np.ndarray) -> tuple:
    """(KL, ln p_ref - ln p_q, same first choice)."""
    gain = _gain(base, logits, targets, known)
    if logits is None:
        return *gain, *gain, np.zeros(len(targets))
    same = base.argmax(-1) == logits.argmax(-1)
    return np.asarray(bitween.kl_divergence(base, logits)), *gain, same.numpy()


def _proof(
    control: list[list[int]], base: torch.Tensor, logits: torch.Tensor | None, targets: torch.Tensor, known: np.ndarray
) -> tuple:
    """(ln p_ref - ln p_q, another first choice, p_ref and p_q of each kind of control tokens)."""
    gain = _gain(base, logits, targets, known)
    before = _mass(base, control, targets, known)
    if logits is None:
        lost = np.zeros(len(targets))
        return *gain, np.ones(len(targets)), *(part for mass in before for part in (mass, lost))
    changed = (base.argmax(-1) != logits.argmax(-1)).numpy()
    both = zip(before, _mass(logits, control, targets, known - gain[0]), strict=True)
    return *gain, changed, *(part for pair in both for part in pair)


def _mass(
    logits: torch.Tensor, control: list[list[int]], targets: torch.Tensor, log_likelihood: np.ndarray
) -> list[np.ndarray]:
    """Probability of each set of tokens together (rows,); the rows' normalisers follow from the targets' likelihoods,
    without another look at the whole vocabulary."""
    total = logits.gather(1, targets[:, None])[:, 0].float() - torch.as_tensor(log_likelihood)
    return [(torch.logsumexp(logits[:, ids].float(), -1) - total).exp().numpy() for ids in control]


class _HeadChange:
    """Logits of a candidate: in half precision as the reference's plus what the candidate changes, so that rounding
    cancels; in float32, which rounds too little to matter, by the candidate's own head, in one product."""

    def __init__(self, reference: blocks.BlockRunner, candidate: blocks.BlockRunner):
        self.candidate = candidate
        same = candidate.layout.head.shape == reference.layout.head.shape
        exact = reference.products == "fp32" and all(_in_float32(x.layout.head) for x in (reference, candidate))
        self.linear = reference.plain_logits and same and not exact
        self.delta = None
        if self.linear and reference is not candidate:
            self.delta = _weight_change(reference.layout.head, candidate.layout.head)

    def logits(self, base: torch.Tensor, ref: torch.Tensor, cand: torch.Tensor) -> torch.Tensor:
        """float32 (rows, vocabulary); base are the reference's logits of `ref`."""
        with self.candidate, torch.no_grad():
            if not self.linear:
                return self.candidate.logits(cand, products="fp32").float()
            added = self.candidate.logits(cand - ref)
            bias = self.candidate.layout.head.module.bias
            logits = base + (added if bias is None else added.float() - bias.float())
            if self.delta is not None:  # straight into the sum: each copy of logits takes as long as their loss
                logits += ref.to(self.delta.dtype) @ self.delta.T
        return logits


def _in_float32(head: blocks.Layer) -> bool:
    return head.quantized or head.weight.dtype == torch.float32


def _weight_change(reference: blocks.Layer, candidate: blocks.Layer) -> torch.Tensor | None:
    """W_q - W of the head in bfloat16 (vocabulary, width); None when they are one and the same."""
    weight = candidate.module.dequantize(torch.float32) if candidate.quantized else candidate.weight
    if weight.data_ptr() == reference.weight.data_ptr():
        return None
    delta = torch.empty_like(weight, dtype=torch.bfloat16)
    step = max(1, _CHUNK // weight.shape[1])
    for first in range(0, len(weight), step):  # never is the whole difference there in float32
        rows = slice(first, first + step)
        delta[rows] = weight[rows].float() - reference.weight[rows].float()
    return delta if delta.any() else None


def _spans(text: Splits) -> dict[str, tuple[int, int]]:
    """First and last + 1 of each domain's windows of certification, which stand together."""
    domain = text.certification.domain.numpy()
    found = {name: np.flatnonzero(domain == place) for place, name in enumerate(text.domains)}
    return {name: (int(rows[0]), int(rows[-1]) + 1) for name, rows in found.items() if len(rows)}
