"""A plan made real on a module that runs as a whole: layer by layer in the order of execution, on full passes.

The same rounding as `realiser.py`: each layer's Hessian comes from what the layers before it, quantized already, give,
and where the untouched module reaches the layer with an input of the same shape, the layer aims half of the way at what
it would give there.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import nn

import bitween
from bitween._progress import Progress, no_progress
from bitween.model.experts import fold_untouched, shared_copy
from bitween.model.layout import Layer
from bitween.model.outputs import tensors_of
from bitween.model.precision import in_float32
from bitween.model.replay import settled
from bitween.model.spill import Spill
from bitween.model.whole import WholeLayout, rows_read
from bitween.quantized_tensor import QuantizedTensor
from bitween.realise.candidate import Candidate
from bitween.realise.delivery import ALLOWED
from bitween.realise.lockstep import Inputs, Lockstep, step_by_step
from bitween.realise.stacks import method_below_8_bits, round_stack
from bitween.realise.whole_context import WholeContext, run_on
from bitween.rounding.methods import METHODS, Needs
from bitween.scheme import Scheme
from bitween.text.examples import Example

__all__ = ["WholeCandidate", "WholeRealiser", "check_method"]

_ROWS = 4096  # that one example adds to a Hessian, at most: images have tens of thousands of patches, all alike
_CHECKED = 3  # examples on which runs that wait for each other are compared with runs that do not


def check_method(method: str) -> None:
    """ValueError for a method that needs blocks."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {method!r}")
    if METHODS[method].needs >= Needs.BLOCK:
        fitting = ", ".join(name for name, known in METHODS.items() if known.needs < Needs.BLOCK)
        raise ValueError(
            f"method: expected one of {fitting}, since this model runs as a whole and has no blocks to train; "
            f"got {method!r}"
        )


class WholeCandidate(Candidate):
    """A copy of any module whose layers can be exchanged one by one, sharing all memory that is not exchanged.

    Parameters
    ----------
    original : the module described, in float32
    layout : its own
    """

    def __init__(self, original: nn.Module, layout: WholeLayout):
        self.original = layout
        self._spill = Spill(least=None)
        self.model = shared_copy(original)
        self.stored: dict[str, QuantizedTensor] = {}
        self._gains: dict[str, nn.Parameter] = {}
        self._modules = {name: self.model.get_submodule(name) for x in layout.layers for name in (x.name, *x.shared)}

    def deliver(self, user: nn.Module, example: Example | None) -> nn.Module:
        """Replace the quantized layers by packed ones and cast what is left to the user's own dtypes.

        Parameters
        ----------
        user : the model as it was given
        example : on which the module before and after are compared; None where there is none

        Raises
        ------
        RuntimeError
            The module computes something else than the candidate did.
        """
        expected = None if example is None else _answers(self.model, example)
        dtypes = {name: x.dtype for name, x in (*user.named_parameters(), *user.named_buffers())}
        for layer in self.original.layers:
            if layer.name in self.stored:
                dtype = dtypes.get(f"{layer.name}.weight", layer.module.weight.dtype)
                self._install(layer, self.stored[layer.name], dtype)
        fold_untouched(self.model)
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if name in dtypes and tensor.is_floating_point() and tensor.dtype != dtypes[name]:
                tensor.data = tensor.data.to(dtypes[name])
        if expected is not None:
            _check(expected, _answers(self.model, example), [p.dtype for p in user.parameters()])
        return self.model


def _answers(model: nn.Module, example: Example) -> dict[str, torch.Tensor]:
    with settled(model), in_float32(model), torch.no_grad():
        return {name: x.float() for name, x in tensors_of(run_on(model, example)).items()}


