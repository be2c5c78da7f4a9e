"""PrecisionOptimizer: turns plans into quantized layers, block by block, and takes back what does not hold."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

import bitween
from bitween._progress import Progress, no_progress
from bitween.gradual.evaluator import GradualEvaluator, Measurement
from bitween.gradual.journal.journal import NullJournal
from bitween.gradual.journal.recorded import Recorder
from bitween.gradual.scores.probe import Probe
from bitween.model import blocks
from bitween.model.memory import return_freed_memory
from bitween.quantized_tensor import QuantizedTensor
from bitween.realise.block_training import train_block
from bitween.realise.candidate import Candidate
from bitween.realise.context import RunContext
from bitween.realise.distillation import distill, rescaled
from bitween.realise.realiser import Realiser
from bitween.scheme import Scheme

__all__ = ["PrecisionOptimizer", "Realisation", "Step"]

LADDER = (8, 4, 2)
BETWEEN = {4: (6, 5), 2: (3,)}  # tried when the next width of the ladder fails
GROUP_SIZES = (128, 64, 32, 16)


@dataclass(frozen=True)
class Step:
    """One trial on a block.

    Attributes
    ----------
    block : name
    target_bits, group_size, method : what was tried; target_bits 16 means "left as it was"
    damage : nats of KL per token with the block so, all others untouched
    nbytes : of the block's layers
    accepted : damage is within the threshold
    """

    block: str
    target_bits: float
    group_size: int
    method: str
    damage: float
    nbytes: int
    accepted: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the journal."""
        return asdict(self)


@dataclass(frozen=True)
class Realisation:
    """A plan made real.

    Attributes
    ----------
    plan : {layer: Scheme or None}
    stored : {layer: QuantizedTensor}
    nbytes : of all layers, quantized or not
    seconds : spent
    measurement : on the selection text, None when it was not wanted
    gains : {norm name: gains} that distillation changed
    """

    plan: dict[str, Scheme | None]
    stored: dict[str, QuantizedTensor] = field(repr=False)
    nbytes: int
    seconds: float
    measurement: Measurement | None
    gains: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)


