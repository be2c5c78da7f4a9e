"""A plan made real: every layer of a model quantized in the order of execution, on a copy that shares what stays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import torch

import bitween
from bitween._progress import Progress, no_progress
from bitween.model import blocks
from bitween.model.memory import return_freed_memory
from bitween.quantized_tensor import QuantizedTensor
from bitween.realise.candidate import Candidate
from bitween.realise.context import RunContext
from bitween.realise.passes import fits_one_pass
from bitween.realise.sequential import SequentialQuantizer
from bitween.realise.stacks import method_below_8_bits
from bitween.rounding.methods import METHODS, Needs
from bitween.scheme import Scheme

__all__ = ["NothingRecorded", "Realiser", "RecordedSteps"]

_TRAINING_TOKENS = 1024


class RecordedSteps(Protocol):
    """Parts of a plan that an earlier run has finished, by name: "block 0", "block 1", ..., "rest"."""

    def part(self, name: str) -> dict[str, QuantizedTensor] | None:
        """{layer: what was stored}, or None where the part is still to be done."""

    def put_part(self, name: str, stored: dict[str, QuantizedTensor]) -> None:
        """Keep a finished part."""


class NothingRecorded:
    """No earlier run, and nothing is kept for a later one."""

    def part(self, name: str) -> None:
        """None: everything is still to be done."""

    def put_part(self, name: str, stored: dict[str, QuantizedTensor]) -> None:
        """Keep nothing."""


class Realiser:
    """Quantizes the layers of a model as a plan says, each block on what the quantized blocks before it give.

    Parameters
    ----------
    context : RunContext, the model in full precision (never changed) and its text; `candidate` is the copy at work
    method : rounding method of layers below 8 bits; see `bitween.quantize`
    calibration_windows : windows that feed the Hessians, at most
    importance : {layer: float32 importance}, for layers without a Hessian (the embedding)
    one_pass : each block may run once over all windows where their activations take at most a GiB; False for batches
    """

    def __init__(
        self,
        context: RunContext,
        *,
        method: str = "gptq+refine",
        calibration_windows: int = 48,
        importance: Mapping[str, np.ndarray] | None = None,
        one_pass: bool = True,
        progress: Progress = no_progress,
    ):
        self.context, self.method, self.progress = context, method, progress
        self.importance = dict(importance or {})
        self.candidate = Candidate(context.model, context.layout, context.spill)
        self.windows = context.text.calibration.ids[:calibration_windows]
        self._one_pass = one_pass
        self.unreached: set[str] = set()  # experts that no calibration token was routed to, so rounded by their weights
        self._runner: blocks.BlockRunner | None = None

    @property
    def runner(self) -> blocks.BlockRunner:
        """Runs the candidate."""
        if self._runner is None:
            layout = blocks.inspect(self.candidate.model)
            self._runner = blocks.BlockRunner(
                self.candidate.model, layout, products=self.context.runner.products, check=False
            )
        return self._runner

    def realise(
        self, plan: Mapping[str, Scheme | None], *, stage: str = "quantizing", steps: RecordedSteps | None = None
    ) -> dict[str, QuantizedTensor]:
        """Quantize every layer of the plan, and leave the candidate computing with the result.

        Each block's Hessians come from the blocks before it as quantized. Layers that the plan leaves out, or gives
        None, keep their original weight. Parts that `steps` holds are taken over as they are.

        Returns
        -------
        {layer name: QuantizedTensor}

        Raises
        ------
        ValueError
            The plan names a layer that the model does not have.
        """
        layout = self.context.layout
        self._check_plan(plan)
        steps = steps or NothingRecorded()
        self.candidate.restore_all()
        if (rest := steps.part("rest")) is not None:  # then every block was finished too
            for part in (rest, *(steps.part(f"block {i}") for i in range(len(layout.blocks)))):
                for name, tensor in part.items():
                    self.candidate.put(layout.layer(name), tensor)
        else:
            self._quantize_all(plan, stage, steps)
        return dict(self.candidate.stored)

    def _keep_packed(self, layers: Iterable[blocks.Layer]) -> None:
        """Codes of finished layers go where the run's numbers are kept."""
        stored = self.candidate.stored
        for layer in layers:
            if layer.name in stored:
                stored[layer.name] = self.context.spill.keep_packed(stored[layer.name])

    def _quantize_all(self, plan: Mapping[str, Scheme | None], stage: str, steps: RecordedSteps) -> None:
        layout, runner = self.context.layout, self.runner
        methods = {name: self._method_of(scheme) for name, scheme in plan.items() if scheme is not None}
        windows = self._batches(Needs.BLOCK in {METHODS[name].needs for name in methods.values()})
        with runner:
            exact = [
                self.context.spill.keep(runner.embed(part)[0]) for part in windows
            ]  # before the embedding is quantized
        for layer in (layout.embedding, *layout.others):
            if plan.get(layer.name) is not None:
                self._quantize(layer, plan[layer.name], None)
        with runner:
            batches = [runner.embed(part) for part in windows]
            quantizer = SequentialQuantizer(
                runner, method=methods, put=self.candidate.put, exact=exact, keep=self.context.spill.keep
            )
            for i, block in enumerate(layout.blocks):
                part = steps.part(f"block {i}")
                if part is None:
                    done = quantizer.run_block(i, plan, batches)
                    without = {x.layer.name for x in done if x.layer.kind == "expert" and x.method == "clip"}
                    self.unreached |= {name for name in without if methods[name] != "clip"}
                    steps.put_part(f"block {i}", self._stored_of(block.layers))
                else:
                    quantizer.take_block(i, plan, batches, part)
                self._keep_packed(block.layers)
                self.context.spill.let_go()
                return_freed_memory()
                self.progress(stage, i + 1, len(layout.blocks) + 1, block.name)
            self._quantize_head(plan, [hidden for hidden, _ in batches], quantizer.exact)
        in_blocks = {layer.name for block in layout.blocks for layer in block.layers}
        steps.put_part("rest", self._stored_of(x for x in layout.layers if x.name not in in_blocks))
        self._keep_packed((layout.embedding, *layout.others, layout.head))
        self.progress(stage, len(layout.blocks) + 1, len(layout.blocks) + 1, layout.head.name)

    def _stored_of(self, layers: Iterable[blocks.Layer]) -> dict[str, QuantizedTensor]:
        return {x.name: self.candidate.stored[x.name] for x in layers if x.name in self.candidate.stored}

    def _batches(self, training: bool) -> list[torch.Tensor]:
        """All windows at once where a block's activations are small: then each block runs once, not once a group.

        Training takes one batch a step, so those stay small.
        """
        if training:
            return list(self.windows.split(max(1, _TRAINING_TOKENS // self.windows.shape[1])))
        if self._one_pass and fits_one_pass(self.context.layout, self.windows.numel()):
            return [self.windows]
        return list(self.context.batches(self.windows))

    def _check_plan(self, plan: Mapping[str, Scheme | None]) -> None:
        known = {layer.name for layer in self.context.layout.layers}
        if unknown := sorted(set(plan) - known):
            raise ValueError(f"plan: expected layers of the model; got {unknown[0]!r}")

    def _quantize_head(self, plan: Mapping[str, Scheme | None], states: list, exact: list | None) -> None:
        """The head, aiming at what it gives on the untouched model's states, where those were followed."""
        layout = self.context.layout
        scheme = None if layout.tied else plan.get(layout.head.name)
        if scheme is None:
            return
        total = bitween.Hessian(layout.head.shape[1], cross=exact is not None)
        for k, state in enumerate(states):
            reference = None if exact is None else self.runner.final(exact[k]).float()
            total.add(self.runner.final(state).float(), reference=reference)
        self._quantize(layout.head, scheme, total.settle())

    def _method_of(self, scheme: Scheme) -> str:
        return method_below_8_bits(scheme, self.method)

    def _columns(self, layer: blocks.Layer, method: str) -> Any:
        """The importance of a layer's weights; a trellis takes that of columns."""
        found = self.importance.get(layer.name)
        if found is None or method != "trellis" or np.ndim(found) == 1:
            return found
        return np.asarray(found, np.float32).mean(0)

    def _quantize(self, layer: blocks.Layer, scheme: Scheme, hessian: bitween.Hessian | None) -> None:
        method = self._method_of(scheme)
        if method == "rtn":
            tensor = bitween.quantize(layer.weight, scheme)
        elif hessian is None or hessian.tokens == 0:  # an embedding, or an expert that the text never reached
            without = method if method == "trellis" else "clip"
            tensor = bitween.quantize(layer.weight, scheme, method=without, importance=self._columns(layer, without))
        else:
            tensor = bitween.quantize(layer.weight, scheme, method=method, hessian=hessian)
        self.candidate.put(layer, tensor)