def _check(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor], dtypes: list[torch.dtype]) -> None:
    """RuntimeError where the delivered module gives other numbers than the candidate, beyond its dtype's rounding."""
    allowed = max(ALLOWED.get(dtype, ALLOWED[torch.float32]) for dtype in dtypes)
    for name, x in expected.items():
        if not bool(torch.isfinite(x).all()):  # a candidate that overflowed proves nothing, and is told as such
            continue
        spread = (x - x.mean()).pow(2).mean().sqrt() if x.numel() > 1 else x.abs().max()
        size = max(spread.item(), 1e-3 * x.abs().max().item(), 1e-30)
        change = (got[name] - x).pow(2).mean().sqrt().item() / size
        if not change <= allowed:
            raise RuntimeError(
                f"model: expected the delivered model to compute what was measured, within {allowed:g} of its "
                f"{name}; got a difference of {change:.2g}. Nothing was reported or saved; please report this model"
            )


class WholeRealiser:
    """Quantizes the layers of any module as a plan says.

    Parameters
    ----------
    context : the module in float32 (never changed), and its examples; `candidate` is the copy at work
    method : rounding method of layers below 8 bits; see `bitween.quantize`; none that trains blocks
    importance : {layer: float32 importance}, for lookup tables, which have no Hessian

    Attributes
    ----------
    unreached : layers that no example reached, so rounded by their weights alone
    waits : whether the examples' runs wait for each other; None until it is known. If not, every layer takes a pass
    """

    def __init__(
        self,
        context: WholeContext,
        *,
        method: str = "gptq+refine",
        importance: Mapping[str, np.ndarray] | None = None,
        progress: Progress = no_progress,
    ):
        check_method(method)
        self.context, self.method, self.progress = context, method, progress
        self.importance = dict(importance or {})
        self.candidate = WholeCandidate(context.model, context.layout)
        self.unreached: set[str] = set()
        self.waits: bool | None = None

    def realise(self, plan: Mapping[str, Scheme | None], *, stage: str = "quantizing") -> dict[str, QuantizedTensor]:
        """Quantize every layer of the plan, and leave the candidate computing with the result.

        Layers that the plan leaves out, or gives None, keep their original weight.

        Raises
        ------
        ValueError
            The plan names a layer that the module does not have.
        """
        layout = self.context.layout
        wanted = {name: scheme for name, scheme in plan.items() if scheme is not None}
        for name in plan:
            layout.layer(name)
        self.candidate.restore_all()
        done = 0

        def note(name: str) -> None:
            nonlocal done
            done += 1
            self.progress(stage, done, len(wanted), name)

        repeated = self._repeated(wanted)
        leaders = {k: names for k, names in self._leaders(wanted).items() if not repeated.keys() & set(names)}
        waiting = {name for names in leaders.values() for name in names}
        for name in wanted:
            if name not in waiting:
                self._round([layout.layer(name)], wanted, repeated.get(name))
                note(name)

        def deal(leader: str, inputs: Inputs) -> None:
            names = leaders[leader]
            layers = [layout.layer(name) for name in names]
            self._round(layers, wanted, self._hessian(layers[0], inputs))
            for name in names:
                note(name)

        self._pass(leaders, deal)
        for leader, names in leaders.items():  # no example came by
            if leader not in self.candidate.stored:
                self.unreached |= set(names)
                self._round([layout.layer(name) for name in names], wanted, None)
        return dict(self.candidate.stored)

    def _repeated(self, wanted: Mapping[str, Scheme]) -> dict[str, bitween.Hessian]:
        """Hessians of layers that run several times an example (ALBERT's), from all of their calls in the untouched
        module: what later calls read hangs on how the layer was rounded, so that no order of work could give it."""
        known = {layer.name: layer for layer in self.context.layout.layers if layer.name in self.context.repeated}
        layers = [x for n, x in known.items() if n in wanted and self._needs_hessian(x, wanted[n])]
        found = {layer.name: bitween.Hessian(layer.shape[1]) for layer in layers}

        def gather(layer: Layer) -> Any:
            def hook(_module, args, kwargs):
                x = (args or tuple(kwargs.values()))[0].detach()
                found[layer.name].add(self._some(rows_read(layer, x)))

            return hook

        if not layers:
            return {}
        with ExitStack() as hooks:
            for layer in layers:
                uses = map(self.context.model.get_submodule, (layer.name, *layer.shared))
                for module in {id(m): m for m in uses}.values():
                    hooks.callback(module.register_forward_pre_hook(gather(layer), with_kwargs=True).remove)
            for example in self.context.examples.calibration:
                self.context.run(self.context.model, example)
        return found

    def _leaders(self, wanted: Mapping[str, Scheme]) -> dict[str, list[str]]:
        """{layer that is reached first: the layers that read the same tensor}, of those that need a Hessian."""
        found: dict[str, list[str]] = {}
        known = {layer.name: layer for layer in self.context.layout.layers}
        for names in self.context.groups:
            here = [name for name in names if name in wanted and self._needs_hessian(known[name], wanted[name])]
            if here:
                found[here[0]] = here
        listed = {name for names in found.values() for name in names}
        for name, scheme in wanted.items():  # what one example does not reach, another may
            if name not in listed and self._needs_hessian(known[name], scheme):
                found[name] = [name]
        return found

    def _needs_hessian(self, layer: Layer, scheme: Scheme) -> bool:
        if layer.kind == "embedding" or (layer.kind == "conv" and layer.module.groups > 1):
            return False
        return METHODS[method_below_8_bits(scheme, self.method)].needs > Needs.NOTHING

    def _pass(self, leaders: Mapping[str, list[str]], deal: Any) -> None:
        """All calibration examples through the candidate, and through the untouched module beside it."""
        if not leaders:
            return
        layout, examples = self.context.layout, self.context.examples.calibration
        names = {leader: (leader, *layout.layer(leader).shared) for leader in leaders}
        models = (self.candidate.model, self.context.model)
        works = [self._work(model, example) for example in examples for model in models]
        with settled(models[0]), settled(models[1]):
            if self.waits is None:
                few = works[: 2 * _CHECKED]
                self.waits = Lockstep(models, names).safe(few, _same_answers)
            if self.waits:
                Lockstep(models, names).run(works, deal)
            else:
                step_by_step(models, names, works, deal, names)

    @staticmethod
    def _work(model: nn.Module, example: Example) -> Any:
        return lambda: run_on(model, example)

    def _hessian(self, layer: Layer, inputs: Inputs) -> bitween.Hessian:
        """From the runs of even number, the candidate's; each with what the untouched module, the next run, reads."""
        exact = {i: inputs.get(i + 1) for i in inputs if not i % 2}
        cross = bool(exact) and all(y is not None and y.shape == inputs[i].shape for i, y in exact.items())
        total = bitween.Hessian(layer.shape[1], cross=cross)
        for i, y in exact.items():
            x = self._some(rows_read(layer, inputs[i]))
            total.add(x, reference=self._some(rows_read(layer, y)) if cross else None)
        return total.settle()

    @staticmethod
    def _some(rows: torch.Tensor) -> torch.Tensor:
        if len(rows) > _ROWS:
            rows = rows[:: -(-len(rows) // _ROWS)]
        return rows.float().contiguous()

    def _round(self, layers: list[Layer], plan: Mapping[str, Scheme], hessian: bitween.Hessian | None) -> None:
        """Round layers that read one tensor; those of one scheme together."""
        stacks: dict[Scheme, list[Layer]] = {}
        for layer in layers:
            stacks.setdefault(plan[layer.name], []).append(layer)
        for scheme, stack in stacks.items():
            method = method_below_8_bits(scheme, self.method)
            known = self.importance.get(stack[0].name)
            if hessian is None and known is not None and method not in ("rtn", "trellis"):
                tensors = [bitween.quantize(x.weight, scheme, method="clip", importance=known) for x in stack]
            else:
                tensors = [found[0] for found in round_stack(stack, scheme, method, hessian)]
            for layer, tensor in zip(stack, tensors, strict=True):
                self.candidate.put(layer, tensor)


def _same_answers(a: Any, b: Any) -> bool:
    """Equal but for the order of sums, which other numbers of threads may change."""
    one, other = tensors_of(a), tensors_of(b)
    if list(one) != list(other):
        return False
    close = (torch.allclose(one[n], other[n], rtol=1e-4, atol=1e-5 * one[n].abs().max().item()) for n in one)
    return all(a.shape == b.shape for a, b in zip(one.values(), other.values(), strict=True)) and all(close)
