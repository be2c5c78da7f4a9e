"""Quantize a model block by block, each layer on inputs from the blocks before it as they were quantized.

The hidden states of the untouched model move along with those of the quantized one: a layer aims at the outputs that
it would have without any quantization before it (GPTAQ, arXiv 2504.02692), and trained blocks aim at the untouched
block's output.

Activations stream: only the hidden states between two blocks are kept for all windows, in both streams. Beside them
stand one block's Hessians, and with a single batch of windows one block's inner activations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from bitween.model.blocks import BlockRunner, Context, Layer
from bitween.model.memory import return_freed_memory
from bitween.quantized_tensor import QuantizedTensor
from bitween.realise.block_training import train_block
from bitween.realise.stacks import round_stack
from bitween.rounding.gptq import SHARE, SWEEPS
from bitween.rounding.hessian import Hessian
from bitween.rounding.methods import METHODS, Needs
from bitween.rounding.signround import STEPS
from bitween.scheme import Scheme

__all__ = ["LayerResult", "SequentialQuantizer", "put_numbers"]

# (layer name, batch index) -> float32 (tokens,) weights of the batch's tokens, or None for ones.
TokenWeights = Callable[[str, int], Any]
# (stage, block name, layer name, seconds); stage is "hessian", "quantize", "train" or "forward".
Progress = Callable[[str, str, str, float], None]


@dataclass(frozen=True, eq=False)
class LayerResult:
    """One layer, quantized.

    Attributes
    ----------
    layer : Layer
    quantized : QuantizedTensor
    method : what was used; "clip" stands in where no text reached the layer
    error : (w - q) H (w - q)T summed over rows, per token; None where the method knows no Hessian
    seconds : spent on rounding; layers rounded together share it by rows
    original : the Parameter that was there before, untouched
    target : float32 (rows, cols) that training rounds, kept for methods that train; None for others
    """

    layer: Layer
    quantized: QuantizedTensor
    method: str
    error: float | None
    seconds: float
    original: nn.Parameter = field(repr=False)
    target: torch.Tensor | None = field(default=None, repr=False)

    def restore(self) -> None:
        """Give the layer its original Parameter back, the same object."""
        self.layer.module.weight = self.original


def put_numbers(layer: Layer, tensor: QuantizedTensor) -> None:
    """Let the layer compute with a stored matrix as plain numbers of its own dtype, in a new Parameter."""
    values = tensor.dequantize(layer.module.weight.dtype)
    layer.module.weight = nn.Parameter(layer.as_weight(values), requires_grad=False)


class SequentialQuantizer:
    """Gives every layer of a model the scheme that a plan names for it, block by block, each layer rounded with the
    Hessian of what the blocks before it, quantized already, feed it.

    Parameters
    ----------
    runner : BlockRunner of the model that is changed
    method : name of a method, or {layer name: name}; one of `bitween.METHODS`. Layers that no token reaches
        (experts) are clipped instead. Layers with "signround" start from "gptq+refine"; those of one block are then
        trained together, so that it gives what the untouched model's block gives
    put : called with (layer, QuantizedTensor) as soon as a layer is quantized, and must let the layer compute with
        it; default `put_numbers`
    token_weights : weights of the tokens in each layer's Hessian, for instance its output gradients' energy
    exact : hidden states of the untouched model that enter the first block, by batch; default the batches' own
    sweeps, damping, share : of `bitween.gptq`; share 0 aims at the original weights' outputs on the inputs as they are
    steps : of `signround.train_block`
    keep : given tensors that wait until a block is done; returns the ones to hold, of the same numbers
    progress : called after every step
    """

    def __init__(
        self,
        runner: BlockRunner,
        *,
        method: str | Mapping[str, str] = "gptq+refine",
        put: Callable[[Layer, QuantizedTensor], None] = put_numbers,
        token_weights: TokenWeights | None = None,
        exact: Sequence[torch.Tensor] | None = None,
        sweeps: int = SWEEPS,
        damping: float = 0.01,
        share: float = SHARE,
        steps: int = STEPS,
        keep: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
        progress: Progress | None = None,
    ) -> None:
        names = [method] if isinstance(method, str) else method.values()
        if unknown := sorted(set(names) - set(METHODS)):
            raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {unknown[0]!r}")
        self.runner, self.method, self.put = runner, method, put
        self.token_weights, self.sweeps, self.damping, self.steps = token_weights, sweeps, damping, steps
        self.share, self.keep = share, keep
        self._start = exact
        self._exact: list[torch.Tensor] | None = None  # hidden states of the untouched model
        self.progress = progress or (lambda *_: None)

    @property
    def exact(self) -> list[torch.Tensor] | None:
        """Hidden states of the untouched model after the last block run; None when no layer has needed them."""
        return self._exact

    def embed(self, windows: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, Context]]:
        """Batches of token ids (batch, length) as hidden states that enter the first block, with their contexts."""
        with self.runner:
            return [self.runner.embed(ids) for ids in windows]

    def run(
        self, plan: Mapping[str, Scheme | None], batches: list[tuple[torch.Tensor, Context]]
    ) -> Iterator[LayerResult]:
        """Quantize all blocks in order; yields each layer as it is done.

        `batches` comes from `embed` and moves along: afterwards it holds what leaves the last block. With one batch
        each block runs once; with several it runs up to each group of layers that share an input.

        Raises
        ------
        ValueError
            The plan names layers that the blocks do not have; nothing has been changed then.
        """
        blocks = self.runner.layout.blocks
        known = {layer.name for block in blocks for layer in block.layers}
        if unknown := sorted(name for name, scheme in plan.items() if scheme is not None and name not in known):
            raise ValueError(f"plan: expected layers of the model's blocks; got {unknown[0]!r}")
        named = known if isinstance(self.method, str) else set(self.method)
        if missing := sorted(name for name, scheme in plan.items() if scheme is not None and name not in named):
            raise ValueError(f"method: expected one for every layer of the plan; {missing[0]!r} has none")
        for i in range(len(blocks)):
            yield from self.run_block(i, plan, batches)

    def run_block(
        self, i: int, plan: Mapping[str, Scheme | None], batches: list[tuple[torch.Tensor, Context]]
    ) -> list[LayerResult]:
        """Quantize block `i` and move the batches past it."""
        step = self._one_pass if len(batches) == 1 else self._staged
        with self.runner, torch.no_grad():
            if not self._follows(plan):
                return step(i, plan, batches, None)
            inputs, entering = list(batches), self._entering(i, batches)
            targets = self._move_exact(i, batches, len(batches) == 1 and self._aims(plan))
            results = step(i, plan, batches, targets if len(batches) == 1 else entering)
            return self._train(i, results, inputs, batches) if self._trains(plan) else results

    def take_block(
        self,
        i: int,
        plan: Mapping[str, Scheme | None],
        batches: list[tuple[torch.Tensor, Context]],
        stored: Mapping[str, QuantizedTensor],
    ) -> None:
        """Put the layers of block `i` as an earlier run left them, and move the batches past it."""
        with self.runner, torch.no_grad():
            if self._follows(plan):
                self._move_exact(i, batches, False)
            for name, layer in self._wanted(i, plan).items():
                self.put(layer, stored[name])
            self._forward(i, batches)

    # ---- two ways through a block ----------------------------------------------------------------

    def _one_pass(
        self, i: int, plan: Mapping[str, Scheme | None], batches: list, targets: dict | None
    ) -> list[LayerResult]:
        """A hook before each layer quantizes it on the input that just arrived, then lets it run. `targets` holds the
        untouched block's inputs."""
        groups = {name: names for names in self.runner.shared_inputs(i) for name in names}
        layers = self._wanted(i, plan)
        results: dict[str, LayerResult] = {}

        def before(name: str) -> Callable:
            def hook(_module, args, kwargs):
                if name in results:
                    return
                x = (args[0] if args else next(iter(kwargs.values()))).detach()
                wanted = [layers[n] for n in groups[name] if n in layers]
                hessian = self._hessians(i, wanted, plan, [(0, {groups[name]: x}, targets)])
                results.update((r.layer.name, r) for r in self._quantize(i, wanted, plan, hessian))

            return hook

        handles = [x.module.register_forward_pre_hook(before(x.name), with_kwargs=True) for x in layers.values()]
        try:
            self._forward(i, batches)
        finally:
            for handle in handles:
                handle.remove()
        missed = [layer for name, layer in layers.items() if name not in results]
        results.update((r.layer.name, r) for r in self._quantize(i, missed, plan, {}))
        return list(results.values())

    def _staged(
        self, i: int, plan: Mapping[str, Scheme | None], batches: list, entering: list[torch.Tensor] | None
    ) -> list[LayerResult]:
        """Groups of layers that read one tensor, in order of execution; the block runs up to each of them, and again
        with its original weights on the untouched model's hidden states, `entering`."""
        layers = self._wanted(i, plan)
        results: list[LayerResult] = []
        aims = entering is not None and self._aims(plan)
        for names in _stages(self.runner.shared_inputs(i), layers):
            wanted = [layers[name] for name in names if name in layers]
            if not wanted:
                continue
            hessians = {}
            if any(self._needs_hessian(layer, plan) for layer in wanted):
                stop_at = [layer.name for layer in wanted]
                exact = entering if aims else [None] * len(batches)
                pairs = enumerate(zip(batches, exact, strict=True))
                inputs = ((k, *self._captured(i, *b, x, stop_at, results)) for k, (b, x) in pairs)
                hessians = self._hessians(i, wanted, plan, inputs)
            results += self._quantize(i, wanted, plan, hessians)
        self._forward(i, batches)
        return results

    def _captured(self, i: int, hidden, context, exact, stop_at: list[str], done: list[LayerResult]) -> tuple:
        """What layers of block `i` read, and what they would read in the untouched model, if that is followed."""
        inputs = self.runner.capture_inputs(i, hidden, context, stop_at)[1]
        if exact is None:
            return inputs, None
        with _originals(done):
            return inputs, self.runner.capture_inputs(i, exact, context, stop_at)[1]

    def _forward(self, i: int, batches: list) -> None:
        started = time.monotonic()
        for k, (hidden, context) in enumerate(batches):
            batches[k] = self.keep(self.runner.run_block(i, hidden, context)), context
        self.progress("forward", self.runner.layout.blocks[i].name, "", time.monotonic() - started)

    def _train(self, i: int, results: list[LayerResult], inputs: list, batches: list) -> list[LayerResult]:
        """Train what is to be trained of a quantized block towards `_exact`, and run it again."""
        started = time.monotonic()
        wanted = {r.layer.name: r for r in results if r.method == "signround"}
        if not wanted:
            return results
        layers = {n: (r.layer, r.target, r.quantized) for n, r in wanted.items()}
        trained, _, _ = train_block(self.runner, i, layers, inputs, self._exact, steps=self.steps)
        seconds = (time.monotonic() - started) / len(wanted)
        for k, result in enumerate(results):
            name = result.layer.name
            if name not in trained:
                continue
            results[k] = result = replace(result, seconds=result.seconds + seconds, target=None)
            if trained[name] is not result.quantized:
                self.put(result.layer, trained[name])
                results[k] = replace(result, quantized=trained[name], error=None)
        self.progress("train", self.runner.layout.blocks[i].name, "", time.monotonic() - started)
        batches[:] = inputs
        self._forward(i, batches)
        return results

    # ---- one group of layers ---------------------------------------------------------------------

    def _wanted(self, i: int, plan: Mapping[str, Scheme | None]) -> dict[str, Layer]:
        return {x.name: x for x in self.runner.layout.blocks[i].layers if plan.get(x.name) is not None}

    def _all_wanted(self, plan: Mapping[str, Scheme | None]) -> list[Layer]:
        return [x for block in self.runner.layout.blocks for x in block.layers if plan.get(x.name) is not None]

    def _trains(self, plan: Mapping[str, Scheme | None]) -> bool:
        return Needs.BLOCK in self._needs_of(plan)

    def _aims(self, plan: Mapping[str, Scheme | None]) -> bool:
        """Whether some layer aims at the untouched model's outputs."""
        if not self.share:
            return False
        return any(needs >= Needs.HESSIAN for needs in self._needs_of(plan))

    def _needs_of(self, plan: Mapping[str, Scheme | None]) -> set[Needs]:
        return {METHODS[self._method_of(layer)].needs for layer in self._all_wanted(plan)}

    def _follows(self, plan: Mapping[str, Scheme | None]) -> bool:
        """Whether the untouched model's hidden states are needed."""
        return self._aims(plan) or self._trains(plan)

    def _entering(self, i: int, batches: list) -> list[torch.Tensor]:
        """The untouched model's hidden states that enter block `i`."""
        if self._exact is None or not i:
            self._exact = [hidden for hidden, _ in batches] if self._start is None else list(self._start)
        return list(self._exact)

    def _move_exact(self, i: int, batches: list, capture: bool) -> dict | None:
        """Move the untouched model's hidden states past block `i`, which must not be quantized yet; with `capture`,
        returns what its layers read on the way."""
        inputs = None
        for k, (hidden, (_, context)) in enumerate(zip(self._entering(i, batches), batches, strict=True)):
            if capture:
                moved, inputs = self.runner.capture_inputs(i, hidden, context)
                inputs = {names: self.keep(x) for names, x in inputs.items()}
            else:
                moved = self.runner.run_block(i, hidden, context)
            self._exact[k] = self.keep(moved)
        return inputs

    def _method_of(self, layer: Layer) -> str:
        return self.method if isinstance(self.method, str) else self.method[layer.name]

    def _needs_hessian(self, layer: Layer, plan: Mapping[str, Scheme | None]) -> bool:
        return METHODS[self._method_of(layer)].needs > Needs.NOTHING

    def _hessians(self, i: int, layers: list[Layer], plan: Mapping, inputs: Any) -> dict[str, Hessian]:
        """{layer: its Hessian}; layers share one unless their tokens weigh differently. `inputs` yields
        (number of the batch, {names: what they read}, the same of the untouched model or None)."""
        started = time.monotonic()
        wanted = [layer for layer in layers if self._needs_hessian(layer, plan)]
        found: dict[str, Hessian] = {}
        for k, groups, exact in inputs:
            self._add_moments(found, wanted, groups, exact, k)
            del groups, exact  # before the next batch is captured, and the holes that they leave as well
            return_freed_memory()
        for moments in found.values():
            moments.settle()
        self.progress("hessian", self.runner.layout.blocks[i].name, "", time.monotonic() - started)
        return found

    def _add_moments(
        self, found: dict[str, Hessian], wanted: list[Layer], groups: Mapping, exact: Mapping | None, k: int
    ) -> None:
        """What layers read in batch `k` goes into their Hessians."""
        for names, x in groups.items():
            here = [layer for layer in wanted if layer.name in names]
            alike = not any(layer.kind == "expert" for layer in here)
            reference = None if exact is None else _of(exact, names, x) if alike else x
            for j, layer in enumerate(here):
                if j and self.token_weights is None:
                    found[layer.name] = found[here[0].name]
                    continue
                weights = None if self.token_weights is None else self.token_weights(layer.name, k)
                moments = found.setdefault(layer.name, Hessian(x.shape[-1], cross=reference is not None))
                moments.add(x, weights=weights, reference=reference)

    def _quantize(self, i: int, layers: list[Layer], plan: Mapping, hessians: Mapping) -> list[LayerResult]:
        """Layers of one scheme, method and Hessian are stacked, so that it is factored once."""
        stacks: dict[tuple, list[Layer]] = {}
        for layer in layers:
            hessian = hessians.get(layer.name)
            stacks.setdefault((plan[layer.name], self._method_of(layer), id(hessian)), []).append(layer)
        results = []
        for (scheme, method, _), stack in stacks.items():
            started = time.monotonic()
            done = self._round(stack, scheme, method, hessians.get(stack[0].name))
            seconds = time.monotonic() - started
            total = sum(layer.shape[0] for layer in stack)
            for layer, (tensor, used, error, target) in zip(stack, done, strict=True):
                original = layer.module.weight
                self.put(layer, tensor)
                part = seconds * layer.shape[0] / total
                results.append(LayerResult(layer, tensor, used, error, part, original, target))
                self.progress("quantize", self.runner.layout.blocks[i].name, layer.name, part)
        return results

    def _round(self, stack: list[Layer], scheme: Scheme, method: str, hessian: Hessian | None) -> list[tuple]:
        """As `round_stack`, with this quantizer's settings."""
        settings = {"sweeps": self.sweeps, "damping": self.damping, "share": self.share}
        return round_stack(stack, scheme, method, hessian, **settings)


def _stages(groups: Iterable[tuple[str, ...]], layers: Mapping[str, Layer]) -> list[tuple[str, ...]]:
    """Groups of layers in the order in which they are quantized; the experts of one stack, which can't read each
    other's outputs, go together, or the block would run once for each of them."""
    stages: dict[str, tuple[str, ...]] = {}
    for names in groups:
        expert = names[0] in layers and layers[names[0]].kind == "expert"
        key = names[0].rpartition(".")[0] if expert else names[0]
        stages[key] = (*stages.get(key, ()), *names)
    return list(stages.values())


def _of(exact: Mapping[tuple[str, ...], torch.Tensor], names: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
    """What the untouched model feeds layers; what they are fed now where the number of tokens is not the same. Experts
    never come here: their router decides anew, and as many tokens need not be the same tokens."""
    found = next((y for known, y in exact.items() if set(known) & set(names)), None)
    return x if found is None or found.numel() != x.numel() else found


@contextmanager
def _originals(results: list[LayerResult]) -> Iterator[None]:
    """Layers that are done compute with their original weights meanwhile."""
    put = [(result, result.layer.module.weight) for result in results]
    try:
        for result in results:
            result.restore()
        yield
    finally:
        for result, weight in put:
            result.layer.module.weight = weight
