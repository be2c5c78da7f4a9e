"""Curvature of every matrix of a module that runs as a whole, by full backward passes, one example at a time.

As `bitween.gradual.scores.curvature`: labels are sampled from the model where its answer is a distribution, which makes
it the Fisher information of KL. Where the answer is numbers, the same role is played by random directions in the
outputs: for v of independent normal numbers E[(v . J dw)^2] = |J dw|^2, the squared change of the outputs (Hutchinson's
estimate of a Gauss-Newton matrix), scaled so that half of it is the relative squared error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

import bitween
from bitween._progress import Progress, no_progress
from bitween.gradual.scores.curvature import LayerCurvature, keep_moment
from bitween.model.layout import Layer
from bitween.model.outputs import Answer, answer_of
from bitween.model.replay import settled
from bitween.model.whole import rows_read
from bitween.realise.whole_context import WholeContext, run_on
from bitween.text.examples import Example

__all__ = ["collect_whole_curvature"]

_HESSIAN_BYTES = 1 << 30  # of second moments held at once; more of them take more passes
_ROWS = 4096  # that one call adds to second moments, at most


def collect_whole_curvature(
    context: WholeContext,
    *,
    gradient_examples: int = 16,
    hessian_examples: int = 32,
    progress: Progress = no_progress,
) -> dict[str, list[LayerCurvature]]:
    """Curvature of every layer, one entry a use: a table that is the head too has two.

    Parameters
    ----------
    gradient_examples, hessian_examples : calibration examples for output gradients and for inputs, at most

    Returns
    -------
    {layer name: [LayerCurvature]}; of lookups `rows` are frequencies and `moment` is the outputs' curvature.
    """
    found = {name: LayerCurvature(np.zeros(layer.shape[0])) for name, (layer, _) in _uses(context).items()}
    _gradients(context, found, context.examples.calibration[:gradient_examples], progress)
    _moments(context, found, context.examples.calibration[:hessian_examples], progress)
    layers = context.layout.layers
    uses = {layer.name: [found[n] for n in (layer.name, *layer.shared) if n in found] for layer in layers}
    return {x.name: uses[x.name] or [LayerCurvature(np.zeros(x.shape[0]))] for x in layers}


def _uses(context: WholeContext) -> dict[str, tuple[Layer, nn.Module]]:
    """{module name: (its layer, the module)} of layers that can be quantized; a module of several names once."""
    uses: dict[str, tuple[Layer, nn.Module]] = {}
    known: set[int] = set()
    for layer in (layer for layer in context.layout.layers if layer.plain):
        for name in (layer.name, *layer.shared):
            module = context.model.get_submodule(name)
            if id(module) not in known:
                known.add(id(module))
                uses[name] = layer, module
    return uses


# ---- gradients ---------------------------------------------------------------------------------------


def _gradients(context: WholeContext, found: dict, examples: list[Example], progress: Progress) -> None:
    generator = torch.Generator().manual_seed(context.seed)
    lookups: dict[str, int] = {}
    for done, example in enumerate(examples):
        sums: dict[str, float] = {}
        with _watched(context, found, sums, lookups), torch.enable_grad():
            out = run_on(context.model, example)
            answers = answer_of(out, example.inputs, context.kind, shifted=context.shifted)
            loss = _loss(answers, context, generator)
            if loss.requires_grad:
                loss.backward()
        for name, curvature in found.items():
            curvature.energy.append(sums.get(name, 0.0))
        progress("Fisher information", done + 1, len(examples), f"{len(found)} matrices")
    for name, curvature in found.items():
        layer, module = _uses(context)[name]
        if isinstance(module, nn.Embedding):
            counts = lookups.get(name, 0)
            curvature.rows = (curvature.rows + 1 / len(curvature.rows)) / max(1, counts + 1)
            curvature.moment = curvature.conditional = (
                np.zeros(layer.shape[1]) if curvature.moment is None else curvature.moment / len(examples)
            )
            curvature.tokens = counts
        else:
            curvature.rows /= len(examples)


@contextmanager
def _watched(context: WholeContext, found: dict, sums: dict[str, float], lookups: dict[str, int]) -> Iterator[None]:
    """The model in evaluation mode, no weight recorded, each layer's output watched by its gradient."""
    flags = [(p, p.requires_grad) for p in context.model.parameters()]
    with ExitStack() as undo:
        undo.enter_context(settled(context.model))
        for parameter, flag in flags:
            undo.callback(parameter.requires_grad_, flag)
            parameter.requires_grad_(False)
        for name, (layer, module) in _uses(context).items():
            watch = _watch(name, layer, module, found[name], sums, lookups)
            undo.callback(module.register_forward_hook(watch).remove)
        yield


