"""Carry out a transform plan on a model, all of it or nothing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from bitween.model.blocks import Layer, ModelLayout, check_described, inspect
from bitween.model.precision import in_float32
from bitween.model.replay import logits_of, settled
from bitween.transforms.operators import Diagonal, Operator, PerHead, hadamard, orthogonal, rotation
from bitween.transforms.plan import TransformPlan
from bitween.transforms.scaling import ErrorFunction, ScaleChoice, choose_scales, group_range_error
from bitween.transforms.structure import Pair, spread

_CHUNK = 1 << 20  # elements of a weight that are held in float64 at once, where its rows allow it
_CHECK_TOKENS = 64
_ALLOWED_CHANGE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}  # relative to the largest logit


@dataclass(frozen=True)
class TransformReport:
    """What was done.

    Attributes
    ----------
    steps : tuple of str
        Steps that were applied.
    skipped : {str: str}
        What was not, with the reason.
    folded, rotated, head_rotated, scaled : int
        Norms folded; layers (with the embedding) whose residual side was rotated; pairs of layers
        whose heads were rotated; pairs whose channels were scaled.
    untied_weights : int
        Weights that the head now holds for itself.
    logit_change : float
        Largest change of a logit over random tokens, relative to the largest logit.
    scales : {str: ScaleChoice}
        By name of the reading layer.
    layout : ModelLayout
        The transformed model's layout; embedding and head are separate in it if they were untied.
    """

    steps: tuple[str, ...]
    skipped: dict[str, str]
    folded: int
    rotated: int
    head_rotated: int
    scaled: int
    untied_weights: int
    logit_change: float
    scales: dict[str, ScaleChoice]
    layout: ModelLayout = field(repr=False)


@dataclass
class _Edit:
    """Operators on a layer's input side (`columns`) and output side (`rows`), to be applied once in float64."""

    layer: Layer
    columns: list[Operator] = field(default_factory=list)
    rows: list[Operator] = field(default_factory=list)

    def weight(self) -> torch.Tensor:
        """The edited weight (outputs, inputs), rounded once to the layer's dtype."""
        old = self.layer.weight
        new = torch.empty_like(old, memory_format=torch.contiguous_format)
        if self.rows and self.columns:
            return self._rows_done(self._columns_done(old.double())).to(old.dtype)
        if self.rows:  # every column is turned by itself
            step = max(1, _CHUNK // old.shape[0])
            for start in range(0, old.shape[1], step):
                new[:, start : start + step] = self._rows_done(old[:, start : start + step].double())
            return new
        step = max(1, _CHUNK // old.shape[1])
        for start in range(0, old.shape[0], step):
            new[start : start + step] = self._columns_done(old[start : start + step].double())
        return new

    def bias(self) -> torch.Tensor | None:
        """The edited bias, None if there is none."""
        old = getattr(self.layer.module, "bias", None)
        if old is None:
            return None
        return self._rows_done(old.detach().double()[:, None])[:, 0].to(old.dtype)

    def _columns_done(self, x: torch.Tensor) -> torch.Tensor:
        for operator in self.columns:
            x = operator.right(x)
        return x

    def _rows_done(self, x: torch.Tensor) -> torch.Tensor:
        for operator in self.rows:
            x = operator.right(x.T).T
        return x


class _Edits:
    """The edits of all layers, collected before anything is changed."""

    def __init__(self, layout: ModelLayout):
        self._layers = {layer.name: layer for layer in (*layout.layers, layout.head)}
        self.by_name: dict[str, _Edit] = {}

    def __getitem__(self, name: str) -> _Edit:
        return self.by_name.setdefault(name, _Edit(self._layers[name]))


def apply(
    model: nn.Module,
    layout: ModelLayout,
    plan: TransformPlan,
    *,
    rotation_kind: str = "hadamard",
    seed: int = 0,
    error: ErrorFunction = group_range_error,
    energy: Mapping[str, torch.Tensor] | None = None,
    keep: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> TransformReport:
    """Transform `model` in place so that it computes the same function with weights easier to quantize.

    All new weights are computed, in float64, before the first one is put in place; then the logits of
    the transformed model are compared with those from before. If anything fails the model is left, or
    put back, exactly as it was. While this runs the changed weights exist twice.

    Parameters
    ----------
    model, layout, plan
        The model, its `inspect` result and its `plan_transforms` result.
    rotation_kind : {"hadamard", "random"}
        The kind of orthogonal matrix for stream and heads.
    seed : int
        For the random signs and matrices, drawn from a generator of their own.
    error : function
        (weight, importance) -> number that the choice of channel scales minimises.
    energy : {layer name: Tensor (inputs,)}, optional
        Mean square of the inputs of layers, from calibration text; used to choose channel scales.
    keep : function
        Given every new weight; returns the tensor that the model is to hold, of the same numbers.

    Raises
    ------
    ValueError
        The logits changed by more than rounding explains (the model is as before), or a bad argument.
    """
    check_described(model, layout)
    generator = torch.Generator().manual_seed(seed)
    edits = _Edits(layout)
    _fold(edits, plan)
    if "rotate" in plan.steps:
        _rotate(edits, layout, plan, rotation(layout.embedding.shape[1], rotation_kind, generator))
    for pair in plan.rotated_pairs:
        _rotate_heads(edits, pair, rotation_kind, generator)
    scales = {pair.sink: _scale(edits, pair, error, (energy or {}).get(pair.sink)) for pair in plan.scaled_pairs}
    untied = "rotate" in plan.steps and layout.tied
    ids = _check_ids(layout, seed)
    before = _logits(model, ids)
    originals = _put_in_place(model, layout, plan, edits, untied, keep)
    try:
        change = _relative_change(before, _logits(model, ids))
        allowed = _ALLOWED_CHANGE[layout.embedding.module.weight.dtype]
        if not change <= allowed:
            raise ValueError(f"model: expected the same logits after the transforms; got a change of {change:.1e}")
        now = inspect(model)
    except BaseException:
        originals.restore()
        raise
    return TransformReport(
        steps=plan.steps,
        skipped=dict(plan.skipped),
        folded=len(plan.norms),
        rotated=1 + len(plan.structure.readers) + len(plan.structure.writers) if "rotate" in plan.steps else 0,
        head_rotated=len(plan.rotated_pairs),
        scaled=len(scales),
        untied_weights=plan.untie.extra_weights if untied else 0,
        logit_change=change,
        scales=scales,
        layout=now,
    )


# ---- the steps, as operators ----------------------------------------------------------------------


def _fold(edits: _Edits, plan: TransformPlan) -> None:
    for norm in plan.norms:
        for reader in norm.readers:
            edits[reader].columns.append(Diagonal(norm.gain))


def _rotate(edits: _Edits, layout: ModelLayout, plan: TransformPlan, turn: Operator) -> None:
    edits[layout.embedding.name].columns.append(turn)
    for name in plan.structure.readers:
        edits[name].columns.append(turn)
    for name in plan.structure.writers:
        edits[name].rows.append(turn)


def _rotate_heads(edits: _Edits, pair: Pair, kind: str, generator: torch.Generator) -> None:
    query, key_value, size = pair.heads
    whole = kind == "hadamard" and size & (size - 1) == 0
    matrices = []
    for _ in range(key_value):
        if whole:
            signs = 2.0 * torch.randint(2, (size, 1), generator=generator, dtype=torch.float64) - 1
            matrices.append(signs * hadamard(size))
        else:
            matrices.append(orthogonal(size, generator))
    turns = torch.stack(matrices)
    edits[pair.source].rows.append(PerHead(turns))
    edits[pair.sink].columns.append(PerHead(turns.repeat_interleave(query // key_value, 0)))


def _scale(edits: _Edits, pair: Pair, error: ErrorFunction, energy: torch.Tensor | None) -> ScaleChoice:
    sink = edits[pair.sink]
    width, outputs = sink.layer.shape[1], edits[pair.source].layer.shape[0]

    def shared_mean(values: torch.Tensor) -> torch.Tensor:
        """The mean over the channels that come from one of the source's."""
        if pair.heads is None:
            return values
        query, key_value, size = pair.heads
        return spread(values.view(key_value, query // key_value, size).mean(1).reshape(outputs), width, pair.heads)

    scales, choice = choose_scales(sink.weight(), energy, error, shared_mean)
    if choice.error < 1:
        sink.columns.append(Diagonal(scales))
        own = scales if pair.heads is None else _one_of_each(scales, pair.heads)
        edits[pair.source].rows.append(Diagonal(1 / own))
    return choice


def _one_of_each(values: torch.Tensor, heads: tuple[int, int, int]) -> torch.Tensor:
    query, key_value, size = heads
    return values.view(key_value, query // key_value, size)[:, 0].reshape(-1)


# ---- putting it in place --------------------------------------------------------------------------


class _Originals:
    """Everything that was replaced, so that it can be put back."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.data: list[tuple[nn.Parameter, torch.Tensor]] = []
        self.head: tuple[nn.Module, nn.Parameter] | None = None
        self.configs: list[object] = []

    def replace(self, parameter: nn.Parameter, new: torch.Tensor) -> None:
        self.data.append((parameter, parameter.data))
        parameter.data = new

    def untie(self, layout: ModelLayout) -> None:
        """Give the head a parameter of its own, with the tied weight's values."""
        head = layout.head.module
        self.head = head, head.weight
        head.weight = nn.Parameter(head.weight.detach(), requires_grad=head.weight.requires_grad)
        configs = {id(m.config): m.config for m in self.model.modules() if hasattr(m, "config")}
        self.configs = [c for c in configs.values() if getattr(c, "tie_word_embeddings", False)]
        self._set_tied(False)

    def restore(self) -> None:
        for parameter, data in reversed(self.data):
            parameter.data = data
        if self.head:
            self.head[0].weight = self.head[1]
            self._set_tied(True)

    def _set_tied(self, tied: bool) -> None:
        for config in self.configs:
            config.tie_word_embeddings = tied
        if hasattr(self.model, "all_tied_weights_keys"):  # transformers 5 keeps the list that saving goes by
            self.model.all_tied_weights_keys = self.model.get_expanded_tied_weights_keys(all_submodels=True)


def _put_in_place(
    model: nn.Module, layout: ModelLayout, plan: TransformPlan, edits: _Edits, untied: bool, keep: Callable
) -> _Originals:
    """Compute every new tensor, then exchange them; what was there before is returned."""
    new = [(edit.layer, _edited(edit, keep), edit.bias() if edit.rows else None) for edit in edits.by_name.values()]
    originals = _Originals(model)
    try:
        if untied:
            originals.untie(layout)
        for layer, stored, bias in new:
            originals.replace(layer.module.weight, stored)
            if bias is not None:
                originals.replace(layer.module.bias, bias)
        for norm in plan.norms:
            originals.replace(norm.weight, torch.full_like(norm.weight.data, 1 - norm.offset))
    except BaseException:
        originals.restore()
        raise
    return originals


def _edited(edit: _Edit, keep: Callable) -> torch.Tensor:
    """The edited weight as the module stores it; a function of its own, so that one is let go before the next is made.

    Raises
    ------
    ValueError
        It is beyond the dtype.
    """
    weight = edit.weight()
    low, high = torch.aminmax(weight)
    if not torch.isfinite(low + high):
        raise ValueError(
            f"{edit.layer.name}: expected finite weights after the transforms; got values beyond the dtype"
        )
    return keep(weight.T.contiguous() if edit.layer.kind == "conv1d" else weight)


def _check_ids(layout: ModelLayout, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(layout.embedding.shape[0], (1, _CHECK_TOKENS), generator=generator)


def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with settled(model), in_float32(model), torch.no_grad():
        return logits_of(model(ids.to(next(model.parameters()).device))).double()


def _relative_change(before: torch.Tensor, after: torch.Tensor) -> float:
    return ((after - before).abs().max() / before.abs().max()).item()
