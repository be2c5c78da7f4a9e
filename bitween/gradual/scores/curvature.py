"""How the output curves in every layer's weights: the Fisher information, in two factors a layer.

To second order, damage = 1/2 E[(sum over tokens of g . dW x)^2] / tokens, with g the gradient of the summed loss
at a layer's output for labels SAMPLED from the model, which makes it the Fisher information and no fit is
needed (Kunstner et al., arXiv 1905.12558, on why data labels would overshoot). Two forms are kept:

  K-FAC         1/2 sum_o G_o dW_o H dW_o^T,  G_o = E[g_o^2],  H = E[x x^T]   (Martens & Grosse, arXiv 1503.05671)
  elementwise   1/2 sum dW^2 * F,             F = E[(dL/dW)^2] / tokens       (errors without structure)

GPTQ leaves errors that H makes cheap. Column j's error then counts with the variance of x_j given the columns
quantized after it, which is the squared diagonal of a Cholesky factor of H: the `conditional` of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.linalg import lapack

import bitween
from bitween._progress import Progress, no_progress
from bitween.gradual.scores.unreached import impute
from bitween.model.head import position_blocks
from bitween.realise.context import RunContext
from bitween.scheme import TILE

__all__ = ["LayerCurvature", "block_variances", "collect_curvature", "conditional_variances", "keep_moment"]

DAMPING = 0.01  # of the mean diagonal, added to H before it is factored
_ROWS = 256  # of a matrix that are worked on at once


@dataclass
class LayerCurvature:
    """Curvature of one layer of shape (rows, cols).

    Attributes
    ----------
    rows : float64 (rows,), G_o in nats^2 per output unit^2
    energy : float64 (windows,), sum of G_o for each window alone; its spread gives the error bar
    moment : float64 (cols,), E[x_j^2], the diagonal of H
    conditional : float64 (cols,), variance of x_j given the columns after it
    blocked : float64 (cols,) or None, variance of x_j given the blocks of 16 columns after its own, in the order of
        their activity: what counts for a trellis path, which can't look ahead at its own errors
    elementwise : float32 (rows, cols) or None, F
    tokens : tokens that reached the layer
    """

    rows: np.ndarray
    energy: list[float] = field(default_factory=list)
    moment: np.ndarray | None = None
    conditional: np.ndarray | None = None
    blocked: np.ndarray | None = None
    elementwise: torch.Tensor | None = None
    tokens: int = 0

    @property
    def relative_error(self) -> float:
        """Standard error of the layer's curvature over windows, relative to it."""
        energy = np.asarray(self.energy)
        if len(energy) < 2 or energy.mean() <= 0:
            return float("nan")
        return float(energy.std(ddof=1) / np.sqrt(len(energy)) / energy.mean())


