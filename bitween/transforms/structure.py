"""What a model does with its channels, found by watching it work on a few tokens.

Nothing is concluded from names. A norm is recognised by its effect, its readers by the tensor they read,
the residual stream by adding up what the layers write, and a pair of layers between which channels can be
scaled by scaling them and looking what arrives.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import nn

from bitween.model.blocks import BlockRunner, Context, Layer, ModelLayout, check_described
from bitween.model.precision import in_float32

_TOLERANCE = 1e-4  # relative, for comparisons of float32 results
_TOKENS = 8


@dataclass(frozen=True, eq=False)
class Norm:
    """A root-mean-square norm whose gain can move into the layers behind it.

    `gain` (width,) is float64; the module computes gain = weight + `offset` (Gemma stores gain - 1).
    """

    name: str
    module: nn.Module = field(repr=False)
    offset: float
    readers: tuple[str, ...]

    @property
    def weight(self) -> nn.Parameter:
        return next(self.module.parameters())

    @property
    def gain(self) -> torch.Tensor:
        return self.weight.detach().double() + self.offset


@dataclass(frozen=True)
class Pair:
    """Two layers between which every channel passes by itself: scaling it before undoes scaling it after.

    `source` writes the channels, `sink` reads them, both by name. `heads` is None where channel j stays
    channel j (up and down of a gated MLP), else (query heads, key-value heads, channels per head).
    """

    source: str
    sink: str
    heads: tuple[int, int, int] | None


@dataclass(frozen=True, eq=False)
class Structure:
    """What was found; each reason says why a thing is not possible, or is None.

    `readers` and `writers` are the layers that read the residual stream through a norm, and add to it.
    """

    norms: tuple[Norm, ...]
    pairs: tuple[Pair, ...]
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    not_folded: dict[str, str]
    stream_reason: str | None
    pair_reasons: dict[str, str]


@dataclass
class _Event:
    """One call of a module inside a block."""

    name: str
    module: nn.Module
    x: torch.Tensor
    out: torch.Tensor


@dataclass
class _Probe:
    """Block `i` with inputs to try it on."""

    runner: BlockRunner
    i: int
    hidden: torch.Tensor
    context: Context

    @property
    def layers(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.runner.layout.blocks[self.i].layers}

    def run(self) -> torch.Tensor:
        return self.runner.run_block(self.i, self.hidden, self.context)


def find_structure(model: nn.Module, layout: ModelLayout) -> Structure:
    """Watch `model` on a few tokens and describe its norms, its residual stream and its pairs of layers."""
    check_described(model, layout)
    if layout.one_block:  # which module follows which is not known
        return Structure((), (), (), (), {}, f"the model runs as a whole: {layout.one_block}", {})
    norms: list[Norm] = []
    pairs: list[Pair] = []
    writers: list[str] = []
    not_folded: dict[str, str] = {}
    pair_reasons: dict[str, str] = {}
    reasons: list[str] = []
    with in_float32(model), BlockRunner(model, layout, products="fp32") as runner:
        ids = torch.arange(_TOKENS, device=runner.device)[None] * 7 % layout.embedding.shape[0]
        hidden, context = runner.embed(ids)
        reasons += _check_embedding(layout, ids, hidden)
        for i, block in enumerate(layout.blocks):
            probe = _Probe(runner, i, hidden, context)
            events, out = _watch(probe, block.name)
            found, refused = _find_norms(probe, events)
            norms += found
            not_folded |= refused
            written, reason = _follow_stream(probe, events, out, found)
            writers += written
            reasons += [reason] if reason else []
            block_pairs, missing = _find_pairs(probe, events)
            pairs += block_pairs
            pair_reasons |= missing
            hidden = out
        final, reason = _final_norm(layout, hidden)
    norms += [final] if final else []
    reasons += [reason] if reason else []
    readers = tuple(reader for norm in norms for reader in norm.readers)
    stream_reason = next(iter((*not_folded.values(), *reasons)), None)
    return Structure(tuple(norms), tuple(pairs), readers, tuple(writers), not_folded, stream_reason, pair_reasons)


# ---- watching -------------------------------------------------------------------------------------


def _watch(probe: _Probe, prefix: str) -> tuple[list[_Event], torch.Tensor]:
    """Every call of an innermost module of the block, and the block's output."""
    events: list[_Event] = []

    def record(name: str) -> Callable:
        def hook(module, args, kwargs, out):
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            if tensors and isinstance(out, torch.Tensor):
                events.append(_Event(name, module, tensors[0].detach(), out.detach()))

        return hook

    with ExitStack() as hooks:
        for name, module in probe.runner.layout.blocks[probe.i].module.named_modules():
            if not list(module.children()):
                hooks.callback(module.register_forward_hook(record(f"{prefix}.{name}"), with_kwargs=True).remove)
        out = probe.run()
    return events, out


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    gap = (a - b).abs().max().item()
    return gap <= _TOLERANCE * max(b.abs().max().item(), torch.finfo(torch.float32).tiny)


