"""Which equivalent transforms a model allows, and why not the others. Nothing is changed here."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from bitween.model.blocks import ModelLayout
from bitween.transforms.structure import Norm, Pair, Structure, find_structure

STEPS = ("fold", "rotate", "heads", "scale")
DEFAULT_STEPS = ("rotate", "scale")


@dataclass(frozen=True)
class Untie:
    """What it costs to give a tied head a weight of its own.

    Attributes
    ----------
    extra_weights : int
        Weights that are then stored twice.
    extra_bytes : int
        The bytes they take at `table_bits`.
    allowed_bytes : int
        The bytes that a rotation is taken to be worth: half a bit for each weight in the blocks.
    decided : bool
        Whether the head is untied.
    """

    extra_weights: int
    extra_bytes: int
    allowed_bytes: int
    decided: bool

    def __str__(self) -> str:
        verb = "unties" if self.decided else "would untie"
        return (
            f"{verb} head and embedding: {self.extra_bytes:,} bytes more, "
            f"a rotation is worth about {self.allowed_bytes:,}"
        )


@dataclass(frozen=True, eq=False)
class TransformPlan:
    """What `apply` will do.

    Attributes
    ----------
    steps : tuple of str
        The steps that are possible, in the order of application.
    skipped : {str: str}
        For every step asked for that is not possible, or not everywhere, the reason.
    untie : Untie or None
        The price of untying; None when head and embedding are separate weights already.
    norms, rotated_pairs, scaled_pairs
        The norms to fold and the pairs of layers to treat.
    """

    steps: tuple[str, ...]
    skipped: dict[str, str]
    untie: Untie | None
    structure: Structure = field(repr=False)
    norms: tuple[Norm, ...] = field(repr=False)
    rotated_pairs: tuple[Pair, ...] = field(repr=False)
    scaled_pairs: tuple[Pair, ...] = field(repr=False)


def plan_transforms(
    model: nn.Module,
    layout: ModelLayout,
    steps: Iterable[str] = DEFAULT_STEPS,
    *,
    untie: bool | str = "auto",
    table_bits: float = 8.0,
) -> TransformPlan:
    """Find the equivalent transforms that `model` allows.

    Parameters
    ----------
    model, layout
        A causal language model and its `bitween.model.blocks.inspect` result.
    steps : iterable of str
        What is wanted, of "fold" (norm gains into the layers behind), "rotate" (the residual stream;
        includes folding), "heads" (rotate between value and output projection) and "scale" (channels
        between up and down, and between value and output where heads are not rotated).
        The default leaves out "heads", which raised the damage wherever it was measured. A rotation
        pays with GPTQ; with round to nearest at 3 bits it does harm.
    untie : "auto", True or False
        Whether a tied head may get a weight of its own, without which a rotation is not possible.
        "auto" does it when the copy, stored at `table_bits`, takes fewer bytes than half a bit for
        every weight in the blocks: that is what halving the damage is worth, and about what a rotation brings.

    Raises
    ------
    ValueError
        An unknown step, or a model that cannot be run block by block.
    """
    wanted = tuple(dict.fromkeys(steps))
    if unknown := [step for step in wanted if step not in STEPS]:
        raise ValueError(f"steps: expected some of {', '.join(STEPS)}; got {unknown[0]!r}")
    if untie not in ("auto", True, False):
        raise ValueError(f'untie: expected "auto", True or False; got {untie!r}')
    structure = find_structure(model, layout)
    skipped: dict[str, str] = {}
    price = _price(layout, untie, table_bits) if layout.tied else None
    rotate = "rotate" in wanted
    if rotate and (reason := _against_rotation(layout, structure, price)):
        skipped["rotate"], rotate = reason, False
    fold = rotate or "fold" in wanted
    norms, unfolded = _norms_to_fold(layout, structure, rotate, price) if fold else ((), {})
    head_pairs = tuple(p for p in structure.pairs if p.heads) if "heads" in wanted else ()
    scaled = tuple(p for p in structure.pairs if p not in head_pairs) if "scale" in wanted else ()
    done = {"fold": norms, "rotate": rotate, "heads": head_pairs, "scale": scaled}
    refused = {"fold": unfolded, "heads": structure.pair_reasons, "scale": structure.pair_reasons}
    for step in wanted:
        if step not in skipped and (refused.get(step) or not done[step]):
            skipped[step] = _in_short(refused.get(step) or {})
    return TransformPlan(
        tuple(step for step in STEPS if done[step]), skipped, price, structure, norms, head_pairs, scaled
    )


def _in_short(reasons: dict[str, str]) -> str:
    first = next(iter(reasons.values()), "no place for it was found")
    return first if len(reasons) < 2 else f"{first} (and {len(reasons) - 1} more)"


def _price(layout: ModelLayout, untie: bool | str, table_bits: float) -> Untie:
    rows, width = layout.embedding.shape
    inner = sum(layer.shape[0] * layer.shape[1] for block in layout.blocks for layer in block.layers)
    extra, allowed = round(rows * width * table_bits / 8), inner // 16
    return Untie(rows * width, extra, allowed, extra <= allowed if untie == "auto" else bool(untie))


def _against_rotation(layout: ModelLayout, structure: Structure, price: Untie | None) -> str | None:
    if structure.stream_reason:
        return structure.stream_reason
    if price and not price.decided:
        return f"head and embedding are one weight; {price}"
    if not layout.tied and (layout.head.shared or layout.embedding.shared):
        return "head or embedding is shared with another module"
    return f"{layout.head.name} is quantized already" if layout.head.quantized else None


def _norms_to_fold(
    layout: ModelLayout, structure: Structure, rotate: bool, price: Untie | None
) -> tuple[tuple[Norm, ...], dict[str, str]]:
    norms, refused = [], dict(structure.not_folded)
    for norm in structure.norms:
        if layout.head.name in norm.readers and price and not (rotate and price.decided):
            refused[norm.name] = f"{norm.name}: the head behind it is tied to the embedding"
        else:
            norms.append(norm)
    return tuple(norms), refused