class PrecisionOptimizer:
    """Realises plans and walks single blocks down in precision.

    Parameters
    ----------
    model, tokenizer
        Full precision; never changed. `candidate.model` is the copy at work.
    method : quantizer of layers below 8 bits; see `bitween.quantize`
    calibration_windows : windows that feed the Hessians, at most
    importance : {layer: float32 importance}, for layers without a Hessian (the embedding)
    one_pass : each block may run once over all windows where their activations take at most a GiB; False for batches
    context : RunContext, optional
        Shared with the other gradual classes; built from **options otherwise.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        method: str = "gptq+refine",
        calibration_windows: int = 48,
        importance: Mapping[str, np.ndarray] | None = None,
        one_pass: bool = True,
        context: RunContext | None = None,
        progress: Progress = no_progress,
        **options: Any,
    ):
        self.context = context or RunContext.build(model, tokenizer, progress=progress, **options)
        self.evaluator = GradualEvaluator(model, tokenizer, context=self.context)
        self.method, self.progress = method, progress
        self.realiser = Realiser(
            self.context,
            method=method,
            calibration_windows=calibration_windows,
            importance=importance,
            one_pass=one_pass,
            progress=progress,
        )
        self._probe: Probe | None = None

    @property
    def candidate(self) -> Candidate:
        """The copy at work."""
        return self.realiser.candidate

    @property
    def runner(self) -> blocks.BlockRunner:
        """Runs the candidate."""
        return self.realiser.runner

    # ---- whole plans -----------------------------------------------------------------------------

    def realise(
        self,
        plan: Mapping[str, Scheme | None],
        *,
        stage: str = "quantizing",
        measure: bool = True,
        recorder: Recorder | None = None,
    ) -> Realisation:
        """Quantize every layer of the plan in the order of execution and measure the result.

        Each block's Hessians come from the blocks before it as quantized. Layers that the plan
        leaves out, or gives None, keep their original weight. What `recorder` holds from an earlier run is taken over.
        """
        started = time.monotonic()
        layout = self.context.layout
        steps = (recorder or Recorder(NullJournal(), layout)).plan(plan)
        stored = self.realiser.realise(plan, stage=stage, steps=steps)
        measurement = steps.measurement(lambda: self.evaluator.measure(self.runner)) if measure else None
        return_freed_memory()
        nbytes = sum(stored[x.name].nbytes if x.name in stored else x.nbytes for x in layout.layers)
        return Realisation(dict(plan), stored, nbytes, time.monotonic() - started, measurement)

    def _learn_correction(self, realisation: Realisation, steps: int) -> dict[str, np.ndarray]:
        windows = self.realiser.windows[:steps]

        def reference(i: int) -> tuple[torch.Tensor, Any]:
            states = self.context.reference("calibration", slice(i, i + 1)).final[0]
            return states, self.context.reference_logits

        def progress(done: int, loss: float) -> None:
            self.progress("distillation", done, steps, f"{loss:.4f} nats")

        layers = [self.runner.layout.layer(name) for name in realisation.stored]
        found = distill(self.runner, layers, windows, reference, steps=steps, progress=progress)
        named = {f"rows {name}": x for name, x in found.rows.items()} | {
            f"gains {n}": x for n, x in found.gains.items()
        }
        return {key: values.numpy() for key, values in named.items()}

    def restore(self, realisation: Realisation) -> None:
        """Put the candidate back into the state that a realisation left, bit for bit."""
        self.candidate.hold(realisation.stored, realisation.gains)

    def distill(self, realisation: Realisation, steps: int, recorder: Recorder | None = None) -> Realisation:
        """The same codes with row scales and norm gains that bring the whole model nearer to the original.

        Trained on the calibration text, measured like any other realisation; see `bitween.realise.distillation`.
        """
        started = time.monotonic()
        layout = self.context.layout
        record = (recorder or Recorder(NullJournal(), layout)).plan(realisation.plan)
        self.restore(realisation)
        learned = record.arrays(f"distilled in {steps}", lambda: self._learn_correction(realisation, steps))
        stored, gains = dict(realisation.stored), {}
        for key, values in learned.items():
            kind, _, name = key.partition(" ")
            if kind == "rows":
                stored[name] = rescaled(stored[name], torch.from_numpy(values))
                self.candidate.put(layout.layer(name), stored[name])
            else:
                gains[name] = torch.from_numpy(values)
        self.candidate.put_gains(gains)
        measurement = record.measurement(lambda: self.evaluator.measure(self.runner), f"measured, distilled in {steps}")
        seconds = realisation.seconds + time.monotonic() - started
        return replace(realisation, stored=stored, gains=gains, measurement=measurement, seconds=seconds)

    # ---- single blocks ---------------------------------------------------------------------------

    def progressive_block_quantization(self, block_name: str, threshold: float) -> list[Step]:
        """Lower one block's precision as far as its damage allows: 8 → 4 → 2 bits, then widths in between.

        At each width groups of 128 → 64 → 32 → 16 are tried with round-to-nearest, then clipped, then with the
        optimizer's own method, and at last trained on the block's output ("signround"). The candidate is left with
        the last accepted state; a failed trial is rolled back.

        Parameters
        ----------
        block_name : a block of the model
        threshold : nats of KL per token that the block may cause

        Returns
        -------
        list of Step; the last one is what stands.
        """
        if not threshold > 0:
            raise ValueError(f"threshold: expected nats > 0; got {threshold!r}")
        names = [block.name for block in self.context.layout.blocks]
        if block_name not in names:
            raise ValueError(f"block_name: expected one of {names[0]} .. {names[-1]}; got {block_name!r}")
        walk = _BlockWalk(self, names.index(block_name), threshold)
        return walk.run()

    @property
    def probe(self) -> Probe:
        """Trials against the untouched model."""
        if self._probe is None:
            self._probe = Probe(self.context)
        return self._probe


class _BlockWalk:
    """The walk of one block down the ladder."""

    def __init__(self, optimizer: PrecisionOptimizer, index: int, threshold: float):
        self.optimizer, self.index, self.threshold = optimizer, index, threshold
        self.block = optimizer.context.layout.blocks[index]
        self.steps: list[Step] = []
        self.standing: tuple[Step, dict[str, QuantizedTensor]] | None = None
        self._hessians: dict[str, bitween.Hessian | None] | None = None

    def run(self) -> list[Step]:
        for bits in LADDER:
            if self.lower(bits):
                continue
            for between in BETWEEN.get(bits, ()):
                if not self.lower(between):
                    break
            break
        self.settle()
        return self.steps

    def lower(self, bits: float) -> bool:
        """Try one width with every group size and method, cheap ones first; True when one holds."""
        for method in dict.fromkeys(("rtn", "clip", self.optimizer.method, "signround")):
            for group_size in GROUP_SIZES:
                if self.attempt(Scheme(bits, group_size), method):
                    return True
        return False

    def attempt(self, scheme: Scheme, method: str) -> bool:
        stored = {layer.name: self.quantize(layer, scheme, method) for layer in self.block.layers}
        if method == "signround":
            stored = self.train(stored)
        weights = {
            layer.module: layer.as_weight(stored[layer.name].dequantize(layer.module.weight.dtype))
            for layer in self.block.layers
        }
        damage = self.optimizer.probe.damage(weights, self.index)
        nbytes = sum(tensor.nbytes for tensor in stored.values())
        step = Step(self.block.name, scheme.bits, scheme.group_size, method, damage, nbytes, damage <= self.threshold)
        self.steps.append(step)
        if step.accepted:
            self.standing = step, stored
        return step.accepted

    def quantize(self, layer: blocks.Layer, scheme: Scheme, method: str) -> QuantizedTensor:
        if method == "rtn":
            return bitween.quantize(layer.weight, scheme)
        hessian = self.hessians().get(layer.name)
        if method == "clip" or hessian is None:
            importance = None if hessian is None else np.ascontiguousarray(np.diagonal(hessian.matrix()))
            return bitween.quantize(layer.weight, scheme, method="clip", importance=importance)
        start = "gptq+refine" if method == "signround" else method
        return bitween.quantize(layer.weight, scheme, method=start, hessian=hessian)

    def train(self, stored: dict[str, QuantizedTensor]) -> dict[str, QuantizedTensor]:
        """The block's layers, trained together on its output."""
        probe = self.optimizer.probe
        layers = {layer.name: (layer, layer.weight, stored[layer.name]) for layer in self.block.layers}
        batch, target = (probe.states[self.index], probe.call), probe.states[self.index + 1]
        with probe.runner:
            return train_block(probe.runner, self.index, layers, [batch], [target])[0]

    def hessians(self) -> dict[str, bitween.Hessian | None]:
        """Of the untouched model; the probe's own text serves, since every trial is judged on it."""
        if self._hessians is None:
            probe = self.optimizer.probe
            with probe.runner:
                _, inputs = probe.runner.capture_inputs(self.index, probe.states[self.index], probe.call)
            self._hessians = {}
            for names, x in inputs.items():
                hessian = bitween.Hessian(x.shape[-1])
                hessian.add(x)
                self._hessians.update(dict.fromkeys(names, hessian))
        return self._hessians

    def settle(self) -> None:
        """Leave the candidate with what stands, and say so in the last step."""
        optimizer = self.optimizer
        if self.standing is None:
            for layer in self.block.layers:
                optimizer.candidate.restore(layer)
            nbytes = sum(layer.nbytes for layer in self.block.layers)
            self.steps.append(Step(self.block.name, 16, -1, "none", 0.0, nbytes, True))
            return
        step, stored = self.standing
        for layer in self.block.layers:
            optimizer.candidate.put(layer, stored[layer.name])
        if self.steps[-1] != step:
            self.steps.append(step)
