"""What quantizing a module as a whole works on: the module, examples of its inputs, and what it answers to them."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bitween._progress import Progress, no_progress
from bitween.model.attachments import check_own_weights
from bitween.model.experts import shared_copy, unfolded
from bitween.model.layout import check_finite
from bitween.model.outputs import KINDS, Answer, answer_of, find_kind, tensors_of
from bitween.model.replay import settled
from bitween.model.whole import WholeLayout, describe, trace_order
from bitween.text.examples import Example, ExampleSplits, Signature

__all__ = ["WholeContext", "float32_copy", "run_on", "signature_of"]

_KEPT_BYTES = 1 << 29  # of reference answers held in memory; those of larger vocabularies are computed anew
_REPEATED = 16  # examples whose answers are compared with themselves, at most
_ENOUGH = 64  # numbers that are the same are no chance
_TRIED = 4  # examples of different shapes that are run before any work

_DIMENSIONS = {"input_ids": 2, "pixel_values": 4, "input_values": 2, "input_features": 3, "inputs_embeds": 3}


def signature_of(model: nn.Module) -> Signature:
    """What the model's forward takes."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = [p for p in named if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    main = getattr(model, "main_input_name", None)
    known = (main, _DIMENSIONS[main]) if main in _DIMENSIONS else None
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters) and not hasattr(model, "config")
    names = None if anything else tuple(p.name for p in named)
    decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return Signature(names, max(1, len(needed)), known, decoder)


def float32_copy(model: nn.Module) -> nn.Module:
    """A copy that shares every number that is float32 already; the others are float32 in it."""
    with suppress(Exception):  # experts become layers, where the model can be run on token ids alone
        model = unfolded(model)
    base = shared_copy(model)
    for tensor in (*base.parameters(), *base.buffers()):
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor.data = tensor.data.float()
    return base


def run_on(model: nn.Module, example: Example) -> Any:
    """What the model returns for an example, whose numbers are given to it in float32."""

    def given(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16, torch.float64):
            return value.float()
        return value

    kwargs = {name: given(value) for name, value in example.kwargs.items()}
    return model(*(given(value) for value in example.args), **kwargs)


