"""What a model may weigh: its bytes now and at the target, and the schemes that each layer may take."""

from __future__ import annotations

import math
from typing import Any

from bitween.export.targets import Target
from bitween.gradual.plan.items import Item, Option, tie
from bitween.gradual.plan.planner import InfeasibleTarget
from bitween.gradual.scores.fisher import KEEP
from bitween.model import blocks
from bitween.model.memory import model_bytes
from bitween.model.whole import WholeLayout
from bitween.realise.context import RunContext
from bitween.scheme import Scheme

__all__ = ["Sizes"]


class Sizes:
    """Exact bytes, before anything is measured.

    Parameters
    ----------
    model, layout : the user's own, in its own dtype
    target : what the export target runs
    schemes : candidates
    ignore_layers : names or patterns of layers to leave alone
    reduction : share of the model's bytes to save, between 0 and 1

    Attributes
    ----------
    original, limit : bytes of the whole model now and at the target
    fixed : bytes of everything that is no layer: norms, biases, buffers
    """

    def __init__(
        self,
        model: Any,
        layout: blocks.ModelLayout | WholeLayout,
        target: Target,
        schemes: tuple[Scheme, ...],
        ignore_layers: tuple[str, ...],
        reduction: float,
    ) -> None:
        self.layout, self.target, self.schemes = layout, target, schemes
        self.ignore_layers, self.reduction = ignore_layers, reduction
        self.dtype = layout.dtype if isinstance(layout, WholeLayout) else layout.embedding.module.weight.dtype
        self.original = model_bytes(model)
        self.limit = int(self.original * (1 - reduction))
        self.fixed = self.original - sum(layer.nbytes for layer in layout.layers)

    @property
    def layer_limit(self) -> int:
        """Bytes that the target leaves for layers."""
        return self.limit - self.fixed

    @property
    def least(self) -> int:
        """The fewest bytes of the whole model that any plan reaches."""
        return self.fixed + sum(min([x.nbytes, *(s.nbytes(*x.shape) for s in self.fitting(x))]) for x in self.layers)

    @property
    def layers(self) -> list[blocks.Layer]:
        """All layers, those left alone too."""
        return self.layout.layers

    def ignored(self, layer: blocks.Layer) -> bool:
        """Whether the layer stays as it is."""
        if not layer.plain or layer.kind == "router" or (layer.kind == "embedding" and not self.target.embeddings):
            return True
        if layer.kind in ("table", "own", "conv") and not self.target.in_place:
            return True
        return layer.matches(self.ignore_layers)

    def fitting(self, layer: blocks.Layer) -> list[Scheme]:
        """Schemes that the layer may take."""
        return [] if self.ignored(layer) else [s for s in self.schemes if self.target.fits(s, layer.shape)]

    def uniform(self, scheme: Scheme) -> int:
        """Bytes of the layers with one scheme wherever one is allowed."""
        return sum(x.nbytes if self.ignored(x) else scheme.nbytes(*x.shape) for x in self.layers)

    def check_reach(self) -> None:
        """InfeasibleTarget when no plan reaches the limit."""
        if self.least > self.limit:
            raise InfeasibleTarget(
                f"target_memory_reduction: expected at most {1 - self.least / self.original:.3f}, since the smallest "
                f"schemes allowed need {self.least:,} of {self.original:,} bytes; got {self.reduction}",
                self.least,
                "bytes",
            )

    def full_precision(self, least: float = 0.001) -> list[dict[str, Any]]:
        """What can take no scheme and holds at least this share of the model's bytes: name, bytes and why."""
        found = [(x.name, x.nbytes, self._why(x)) for x in self.layers if not self.fitting(x)]
        found += [(kept.name, math.prod(kept.shape) * self.dtype.itemsize, kept.reason) for kept in self.layout.kept]
        found = [entry for entry in found if entry[1] >= least * self.original]
        return [{"name": n, "bytes": size, "why": why} for n, size, why in sorted(found, key=lambda x: (-x[1], x[0]))]

    def _why(self, layer: blocks.Layer) -> str:
        if layer.matches(self.ignore_layers):
            return "ignore_layers names it"
        if layer.kind == "router":
            return "it chooses the experts, and a small change would send tokens elsewhere"
        if not layer.plain:
            return f"{type(layer.module).__name__} does more than its product or lookup"
        return f"no scheme fits that {self.target.name} runs"

    def plannable(self, items: list[Item], context: RunContext | None = None) -> list[Item]:
        """Of scored items what may be planned: ignored layers keep what they are, sizes are those of the user's own
        dtype, and layers that the target fuses become one item."""
        found = []
        for item in items:
            layer = self.layout.layer(item.name)
            kept = Option(KEEP, layer.nbytes, 0.0)
            fitting = set(self.fitting(layer))
            found.append(Item(item.name, (*(option for option in item.options if option.key in fitting), kept)))
        if context is None:
            return found
        groups = self._stacked(found) if self.target.stacks else {}
        if self.target.fuses:
            tied = {name for names in groups.values() for name in names}
            shared = [names for i in range(len(context.layout.blocks)) for names in context.runner.shared_inputs(i)]
            groups |= {" + ".join(names): names for names in shared if len(names) > 1 and not tied & set(names)}
        return tie(found, groups)

    def _stacked(self, items: list[Item]) -> dict[str, list[str]]:
        """{stack: its experts' matrices}."""
        groups: dict[str, list[str]] = {}
        for item in items:
            if self.layout.layer(item.name).kind == "expert":
                groups.setdefault(item.name.rpartition(".")[0], []).append(item.name)
        return groups
