"""Any Hugging Face causal language model as an ordered row of blocks that can be run one at a time.

`inspect` describes the model, `BlockRunner` runs it. The runner never imitates a model's own loop: it
lets the model run it, with the blocks' work taken out, and so learns the arguments of every block and
the work around the blocks from the model itself.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

from bitween.layers import tiles
from bitween.model.experts import unfolded
from bitween.model.layout import Block, Kept, Layer, ModelLayout, check_finite, find_parts, kind_of
from bitween.model.lookups import Lookups
from bitween.model.one_block import OneBlockReplay
from bitween.model.replay import Call, Replay, Stop, hidden_of, logits_of, settled

__all__ = ["Block", "BlockRunner", "Context", "Kept", "Layer", "ModelLayout", "check_finite", "inspect", "kind_of"]

_PROBE_TOKENS = 8


@dataclass(frozen=True)
class Context:
    """What every block receives beside the hidden states (masks, positions), for one batch shape."""

    calls: tuple[Call, ...]


def inspect(model: nn.Module) -> ModelLayout:
    """Describe a causal language model: embedding, blocks, tail, head and their linear layers.

    Runs one block on a few tokens to see what follows the last block; the model is left as it was. Of a model with
    experts in 3-D parameters the unfolded copy is described, whose memory is the model's (`bitween.model.experts`).

    Raises
    ------
    ValueError
        The model has no linear layers, no list of blocks, no embedding or no head; weights are on
        the meta device, on several devices, or neither float32, float16 nor bfloat16; or the model
        does not run its blocks one after the other.
    """
    model = unfolded(_unwrap(model))
    embedding, blocks, head, others, kept = find_parts(model)
    names = {module: name for name, module in model.named_modules()}
    replay = Replay(model, [block.name for block in blocks], head.name)
    try:
        with settled(model), torch.no_grad():
            tail = replay.find_tail(_probe_ids(embedding))
        layout = ModelLayout(embedding, blocks, tuple((names[module], module) for module in tail), head, others, kept)
        if bool(torch.isfinite(_forward(model, embedding)).all()):  # else it overflows in its dtype, and none can tell
            BlockRunner(model, layout)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, RuntimeError) as error:
        return _as_one_block(model, (embedding, blocks, head, others, kept), error)
    return layout


def _as_one_block(model: nn.Module, parts: tuple, error: Exception) -> ModelLayout:
    """All layers between embedding and head as one block, for the reason that `error` gives.

    Where the model's own forward pass fails, that error is the one to see.
    """
    embedding, blocks, head, others, kept = parts
    _forward(model, embedding)
    outside = tuple(layer for layer in others if layer.kind in ("table", "own", "conv"))
    inside = (*(layer for block in blocks for layer in block.layers), *(x for x in others if x not in outside))
    whole = Block("", model, inside)
    layout = ModelLayout(embedding, (whole,), (), head, outside, kept, str(error).removeprefix("model: "))
    BlockRunner(model, layout)
    return layout


def _forward(model: nn.Module, embedding: Layer) -> torch.Tensor:
    """The model's logits for a few tokens."""
    with settled(model), torch.no_grad():
        return logits_of(model(_probe_ids(embedding)))


def check_described(model: nn.Module, layout: ModelLayout) -> None:
    """ValueError unless `layout` describes the very modules of `model`.

    That of a model with stacks of experts describes the unfolded copy: what changes the one would miss the other.
    """
    block = layout.blocks[0]
    if _unwrap(model).get_submodule(block.name) is not block.module:
        raise ValueError(
            f"layout: expected that of the model itself; got that of another, as {block.name} shows. A model with "
            "stacks of experts is worked on as bitween.model.experts.unfolded(model)"
        )