def _watch(
    name: str, layer: Layer, module: nn.Module, curvature: LayerCurvature, sums: dict, lookups: dict
) -> Callable:
    table = isinstance(module, nn.Embedding)

    def hook(_module, args, output):
        if not output.requires_grad:  # the graph begins here; the copy may be written to in place
            output = output.detach().requires_grad_(True).clone()
        if table:
            ids = args[0].detach().reshape(-1)
            curvature.rows += np.bincount(ids.cpu().numpy(), minlength=layer.shape[0])
            lookups[name] = lookups.get(name, 0) + ids.numel()

        def note(gradient: torch.Tensor) -> None:
            g = gradient.detach().float()
            channels = g.ndim - len(module.kernel_size) - 1 if layer.kind == "conv" else g.ndim - 1
            others = [d for d in range(g.ndim) if d != channels]
            squares = (g.pow(2).sum(others, dtype=torch.float64) if others else g.double().pow(2)).numpy()
            sums[name] = sums.get(name, 0.0) + float(squares.sum())
            if table:
                curvature.moment = squares if curvature.moment is None else curvature.moment + squares
            else:
                curvature.rows += squares

        output.register_hook(note)
        return output

    return hook


def _loss(answers: Mapping[str, Answer], context: WholeContext, generator: torch.Generator) -> torch.Tensor:
    """A scalar whose squared gradients add up to the curvature of one example's damage."""
    total = torch.zeros(())
    for name, answer in answers.items():
        x = answer.values
        if context.kind == "kl":
            p = x.detach().softmax(-1)
            running = p.cumsum(-1)
            places = torch.rand(len(p), 1, generator=generator) * running[:, -1:]
            labels = torch.searchsorted(running, places).clamp_(max=p.shape[-1] - 1)[:, 0]
            total = total + nn.functional.cross_entropy(x, labels, reduction="sum") / math.sqrt(len(x) * len(answers))
        else:
            direction = torch.randn(x.shape, generator=generator)
            size = context.spread[name] * x.numel() * len(answers)
            total = total + (direction * x).sum() * math.sqrt(2 / size)
    return total


# ---- inputs ------------------------------------------------------------------------------------------


def _moments(context: WholeContext, found: dict, examples: list[Example], progress: Progress) -> None:
    """Second moments of what each layer reads; layers that read one tensor share them."""
    uses = {n: use for n, use in _uses(context).items() if not isinstance(use[1], nn.Embedding)}
    leaders = {name: names[0] for names in context.groups for name in names}
    groups: dict[str, list[str]] = {}
    for name in uses:
        groups.setdefault(leaders.get(name, name), []).append(name)
    batches = list(_batches(groups, uses))
    for done, batch in enumerate(batches):
        totals = {leader: bitween.Hessian(uses[batch[leader][0]][0].shape[1]) for leader in batch}

        def keep(layer: Layer, total: bitween.Hessian) -> Callable:
            def hook(_module, args, kwargs):
                x = (args or tuple(kwargs.values()))[0].detach()
                if layer.kind == "conv" and layer.module.groups > 1:
                    return
                rows = rows_read(layer, x)
                rows = rows[:: -(-len(rows) // _ROWS)] if len(rows) > _ROWS else rows
                total.add(rows.float().contiguous())

            return hook

        with ExitStack() as hooks:
            for leader, names in batch.items():
                layer, module = uses[names[0]]
                watch = keep(layer, totals[leader])
                hooks.callback(module.register_forward_pre_hook(watch, with_kwargs=True).remove)
            for example in examples:
                context.run(context.model, example)
        for leader, names in batch.items():
            if totals[leader].tokens:
                keep_moment(found, names, totals.pop(leader), blocked=False)
        progress("input covariances", done + 1, len(batches), next(iter(batch)))


def _batches(groups: dict[str, list[str]], uses: Mapping[str, Any]) -> Iterator[dict[str, list[str]]]:
    batch: dict[str, list[str]] = {}
    size = 0
    for leader, names in groups.items():
        need = 4 * uses[names[0]][0].shape[1] ** 2
        if batch and size + need > _HESSIAN_BYTES:
            yield batch
            batch, size = {}, 0
        batch[leader], size = names, size + need
    if batch:
        yield batch