@dataclass
class WholeContext:
    """One module under study.

    Attributes
    ----------
    model : in float32; its weights are the originals
    layout : its matrices
    examples : for calibration, selection and certification
    kind : "kl" or "error", how answers are compared
    shifted : a causal language model, whose positions say the next token
    groups : names of layers in the order of execution, those that read one tensor together
    repeated : names of layers that run more than once an example
    spread : {name of an output: mean square of its numbers around their mean}, for kind "error"
    """

    model: nn.Module
    layout: WholeLayout
    examples: ExampleSplits
    kind: str
    shifted: bool = False
    seed: int = 0
    progress: Progress = no_progress
    groups: tuple[tuple[str, ...], ...] = ()
    repeated: frozenset[str] = frozenset()
    spread: dict[str, float] = field(default_factory=dict)
    _answers: dict[tuple[str, int], dict[str, Answer]] = field(default_factory=dict, repr=False)
    _held: int = 0

    @classmethod
    def build(
        cls,
        model: nn.Module,
        examples: ExampleSplits,
        *,
        kind: str | None = None,
        shifted: bool = False,
        seed: int = 0,
        progress: Progress = no_progress,
    ) -> WholeContext:
        """Describe a module, float32, and run it on a few examples.

        Raises
        ------
        ValueError
            The module refuses its inputs, gives no tensor, or gives another answer when it is asked again.
        """
        check_own_weights(model)
        check_finite(model)
        layout = describe(model)
        out = _tried(model, examples.calibration)
        kind = kind or find_kind(model, out)
        if kind not in KINDS:
            raise ValueError(f"damage: expected one of {', '.join(KINDS)}; got {kind!r}")
        context = cls(model, layout, examples, kind, shifted, seed, progress)
        with settled(model), torch.no_grad():
            first = examples.calibration[0]
            context.groups, context.repeated = trace_order(model, layout, lambda: run_on(model, first))
        if not context.groups:
            raise ValueError("model: expected its forward pass to run at least one of its matrices; it runs none")
        context._measure_spread()
        return context

    @property
    def has_labels(self) -> bool:
        """Whether examples say what the answer to each position of a text should be."""
        answers = self.reference("calibration", 0).values()
        out = tensors_of(self.run(self.model, self.examples.calibration[0])).values()
        deep = all(x.ndim == 3 for x in out)
        return self.kind == "kl" and deep and all(answer.labels is not None for answer in answers)

    def run(self, model: nn.Module, example: Example) -> Any:
        """The output of a model, the original or a candidate, held in evaluation mode."""
        with settled(model), torch.no_grad():
            return run_on(model, example)

    def answer(self, model: nn.Module, example: Example) -> dict[str, Answer]:
        """The rows of a model's output that count."""
        return answer_of(self.run(model, example), example.inputs, self.kind, shifted=self.shifted)

    def reference(self, split: str, i: int) -> dict[str, Answer]:
        """What the original answers to an example; held where that takes little memory."""
        key = split, i
        if key in self._answers:
            return self._answers[key]
        found = self.answer(self.model, getattr(self.examples, split)[i])
        size = sum(answer.values.nbytes for answer in found.values())
        if self._held + size <= _KEPT_BYTES:
            self._answers[key] = found
            self._held += size
        return found

    def _measure_spread(self) -> None:
        sums: dict[str, list[float]] = {}
        for i in range(len(self.examples.calibration) if self.kind == "error" else 0):
            for name, answer in self.reference("calibration", i).items():
                x = answer.values.double()
                total = sums.setdefault(name, [0.0, 0.0, 0.0])
                for place, value in enumerate((x.numel(), x.sum().item(), x.pow(2).sum().item())):
                    total[place] += value
        for name, (count, total, squares) in sums.items():
            variance = squares / count - (total / count) ** 2
            self.spread[name] = variance if variance > 1e-12 * squares / count else max(squares / count, 1e-30)


def _tried(model: nn.Module, examples: Sequence[Example]) -> Any:
    """The output for the first example; a few of other shapes are run too."""
    different = list({example.signature: example for example in reversed(examples)}.values())[::-1][:_TRIED]
    outputs = []
    with settled(model), torch.no_grad():
        for i, example in enumerate(different):
            try:
                outputs.append(run_on(model, example))
            except Exception as error:
                given = _shapes(example)
                raise ValueError(
                    f"calibration_data: expected inputs that {type(model).__name__} takes; example {i} ({given}) was "
                    f"refused: {type(error).__name__}: {error}"
                ) from error
        first = tensors_of(outputs[0])
        if not first:
            raise ValueError(
                f"model: expected an output with a tensor of numbers; got {type(outputs[0]).__name__} without any"
            )
        _check_repeats(model, outputs[0], different[0], examples)
    return outputs[0]


def _check_repeats(model: nn.Module, output: Any, first: Example, examples: Sequence[Example]) -> None:
    """ValueError where the same input gives another answer the second time. Of a small output several examples are
    looked at, since a few numbers may agree by chance."""
    pairs = itertools.chain([(output, first)], ((run_on(model, example), example) for example in examples))
    compared = 0
    for before, example in itertools.islice(pairs, _REPEATED):
        again = tensors_of(run_on(model, example))
        for name, x in tensors_of(before).items():
            if name not in again or again[name].shape != x.shape or not torch.equal(again[name], x):
                nan = bool(torch.isnan(x).any())
                otherwise = "another one the second time, in evaluation mode: dropout or sampling is left on"
                what = "NaN" if nan else otherwise
                raise ValueError(f"model: expected the same answer to the same input; {name} is {what}")
            compared += x.numel()
        if compared >= _ENOUGH:
            return


def _shapes(example: Example) -> str:
    named = example.inputs.items()
    return ", ".join(f"{name} {tuple(x.shape)}" for name, x in named if isinstance(x, torch.Tensor))