# ---- norms ----------------------------------------------------------------------------------------


def _find_norms(probe: _Probe, events: list[_Event]) -> tuple[list[Norm], dict[str, str]]:
    """Norms whose output goes to linear layers only; and the reasons against the others that layers read."""
    norms, refused = [], {}
    for event in events:
        readers = tuple(e.name for e in events if e.name in probe.layers and _same_memory(e.x, event.out))
        if event.name in probe.layers or not readers or not _is_vector_module(event.module):
            continue
        offset = rms_offset(event.module, event.x.shape[-1])
        if offset is None:
            refused[event.name] = f"{event.name}: {type(event.module).__name__} is no root-mean-square norm with a gain"
        elif not _only_layers_read(probe, event, readers):
            refused[event.name] = f"{event.name}: its output is read by more than linear layers"
        elif shared := [r for r in readers if probe.layers[r].shared or probe.layers[r].quantized]:
            refused[event.name] = f"{event.name}: {shared[0]} is quantized already or shared with another module"
        else:
            norms.append(Norm(event.name, event.module, offset, readers))
    return norms, refused


def _is_vector_module(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and all(p.ndim == 1 for p in parameters)


def rms_offset(module: nn.Module, width: int) -> float | None:
    """The number that the module adds to its weight to get its gain: 0 or 1; None if it is no RMS norm."""
    weights = list(module.parameters())
    if len(weights) != 1 or weights[0].shape != (width,):
        return None
    generator = torch.Generator().manual_seed(0)
    x = 1e3 * (0.5 + torch.randn(4, width, generator=generator))  # so large that epsilon does not matter
    x = x.to(weights[0])
    try:
        y = module(x).double()
    except Exception:  # wants more than one argument, as a gated norm does: not a plain one
        return None
    plain = x.double() * x.double().square().mean(-1, keepdim=True).rsqrt()
    tolerance = 8 * torch.finfo(weights[0].dtype).eps * y.abs().max().item()
    for offset in (0.0, 1.0):
        if (y - plain * (weights[0].double() + offset)).abs().max().item() <= tolerance:
            return offset
    return None


def _only_layers_read(probe: _Probe, norm: _Event, readers: tuple[str, ...]) -> bool:
    """Spoil the norm's output for everyone but the `readers`: nothing may change."""
    expected = probe.run()

    def spoil(_module, _args, out):
        return out + 1.0

    def restore(_module, args):
        return (args[0] - 1.0, *args[1:])

    with ExitStack() as hooks:
        hooks.callback(norm.module.register_forward_hook(spoil).remove)
        for reader in readers:
            hooks.callback(probe.layers[reader].module.register_forward_pre_hook(restore).remove)
        return _close(probe.run(), expected)


# ---- the residual stream --------------------------------------------------------------------------


def _check_embedding(layout: ModelLayout, ids: torch.Tensor, hidden: torch.Tensor) -> list[str]:
    if layout.embedding.quantized:
        return [f"{layout.embedding.name} is quantized already"]
    rows = layout.embedding.weight[ids].to(hidden)
    if rows.shape == hidden.shape:
        factor = (hidden * rows).sum() / rows.square().sum()
        if _close(hidden, factor * rows):
            return []
    return [f"what enters the first block is not {layout.embedding.name} times a number"]


def _follow_stream(
    probe: _Probe, events: list[_Event], out: torch.Tensor, norms: list[Norm]
) -> tuple[list[str], str | None]:
    """Layers that add to the stream; and why the block is not its input plus what they write, if so."""
    behind_norms = {reader for norm in norms for reader in norm.readers}
    names = {norm.name for norm in norms}
    points, writers, written = [probe.hidden], [], []
    for event in events:
        on_stream = any(_close(event.x, point) for point in points)
        if event.name in names:
            if event.x.shape == out.shape and not on_stream:
                return [], f"{event.name} does not read the sum of the block's input and its layers' outputs"
        elif any(_same_memory(event.x, w) for w in written) and _is_vector_module(event.module):
            return [], f"{event.name} works on a layer's output before it is added to the residual stream"
        elif event.name in probe.layers and event.name not in behind_norms:
            if on_stream:
                return [], f"{event.name} reads the residual stream without a norm"
            if event.out.shape == out.shape:
                writers.append(event.name)
                written.append(event.out)
                points.append(points[-1] + event.out)
    if not _close(out, points[-1]):
        block = probe.runner.layout.blocks[probe.i].name
        return [], f"{block} computes more than its input plus the outputs of its layers"
    if shared := [w for w in writers if probe.layers[w].shared or probe.layers[w].quantized]:
        return [], f"{shared[0]} is quantized already or shared with another module"
    return writers, None


def _final_norm(layout: ModelLayout, hidden: torch.Tensor) -> tuple[Norm | None, str | None]:
    """The norm before the head, if it is all there is."""
    if len(layout.tail) != 1:
        return None, f"expected one norm between the last block and the head; got {len(layout.tail)} modules"
    name, module = layout.tail[0]
    offset = rms_offset(module, hidden.shape[-1])
    if offset is None:
        return None, f"{name}: {type(module).__name__} is no root-mean-square norm with a gain"
    return Norm(name, module, offset, (layout.head.name,)), None


# ---- pairs ----------------------------------------------------------------------------------------


def _find_pairs(probe: _Probe, events: list[_Event]) -> tuple[list[Pair], dict[str, str]]:
    """For each layer that reads what other layers made, the one whose channels reach it one by one."""
    layers = probe.layers
    normed = [e.out for e in events if e.name not in layers and _is_vector_module(e.module)]
    order = [e for e in events if e.name in layers]
    pairs, reasons = [], {}
    for place, event in enumerate(order):
        sink = layers[event.name]
        alone = sum(_same_memory(event.x, other.x) for other in order) == 1
        if not alone or any(_same_memory(event.x, out) for out in normed) or not _can_change(sink):
            continue
        sources = [layers[e.name] for e in order[:place] if _can_change(layers[e.name])]
        base = _input_of(probe, sink.name)
        for source in sources:
            heads = _heads(probe, source, sink)
            fits = source.shape[0] == sink.shape[1] or (heads is not None and sink.shape[1] % source.shape[0] == 0)
            if fits and _passes_channels(probe, source, sink, base, heads):
                pairs.append(Pair(source.name, sink.name, heads))
                break
        else:
            reasons[sink.name] = f"{sink.name}: no layer's channels reach it one by one"
    return pairs, reasons


def _can_change(layer: Layer) -> bool:
    """Experts are left out: which tokens reach them depends on what is changed before them."""
    return not layer.quantized and not layer.shared and layer.kind not in ("expert", "router")


def _passes_channels(
    probe: _Probe, source: Layer, sink: Layer, base: torch.Tensor, heads: tuple[int, int, int] | None
) -> bool:
    """Scale each of the source's channels by its own number: does the sink get its channels scaled so?"""
    outputs = source.shape[0]
    scales = 1 + torch.randperm(outputs, generator=torch.Generator().manual_seed(0)).to(base) / outputs
    handle = source.module.register_forward_hook(lambda _m, _args, out: out * scales)
    try:
        moved = _input_of(probe, sink.name)
    finally:
        handle.remove()
    gap = (moved - base * spread(scales, sink.shape[1], heads)).abs().amax(0)
    size = base.abs().amax(0)
    return bool((gap <= 10 * _TOLERANCE * size + 0.01 * _TOLERANCE * size.max()).all())


def spread(channels: torch.Tensor, width: int, heads: tuple[int, int, int] | None) -> torch.Tensor:
    """Numbers per channel of a pair's source (outputs,), as its sink reads them (width,)."""
    if heads is None:
        return channels
    query, key_value, size = heads
    return channels.view(key_value, 1, size).expand(key_value, query // key_value, size).reshape(width)


def _heads(probe: _Probe, source: Layer, sink: Layer) -> tuple[int, int, int] | None:
    """(query heads, key-value heads, channels per head) if the sink's parent knows its head size, as attention does."""
    parent = probe.runner.model.get_submodule(sink.name.rpartition(".")[0])
    size = getattr(parent, "head_dim", None)
    outputs, inputs = source.shape[0], sink.shape[1]
    if not isinstance(size, int) or outputs % size or inputs % size:
        return None
    return inputs // size, outputs // size, size


def _input_of(probe: _Probe, name: str) -> torch.Tensor:
    _, inputs = probe.runner.capture_inputs(probe.i, probe.hidden, probe.context, layers=[name])
    return inputs[(name,)]
