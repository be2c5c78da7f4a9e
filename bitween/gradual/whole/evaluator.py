"""How far a candidate is from the module that it came from, example by example, and the proof on held-out ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import bitween
from bitween.gradual.budget import Budget
from bitween.gradual.proof import certificate
from bitween.gradual.utils import perplexity_increase
from bitween.model.outputs import Answer
from bitween.model.replay import settled
from bitween.realise.whole_context import WholeContext

__all__ = ["WholeEvaluator", "WholeMeasurement"]


@dataclass(frozen=True)
class WholeMeasurement:
    """One candidate on the selection examples.

    Attributes
    ----------
    damage : mean over examples of KL in nats, or of the squared error relative to the outputs' variance
    standard_error : of `damage`, over examples
    spent : what counts against the budget: nats of ln perplexity ratio, damage, or the drop of the metric
    reference, value : perplexity or metric of the original and of the candidate; NaN for a budget of damage
    agreement : share of rows of the output in which both put the same number first
    tokens : rows measured
    """

    damage: float
    standard_error: float
    spent: float
    reference: float
    value: float
    agreement: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: what is not finite is None."""
        return {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in asdict(self).items()}


class WholeEvaluator:
    """Compares candidates with the module of a context, in the unit of a budget.

    Parameters
    ----------
    context : WholeContext
    budget : Budget
    """

    def __init__(self, context: WholeContext, budget: Budget):
        self.context, self.budget = context, budget
        self._scores: np.ndarray | None = None  # of the metric for the original

    @property
    def proves(self) -> bool:
        """Whether the budget can be proven: no spread can be told of a metric that gives one number."""
        return self.budget.kind != "metric" or len(self._metric(self.context.model)) > 1

    def measure(self, candidate: nn.Module) -> WholeMeasurement:
        """A candidate on the selection examples; of a metric that gives a number an example, on every other one."""
        rows = self._rows(candidate, "selection")
        damage, gain, weight = (np.array([row[i] for row in rows], np.float64) for i in (0, 1, 2))
        spread = float(damage.std(ddof=1)) / math.sqrt(len(damage)) if len(damage) > 1 else math.nan
        reference = value = math.nan
        if self.budget.kind == "metric":
            before, after = self._metric(self.context.model)[::2], self._metric(candidate)[::2]
            reference, value = float(before.mean()), float(after.mean())
            spent = reference - value
        elif self.budget.kind == "perplexity":
            spent = float((gain * weight).sum() / weight.sum())
            nll = np.array([row[4] for row in rows])
            reference = math.exp(min(float((nll * weight).sum() / weight.sum()), 700.0))
            value = reference * (1 + perplexity_increase(spent))
        else:
            spent = float(damage.mean())
        agreement = float(np.array([row[3] for row in rows]).sum() / weight.sum())
        return WholeMeasurement(float(damage.mean()), spread, spent, reference, value, agreement, int(weight.sum()))

    def certify(
        self,
        candidate: nn.Module,
        *,
        confidence: float = 0.95,
        keep: Callable[[str, Callable[[], np.ndarray]], np.ndarray] = lambda _, work: work(),
    ) -> certificate.Certificate:
        """Prove on examples that nothing has seen so far that a candidate stays within the budget.

        Paired differences, example by example, under the same statistics as for text. Of a metric that gives a number
        an example, those that did not steer the search.
        """
        settings = {"budget": self.budget.limit, "confidence": confidence}
        if self.budget.kind == "metric":
            return self._certify_metric(candidate, keep, settings)
        examples = self.context.examples
        weights = [1] * len(examples.certification)
        if self.budget.kind == "perplexity":
            weights = [self._weight(i) for i in range(len(weights))]
        place = 1 if self.budget.kind == "perplexity" else 0

        def measure(first: int, last: int) -> np.ndarray:
            rows = self._rows(candidate, "certification", range(first, last))
            return np.array([row[place] for row in rows], np.float64)

        return certificate.certify(
            lambda first, last: keep(f"examples {first} to {last}", lambda: measure(first, last)),
            weights,
            np.array(examples.document["certification"]),
            text=str(examples.report.get("source", "")),
            of="perplexity" if self.budget.kind == "perplexity" else f"damage, {self.budget.unit},",
            **settings,
        )

    # ---- inside ----------------------------------------------------------------------------------

    def _certify_metric(self, candidate: nn.Module, keep: Callable, settings: dict) -> certificate.Certificate:
        before, after = self._metric(self.context.model), self._metric(candidate)
        differences = (before - after)[1::2]  # those that did not steer the search
        return certificate.certify(
            lambda first, last: keep(f"examples {first} to {last}", lambda: differences[first:last]),
            [1] * len(differences),
            of="metric down by",
            text="the metric's own",
            **settings,
        )

    def _metric(self, model: nn.Module) -> np.ndarray:
        """The user's metric as an array: one number, or one an example."""
        if model is self.context.model and self._scores is not None:
            return self._scores
        with settled(model), torch.no_grad():
            given = self.budget.metric(model)
        try:
            scores = np.atleast_1d(np.asarray(torch.as_tensor(given).detach().cpu().double()))
        except (TypeError, ValueError, RuntimeError):  # what torch says of None, of words, of objects
            scores = np.empty(0)
        if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
            raise ValueError(f"metric: expected a finite number, or one an example; got {given!r}")
        if model is self.context.model:
            self._scores = scores
        elif self._scores is not None and len(scores) != len(self._scores):
            raise ValueError(f"metric: expected {len(self._scores)} numbers as before; got {len(scores)}")
        return scores

    def _weight(self, i: int) -> int:
        labels = self.context.examples.certification[i].inputs.get("labels")
        if isinstance(labels, torch.Tensor):
            labels = labels[:, 1:] if self.context.shifted else labels
            return max(1, int((labels != -100).sum()))
        return 1

    def _rows(self, candidate: nn.Module, split: str, which: range | None = None) -> list[tuple]:
        """(damage, gain, rows, rows alike, reference nll) of each example."""
        examples = getattr(self.context.examples, split)
        found = []
        for i in which if which is not None else range(len(examples)):
            reference = self.context.reference(split, i)
            answers = self.context.answer(candidate, examples[i])
            found.append(self._compare(reference, answers))
        return found

    def _compare(self, reference: dict[str, Answer], answers: dict[str, Answer]) -> tuple:
        damage = gain = nll = alike = 0.0
        rows = 0
        for name, ref in reference.items():
            cand = answers[name]
            if not bool(torch.isfinite(cand.values).all()):  # a candidate that overflowed has lost everything
                return math.inf, math.inf, len(ref.values), 0.0, 0.0
            damage += self._distance(name, ref.values, cand.values)
            rows += len(ref.values)
            alike += float((ref.values.argmax(-1) == cand.values.argmax(-1)).sum())
            if ref.labels is not None and self.context.kind == "kl":
                before, after = (float(np.mean(bitween.cross_entropy(x.values, ref.labels))) for x in (ref, cand))
                gain, nll = after - before, before
        return damage / len(reference), gain, rows, alike, nll

    def _distance(self, name: str, ref: torch.Tensor, cand: torch.Tensor) -> float:
        if self.context.kind == "kl":
            return float(np.mean(bitween.kl_divergence(ref.contiguous(), cand.contiguous()), dtype=np.float64))
        return float((cand.double() - ref.double()).pow(2).mean()) / self.context.spread[name]