class BlockRunner:
    """Run a model block by block, with the model's own results.

    ::

        with BlockRunner(model, layout) as runner:
            hidden, context = runner.embed(ids)
            for i in range(len(layout.blocks)):
                hidden = runner.run_block(i, hidden, context)
            logits = runner.logits(runner.final(hidden))

    Parameters
    ----------
    model, layout
        A causal language model and its `inspect` result.
    products : {"auto", "bf16", "fp32"}
        "fp32" leaves the arithmetic to the model. "bf16" multiplies in bfloat16 (torch.autocast) and
        keeps the hidden states between the layers in float32. "auto" takes "bf16" where the CPU has
        it in hardware and, as far as `check` tells, the model's own code runs so.
    check : bool
        Compare with an ordinary forward pass over a few tokens first, and raise ValueError if the
        logits differ: some models pass more than hidden states from block to block.

    Notes
    -----
    Inside ``with`` the model is in evaluation mode without a cache; outside, every method sets and
    restores this itself. Training flags, hooks, config and the RNG come back as they were, also
    after an exception. Gradients are recorded only where ``grad=True`` is given.
    """

    def __init__(self, model: nn.Module, layout: ModelLayout, *, products: str = "auto", check: bool = True):
        if products not in ("auto", "bf16", "fp32"):
            raise ValueError(f'products: expected "auto", "bf16" or "fp32"; got {products!r}')
        self.model = unfolded(_unwrap(model))
        self.layout = layout
        self.device = next(self.model.parameters()).device
        bf16 = self.device.type != "cpu" or tiles.cpu_has_bf16()
        self.products = ("bf16" if bf16 else "fp32") if products == "auto" else products
        if layout.one_block:
            self._replay: Replay = OneBlockReplay(self.model, layout.embedding.name, layout.head.name)
        else:
            self._replay = Replay(self.model, [block.name for block in layout.blocks], layout.head.name)
        self._contexts: dict[tuple, Context] = {}
        self._shared: dict[int, tuple[tuple[str, ...], ...]] = {}
        self._held: ExitStack | None = None
        self._depth = 0  # of nested with statements; only the outermost restores the model
        self._plain_tail = self._plain_logits = False
        if check:
            self._check()
            if products == "auto" and self.products == "bf16" and not self._runs_mixed():
                self.products = "fp32"

    def __enter__(self) -> Self:
        self._depth += 1
        if self._held is None:
            self._held = ExitStack()
            self._held.enter_context(settled(self.model))
        return self

    def __exit__(self, *exc) -> None:
        self._depth -= 1
        if not self._depth:
            held, self._held = self._held, None
            held.close()

    # ---- the four steps -------------------------------------------------------------------------

    def embed(self, ids: torch.Tensor, **inputs) -> tuple[torch.Tensor, Context]:
        """Hidden states that enter the first block, and the blocks' other arguments.

        Parameters
        ----------
        ids : LongTensor (batch, length)
        **inputs
            More inputs for the model, for instance ``attention_mask``.
        """
        calls: list[Call] = []
        first: list[torch.Tensor] = []

        def on_block(i: int, call: Call, hidden: torch.Tensor) -> torch.Tensor:
            calls.append(call)
            if i == 0:
                first.append(hidden)
            if i == len(self.layout.blocks) - 1:
                raise Stop
            return hidden

        with self._quiet():
            self._replay.walk(ids.to(self.device), on_block, **inputs)
        if len(calls) != len(self.layout.blocks):
            raise ValueError(
                f"model: expected {len(self.layout.blocks)} blocks to run; the forward pass ran {len(calls)}"
            )
        return self._stream(first[0]), self._reuse(tuple(ids.shape), Context(tuple(calls)))

    def run_block(self, i: int, hidden: torch.Tensor, context: Context, *, grad: bool = False) -> torch.Tensor:
        """Hidden states (batch, length, width) after block `i`. `hidden` stays unchanged."""
        args, kwargs = context.calls[i].arguments(hidden)
        with self._quiet(grad), self._arithmetic():
            out = self._replay.block(i)(*args, **kwargs)
        return self._stream(hidden_of(out))

    def final(self, hidden: torch.Tensor, *, grad: bool = False) -> torch.Tensor:
        """What enters the head, from the last block's output: (batch, length, width)."""
        with self._quiet(grad), self._arithmetic():
            if not self._plain_tail:
                return self._stream(self._replay.to_head(self._blank_ids(hidden), hidden))
            for _, module in self.layout.tail:
                hidden = module(hidden)
            return self._stream(hidden)

    def logits(self, final: torch.Tensor, *, products: str | None = None, grad: bool = False) -> torch.Tensor:
        """The model's logits (..., vocabulary) from what enters the head (..., width).

        `products` overrides the runner's own choice for this one product; bfloat16 products round the
        logits themselves to bfloat16.
        """
        weight = self._replay.head._parameters.get("weight")  # none where it is packed, which takes any input
        if weight is not None and (products or self.products) == "fp32":
            final = final.to(weight.dtype)  # differences of states come in float32, heads may be in half precision
        with self._quiet(grad), self._arithmetic(products):
            raw = self._replay.head(final)
        return self.after_head(raw, grad=grad)

    def after_head(self, raw: torch.Tensor, *, grad: bool = False) -> torch.Tensor:
        """What the model makes of the head's output (..., vocabulary): mostly nothing, sometimes a scale or a cap."""
        if self._plain_logits:
            return raw
        with self._quiet(grad):
            rows = raw.reshape(-1, 1, raw.shape[-1])  # positions do not matter here, so each row is a batch item
            return self._replay.after_head(self._blank_ids(rows), rows).reshape(raw.shape)

    @property
    def plain_logits(self) -> bool:
        """Whether logits are exactly the head's output, so that they are linear in what enters the head."""
        return self._plain_logits

    # ---- inputs of the layers -------------------------------------------------------------------

    def capture_inputs(
        self, i: int, hidden: torch.Tensor, context: Context, layers: Collection[str] | None = None
    ) -> tuple[torch.Tensor | None, dict[tuple[str, ...], torch.Tensor]]:
        """Run block `i` and keep what its layers read.

        Parameters
        ----------
        layers : collection of str, optional
            Names of the layers wanted; default all of the block. With names given, the block stops
            as soon as each of them has been called once.

        Returns
        -------
        hidden : Tensor or None
            The block's output; None when `layers` was given.
        inputs : {names: Tensor (tokens, in_features)}
            One entry per distinct input. `names` are the layers that read this very tensor, in the
            order of execution. Layers that no token reached (experts) are absent.
        """
        wanted = self._wanted(i, layers)
        seen: dict[str, list[torch.Tensor]] = {}
        versions: list[tuple[str, torch.Tensor, int]] = []

        def keep(name: str) -> Callable:
            def hook(_module, args, kwargs):
                x = (args[0] if args else next(iter(kwargs.values()))).detach()
                seen.setdefault(name, []).append(x)
                versions.append((name, x, _version(x)))
                if layers is not None and len(seen) == len(wanted):
                    raise Stop

            return hook

        out = None
        with ExitStack() as hooks:
            for layer in wanted:
                handle = self.model.get_submodule(layer.name).register_forward_pre_hook(
                    keep(layer.name), with_kwargs=True
                )
                hooks.callback(handle.remove)
            with suppress(Stop):
                out = self.run_block(i, hidden, context)
        for name, x, version in versions:
            if _version(x) != version:
                raise ValueError(f"{name}: expected an input that stays; the model overwrites it in place")
        return (None if layers is not None else out), _group(seen)

    def table_gradient(self, ids: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor | None:
        """Gradient at the rows that `ids` look up in the word embedding, (lookups, columns).

        Parameters
        ----------
        ids : LongTensor (batch, length)
        gradient : at the first block's input, (batch, length, width), from which the embedding's columns may differ in
            scale and in number

        None where the table is read otherwise than by torch's lookup.
        """
        entering: list[torch.Tensor] = []

        def on_block(_i: int, _call: Call, hidden: torch.Tensor) -> torch.Tensor:
            entering.append(hidden)
            raise Stop

        weight = self.model.get_submodule(self.layout.embedding.name)._parameters.get("weight")
        if weight is None:
            return None
        with self._quiet(grad=True), Lookups(weight) as lookups:
            self._replay.walk(ids.to(self.device), on_block)
        if not lookups.found or not entering[0].requires_grad:
            return None
        found = torch.autograd.grad(entering, lookups.found, [gradient.to(entering[0].dtype)], allow_unused=True)
        known = [g.reshape(-1, g.shape[-1]) for g in found if g is not None]
        return torch.cat(known) if known else None

    def shared_inputs(self, i: int) -> tuple[tuple[str, ...], ...]:
        """Layers of block `i` grouped by the tensor they read, for instance (q, k, v), (o,), (gate, up), (down,).

        Found by running the blocks over a few tokens once. Layers that these tokens do not reach
        (experts) stand alone.
        """
        if i not in self._shared:
            hidden, context = self.embed(_probe_ids(self.layout.embedding))
            for j in range(i + 1):
                hidden, inputs = self.capture_inputs(j, hidden, context)
                reached = {name for names in inputs for name in names}
                alone = tuple((x.name,) for x in self.layout.blocks[j].layers if x.name not in reached)
                self._shared[j] = (*inputs, *alone)
        return self._shared[i]

    # ---- inside ---------------------------------------------------------------------------------

    def _wanted(self, i: int, names: Collection[str] | None) -> list[Layer]:
        own = self.layout.blocks[i].layers
        unknown = set(names or ()) - {layer.name for layer in own}
        if unknown:
            raise ValueError(f"layers: expected layers of {self.layout.blocks[i].name}; got {sorted(unknown)}")
        return [layer for layer in own if names is None or layer.name in names]

    @contextmanager
    def _quiet(self, grad: bool = False) -> Iterator[None]:
        hold = nullcontext() if self._held is not None else settled(self.model)
        with hold, torch.set_grad_enabled(grad):
            yield

    def _arithmetic(self, products: str | None = None):
        on = (products or self.products) == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on)

    def _stream(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.float() if self.products == "bf16" else hidden

    def _reuse(self, shape: tuple, context: Context) -> Context:
        """The same context with tensors shared with the last one of this shape wherever they are equal."""
        known = self._contexts.get(shape)
        if known is None:
            self._contexts = {shape: context}
            return context
        memo: dict = {}
        pairs = zip(context.calls, known.calls, strict=True)
        return Context(tuple(call.sharing(old, memo) for call, old in pairs))

    def _blank_ids(self, like: torch.Tensor) -> torch.Tensor:
        return torch.zeros(like.shape[:2], dtype=torch.long, device=self.device)

    def _keeps_state(self, i: int) -> str:
        if self.layout.one_block:
            return (
                "model: expected equal results from equal inputs; got others the second time, as with sampling inside "
                f"or a state that is kept ({self.layout.one_block})"
            )
        return f"model: cannot run block by block, {self.layout.blocks[i].name} keeps state"

    def _check(self) -> None:
        """Learn whether tail and logits are plain, and compare with the model's own forward pass."""
        own, self.products = self.products, "fp32"
        try:
            with self._quiet():
                ids = _probe_ids(self.layout.embedding)
                expected = logits_of(self.model(ids))
                hidden, context = self.embed(ids)
                for i in range(len(self.layout.blocks)):
                    before, hidden = hidden, self.run_block(i, hidden, context)
                    if not torch.equal(hidden, self.run_block(i, before, context)):
                        raise ValueError(self._keeps_state(i))
                final = self._replay.to_head(self._blank_ids(hidden), hidden)
                self._plain_tail = True
                self._plain_tail = torch.equal(final, self.final(hidden))
                raw = self._replay.head(final)
                self._plain_logits = torch.equal(raw, expected)
                _compare(expected, self.after_head(raw))
        finally:
            self.products = own

    def _runs_mixed(self) -> bool:
        """Whether the model's code bears products that come in another dtype than their operands (DBRX's adds them to
        a tensor of the operands' in place, which torch refuses)."""
        hidden, context = self.embed(_probe_ids(self.layout.embedding))
        try:
            for i in range(len(self.layout.blocks)):
                hidden = self.run_block(i, hidden, context)
            self.logits(self.final(hidden))
        except RuntimeError:
            return False
        return True


def _unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper."""
    return getattr(model, "_orig_mod", model)


def _probe_ids(embedding: Layer) -> torch.Tensor:
    device = next(iter((*embedding.module.parameters(), *embedding.module.buffers()))).device
    return torch.arange(_PROBE_TOKENS, device=device)[None] % embedding.shape[0]


def _version(x: torch.Tensor) -> int:
    """Counts the in-place changes of a tensor; inference tensors keep no count."""
    return 0 if x.is_inference() else x._version


def _group(seen: dict[str, list[torch.Tensor]]) -> dict[tuple[str, ...], torch.Tensor]:
    """Layers that read the same tensors in the same order become one entry; tokens become rows."""
    groups: dict[tuple, list[str]] = {}
    for name, inputs in seen.items():
        key = tuple((x.data_ptr(), x.shape, x.stride(), x.dtype) for x in inputs)
        groups.setdefault(key, []).append(name)
    rows = {}
    for names in groups.values():
        inputs = [x.reshape(-1, x.shape[-1]) for x in seen[names[0]]]
        rows[tuple(names)] = inputs[0] if len(inputs) == 1 else torch.cat(inputs)
    return rows


def _compare(expected: torch.Tensor, got: torch.Tensor) -> None:
    gap = (expected.float() - got.float()).abs().max().item()
    allowed = 8 * torch.finfo(expected.dtype).eps * max(1.0, expected.abs().max().item())
    if not gap <= allowed:
        raise ValueError(
            f"model: cannot run block by block, logits differ by {gap:.1e} from the model's own (allowed {allowed:.1e})"
        )