def conditional_variances(hessian: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """Variance of each column given all later ones, float64 (cols,), from E[x x^T] (cols, cols)."""
    return np.diagonal(_upper_factor(hessian, damping)) ** 2


def block_variances(hessian: np.ndarray, damping: float = DAMPING, block: int = TILE) -> np.ndarray:
    """Variance of each column given those of later blocks, the most active block first; float64 (cols,)."""
    n = len(hessian)
    active = [np.diagonal(hessian)[k : k + block].mean() for k in range(0, n, block)]
    first = np.argsort(-np.array(active), kind="stable") * block
    blocks = [np.arange(k, min(n, k + block)) for k in first]
    order = np.concatenate(blocks)
    factor = _upper_factor(hessian, damping, order)
    found, at = np.empty(n), 0
    for columns in blocks:
        inside = slice(at, at := at + len(columns))
        found[columns] = (np.ascontiguousarray(factor[inside, inside]) ** 2).sum(1)
    return found


def _upper_factor(hessian: np.ndarray, damping: float, order: np.ndarray | None = None) -> np.ndarray:
    """U, upper triangular, with U U^T = the damped matrix, its rows and columns in this order.

    One float64 matrix is all that is held beside the one given; `np.linalg.cholesky` alone would take three.

    Raises
    ------
    np.linalg.LinAlgError
        The damped matrix is not positive definite.
    """
    hessian = np.asarray(hessian)
    backwards = np.arange(len(hessian))[::-1] if order is None else order[::-1]
    work = np.empty(hessian.shape)
    for k, row in enumerate(backwards):
        work[k] = hessian[row, backwards]
    _symmetrise(work)
    forwards = work[::-1, ::-1]
    work[np.diag_indices_from(work)] += damping * max(np.trace(forwards) / len(work), 1e-30)
    _, failed = lapack.dpotrf(work.T, lower=1, overwrite_a=1, clean=1)  # columns of the transpose lie in rows
    if failed:
        raise np.linalg.LinAlgError("Matrix is not positive definite")
    return work.T[::-1, ::-1]


def _symmetrise(matrix: np.ndarray) -> None:
    """(matrix + matrix^T) / 2 in place, some rows at a time."""
    for first in range(0, len(matrix), _ROWS):
        rows, rest = slice(first, first + _ROWS), slice(first, None)
        mean = (matrix[rows, rest] + matrix[rest, rows].T) / 2
        matrix[rows, rest], matrix[rest, rows] = mean, mean.T


def collect_curvature(
    context: RunContext,
    *,
    gradient_windows: int = 8,
    hessian_windows: int = 24,
    elementwise: bool = False,
    blocked: bool = False,
    progress: Progress = no_progress,
) -> dict[str, LayerCurvature]:
    """Curvature of every layer, the embedding and the head among them, from calibration text.

    Works block by block: the memory needed is one block's activations and gradients, plus the
    hidden states of the windows at hand.

    Parameters
    ----------
    gradient_windows, hessian_windows : calibration windows for G and for H, at most
    elementwise : also keep F, as much memory again as the weights in float32
    blocked : also find what trellis codes are scored with, for a second Cholesky factor of each layer's inputs

    Returns
    -------
    {layer name: LayerCurvature}
    """
    layers = {layer.name: layer for layer in (*context.layout.layers, context.layout.head)}  # the head also when tied
    found = {name: LayerCurvature(np.zeros(layer.shape[0])) for name, layer in layers.items()}
    ids = context.text.calibration.ids
    _collect_gradients(context, ids[:gradient_windows], found, elementwise, progress)
    _collect_moments(context, ids[:hessian_windows], found, blocked, progress)
    impute(found, layers, context.layout.embedding.name)
    return found


# ---- gradients ---------------------------------------------------------------------------------------


def _collect_gradients(context, ids, found, elementwise, progress) -> None:
    generator = torch.Generator().manual_seed(context.seed)
    total = 0
    for done, window in enumerate(ids.split(1)):
        total += window.numel()
        _one_window(context, window, found, generator, elementwise)
        progress("Fisher information", done + 1, len(ids), f"{total:,} tokens")
    for curvature in found.values():
        curvature.rows /= max(1, total)
        if curvature.elementwise is not None:
            curvature.elementwise /= max(1, total)


def _one_window(context, ids, found, generator, elementwise) -> None:
    """Forward without a graph, then backward block by block, each recomputed from its input."""
    runner = context.runner
    with runner:
        hidden, call = runner.embed(ids)
        states = []  # that enter each block
        for i in range(len(context.layout.blocks)):
            states.append(context.spill.keep(hidden))
            hidden = runner.run_block(i, states[-1], call)
        gradient = _head_gradient(context, hidden, found, generator, elementwise)
        context.spill.let_go()  # the head
        for i in reversed(range(len(context.layout.blocks))):
            gradient = _block_gradient(context, i, states.pop(), call, gradient, found, elementwise)
    _embedding_gradient(context, ids, gradient, found)


def _head_gradient(context, hidden, found, generator, elementwise) -> torch.Tensor:
    """Gradient at the last block's output of the summed loss on sampled labels."""
    runner, head = context.runner, context.layout.head
    hidden = hidden.detach().requires_grad_(True)
    final = runner.final(hidden, grad=True)
    leaf = final.detach().requires_grad_(True)
    curvature = found[head.name]
    with torch.enable_grad():
        energy, places = np.zeros(head.shape[0]), torch.rand(final.shape[1], 1, generator=generator)
        for part in position_blocks(final.shape[1], head.shape[0]):
            logits = runner.logits(leaf[0, part], grad=True).float()
            p = logits.detach().softmax(-1)
            loss = torch.nn.functional.cross_entropy(logits, _sample(p, places[part]), reduction="sum")
            loss.backward(inputs=[leaf])  # without `inputs` the weights too would get gradients, as large as they are
            # The head's own Fisher needs no sample: E over labels of (softmax - onehot)^2 is p (1 - p).
            energy += (p * (1 - p)).sum(0, dtype=torch.float64).numpy()
    curvature.rows += energy
    curvature.energy.append(float(energy.sum()) / len(places))
    if elementwise:
        _add_elementwise(
            curvature, head, torch.outer(torch.from_numpy(energy).float(), final.detach()[0].pow(2).mean(0))
        )
    final.backward(leaf.grad, inputs=[hidden])
    return hidden.grad


def _sample(p: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """One label a row of probabilities (rows, n), by inversion of uniform numbers (rows, 1); torch.multinomial takes
    ten times as long."""
    running = p.cumsum(-1)
    return torch.searchsorted(running, places * running[:, -1:]).clamp_(max=p.shape[-1] - 1)[:, 0]


def _block_gradient(context, i, hidden, call, gradient, found, elementwise) -> torch.Tensor:
    """Backward through block i; the squares of its layers' gradients are added up."""
    block, hooks = context.layout.blocks[i], []
    hidden = hidden.detach().requires_grad_(True)
    weights = [layer.module.weight for layer in block.layers]
    flags = [weight.requires_grad for weight in weights]

    def watch(layer):
        def forward_hook(_module, _inputs, output):
            if output.requires_grad:
                output.register_hook(lambda g: _add_rows(found[layer.name], g))

        return layer.module.register_forward_hook(forward_hook)

    try:
        for layer, weight in zip(block.layers, weights, strict=True):
            hooks.append(watch(layer))
            weight.requires_grad_(elementwise)
        out = context.runner.run_block(i, hidden, call, grad=True)
        wanted = [hidden, *(weights if elementwise else [])]
        gradients = torch.autograd.grad(out, wanted, gradient, allow_unused=True)
        for layer, g in zip(block.layers, gradients[1:], strict=False):
            if g is not None:
                _add_elementwise(found[layer.name], layer, g.detach().float().pow(2))
    finally:
        for hook in hooks:
            hook.remove()
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
    return gradients[0]


def _add_rows(curvature: LayerCurvature, gradient: torch.Tensor) -> None:
    squares = gradient.detach().float().reshape(-1, gradient.shape[-1]).pow(2).sum(0, dtype=torch.float64).numpy()
    curvature.rows += squares
    curvature.energy.append(float(squares.sum()) / (gradient.numel() // gradient.shape[-1]))


def _add_elementwise(curvature: LayerCurvature, layer, squares: torch.Tensor) -> None:
    if layer.kind == "conv1d":
        squares = squares.T
    if curvature.elementwise is None:
        curvature.elementwise = torch.zeros(layer.shape)
    curvature.elementwise += squares


def _embedding_gradient(context, ids, gradient, found) -> None:
    """An embedding is a layer whose input is one-hot: rows are chosen by frequency, columns are outputs.

    Here `moment` and `conditional` hold the outputs' curvature and `rows` the frequency of each token, so that
    1/2 sum_v rows_v sum_c moment_c dE_vc^2 reads like any other layer's damage. Between table and first block a model
    may scale, normalise, project or repeat; where that can't be followed, the columns share alike what is known.
    """
    curvature, columns = found[context.layout.embedding.name], context.layout.embedding.shape[1]
    at_table = context.runner.table_gradient(ids, gradient)
    gradient = (gradient if at_table is None else at_table).detach().float().flatten(0, -2)
    squares = gradient.pow(2).sum(0, dtype=torch.float64).numpy()
    if len(squares) != columns:
        squares = np.full(columns, squares.sum() / columns)
    curvature.moment = squares if curvature.moment is None else curvature.moment + squares
    curvature.tokens += ids.numel()
    counts = torch.bincount(ids.reshape(-1), minlength=len(curvature.rows)).double().numpy()
    curvature.rows += counts + len(ids) / len(curvature.rows)  # a token not seen here is not free
    curvature.energy.append(float(squares.sum()) / ids.numel())


# ---- inputs ------------------------------------------------------------------------------------------


def _collect_moments(context, ids, found, blocked, progress) -> None:
    runner, layout = context.runner, context.layout
    embedding = found[layout.embedding.name]
    embedding.moment = embedding.conditional = embedding.blocked = embedding.moment / max(1, embedding.tokens)
    with runner:
        keep = context.spill.keep
        calls, states = [], []
        for part in context.batches(ids):
            hidden, call = runner.embed(part)
            calls.append(call)
            states.append(keep(hidden))
        for i in range(len(layout.blocks)):
            moments: dict[tuple[str, ...], bitween.Hessian] = {}
            for k, call in enumerate(calls):
                left, inputs = runner.capture_inputs(i, states[k], call)
                states[k] = keep(left)
                for names, x in inputs.items():
                    moments.setdefault(names, bitween.Hessian(x.shape[-1])).add(x)
            for names in tuple(moments):
                keep_moment(found, names, moments.pop(names), blocked)
            progress("input covariances", i + 1, len(layout.blocks) + 1, layout.blocks[i].name)
        last = bitween.Hessian(layout.head.shape[1])
        for hidden in states:
            last.add(runner.final(hidden).float().reshape(-1, layout.head.shape[1]))
        keep_moment(found, (layout.head.name,), last, blocked)
        progress("input covariances", len(layout.blocks) + 1, len(layout.blocks) + 1, layout.head.name)


def keep_moment(found, names, hessian, blocked: bool) -> None:
    """Give the layers of these names, which read the same inputs, what their Hessian tells; it gathers no more."""
    matrix = hessian.settle().matrix()
    conditional = conditional_variances(matrix)
    by_block = block_variances(matrix) if blocked else None
    for name in names:
        found[name].moment = np.diagonal(matrix).astype(np.float64)
        found[name].conditional, found[name].blocked = conditional, by_block
        found[name].tokens = hessian.tokens
