"""Bitween: the uniform quantizer. One scheme for every linear layer; `bitween.gradual` is the one that plans."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from bitween._progress import no_progress
from bitween._recording import outside_inference_mode
from bitween.model import blocks
from bitween.model.attachments import check_attachments, check_own_weights
from bitween.model.memory import MemoryAnalysis, analyze_memory
from bitween.model.patterns import checked_patterns
from bitween.model.whole import describe
from bitween.rounding.methods import METHODS, Needs
from bitween.scheme import BITS, TRELLIS_BITS, TRELLIS_WIDTHS, WIDTH, Scheme, can_turn
from bitween.store.writing import writable
from bitween.text.examples import is_inputs

__all__ = ["Bitween"]


class Bitween:
    """Quantizes every linear layer of a model with one scheme: a causal language model's block by block, those of any
    other Hugging Face model or torch module, convolutions too, on full passes.

    Parameters
    ----------
    model : stays as it is; `quantize` returns a new model that shares what is not quantized
    tokenizer : needed for calibrated methods without token windows
    bits : 1, 1.58, 2, 3, 4, 5, 6 or 8; with method="trellis" 1 to 5 in half steps
    group_size : 16, 32, 64, 128 or -1 (whole rows)
    symmetric : without zero points
    embeddings : also quantize the word embedding and the head
    sequence_length : tokens of a calibration window
    calibration_samples : windows, at most
    seed : of everything random
    """

    @outside_inference_mode
    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        bits: float = 8,
        group_size: int = 32,
        symmetric: bool = False,
        *,
        embeddings: bool = False,
        sequence_length: int = 512,
        calibration_samples: int = 48,
        seed: int = 0,
        progress: Any = None,
    ):
        halves = bits in TRELLIS_BITS and bits not in BITS  # widths that only a trellis has
        self.scheme = Scheme.trellis(bits) if halves else Scheme(bits, group_size, symmetric)
        self.model, self.tokenizer = model, tokenizer
        self.embeddings = embeddings
        self.sequence_length, self.calibration_samples, self.seed = sequence_length, calibration_samples, seed
        self.progress = progress
        check_own_weights(model)
        self.layout, self.runs_whole = _layout(model)
        blocks.check_finite(model)
        self._memory: MemoryAnalysis | None = None

    @outside_inference_mode
    def quantize(
        self,
        rtn: bool = False,
        trainable: bool = False,
        *,
        method: str | None = None,
        calibration_data: Any = None,
        ignore_layers: Iterable[str] = (),
        effort: str = "normal",
        turned: bool = False,
        transforms: str | None = None,
    ) -> Any:
        """Quantize and return a new model of packed layers.

        Parameters
        ----------
        rtn : round to nearest; needs no text. The default when nothing else is chosen
        trainable : rounding and ranges trained on the output of each block by the sign of their gradient ("signround"),
            from GPTQ's result on. From 5 bits on, where training brings nothing, GPTQ stands alone, at 8 bits rounding
        method : a method of `bitween.quantize` by name instead: "rtn", "clip", "gptq", ...
        calibration_data : path, list of strings, (windows, length) token ids, dataset name; default bitween's own text.
            For models of images, sounds or anything else examples of their inputs: a DataLoader, a data set, dicts or
            tensors (`bitween.text.examples`)
        ignore_layers : names or patterns (fnmatch) of layers to leave alone
        effort : "normal", or with method="trellis" "high": states of 16 bits in place of 12, which take about twenty
            times as long to search and leave about a tenth less squared error in as many bytes
        turned : with method="trellis" and effort="high", layers whose rows and columns are multiples of 128 are stored
            between Hadamard transforms, which even out weights far from the others, and as EXL3 stores them
        transforms : "auto" first rotates and scales a causal language model's weights into a basis that is easier to
            quantize, where its architecture allows one (`bitween.transforms`; a tied head may get a weight of its own,
            and all that stays in full precision is in that basis), and is refused for models that run as a whole and
            with examples of inputs, which leave it alone, as "none" does. By default "auto" for method="trellis", whose
            one scale a row can't follow outliers, unless `turned` does that; "none" otherwise. The other methods with
            error feedback gain from it too, rounding and clipping do not

        Raises
        ------
        ValueError, TypeError
            More than one way chosen, an unknown method, a missing tokenizer, hooks or a `forward` of their own on
            layers to be replaced; the model stays untouched.
        RuntimeError
            The packed layers compute something else than the plain numbers did.
        """
        method = _choose(rtn, trainable, method if method or rtn or trainable else self._own_method())
        width = _width(method, effort)
        if turned and effort != "high":
            raise ValueError(f'turned: expected False, or True with effort="high"; got True with {effort!r}')
        scheme = Scheme.trellis(self.scheme.bits, width) if method == "trellis" else self.scheme
        if method != "trellis" and scheme.coding == "trellis":
            raise ValueError(f"method: expected 'trellis' for {self.scheme.bits:g} bits; got {method!r}")
        if transforms not in (None, "auto", "none"):
            raise ValueError(f'transforms: expected "auto" or "none"; got {transforms!r}')
        patterns = checked_patterns("ignore_layers", ignore_layers, self.layout)
        if self.runs_whole or is_inputs(calibration_data):
            if transforms == "auto":
                way = "a model that runs as a whole" if self.runs_whole else "examples of its inputs"
                raise ValueError(f'transforms: expected "none" with {way}, which keeps its basis; got "auto"')
            return self._whole(patterns, scheme, method, calibration_data, turned)
        from bitween.realise.candidate import Candidate

        base = _copy(self.model)  # in its memory: the user's own modules may run elsewhere meanwhile
        dtype = self.layout.embedding.module.weight.dtype
        if transforms == "auto" or (transforms is None and method == "trellis" and not turned):
            self._transform(base)
        self.layout = blocks.inspect(base)
        wanted = self._wanted(patterns)
        check_attachments(self.model, wanted)
        plan, ids = {layer.name: _turned_where(layer, scheme, turned) for layer in wanted}, None
        if METHODS[method].needs < Needs.HESSIAN:
            candidate = Candidate(base, self.layout)
            self._direct(candidate, plan, method)
        else:
            candidate, ids = self._calibrated(base, plan, method, calibration_data)
        model = writable(candidate.install(dtype, ids))
        self._memory = analyze_memory(model, self.model)
        return model

    def get_memory_analysis(self) -> MemoryAnalysis:
        """Bytes before and after the last `quantize`."""
        return self._memory or analyze_memory(self.model)

    def _whole(
        self, patterns: tuple[str, ...], scheme: Scheme, method: str, calibration_data: Any, turned: bool
    ) -> Any:
        from bitween.realise.whole_context import float32_copy
        from bitween.realise.whole_uniform import quantize_whole

        layout = describe(float32_copy(self.model))
        wanted = [x for x in layout.layers if x.plain and not x.matches(patterns)]
        wanted = [x for x in wanted if self.embeddings or x.kind != "embedding"]
        check_attachments(self.model, wanted)
        plan = {layer.name: _turned_where(layer, scheme, turned) for layer in wanted}
        model = quantize_whole(
            self.model,
            plan,
            method,
            tokenizer=self.tokenizer,
            calibration_data=calibration_data,
            calibration_samples=self.calibration_samples,
            length=self.sequence_length,
            seed=self.seed,
            stage=_stage(method, plan),
            progress=self.progress or no_progress,
        )
        self._memory = analyze_memory(model, self.model)
        return writable(model)

    def _own_method(self) -> str | None:
        return "trellis" if self.scheme.coding == "trellis" else None

    def _transform(self, base: Any) -> None:
        """Turn a copy into a basis that is easier to quantize."""
        from bitween.transforms import apply, plan_transforms

        layout = blocks.inspect(base)
        table_bits = self.scheme.bits if self.embeddings else 8 * self.layout.embedding.module.weight.element_size()
        apply(base, layout, plan_transforms(base, layout, table_bits=table_bits), seed=self.seed)

    def _wanted(self, patterns: tuple[str, ...]) -> list[blocks.Layer]:
        ends = {self.layout.embedding.name, self.layout.head.name}
        found = []
        for layer in self.layout.layers:
            free = layer.plain and layer.kind != "router" and not layer.matches(patterns)
            if free and (self.embeddings or (layer.name not in ends and layer.kind != "table")):
                found.append(layer)
        return found

    def _direct(self, candidate: Any, plan: dict[str, Scheme], method: str) -> None:
        from bitween.functional import quantize

        for done, layer in enumerate(self.layout.layers):
            if layer.name in plan:
                candidate.put(layer, quantize(layer.weight, plan[layer.name], method=method))
            if self.progress:
                self.progress(_stage(method, plan), done + 1, len(self.layout.layers), layer.name)

    def _calibrated(self, base: Any, plan: dict[str, Scheme], method: str, calibration_data: Any) -> tuple[Any, Any]:
        from bitween.realise.context import RunContext
        from bitween.realise.realiser import Realiser
        from bitween.text.mix import checked

        calibration_data = checked(calibration_data, None, self.tokenizer)
        context = RunContext.build(
            base,
            self.tokenizer,
            calibration_data=calibration_data,
            calibration_samples=self.calibration_samples,
            evaluation_samples=1,
            selection_samples=1,
            length=self.sequence_length,
            seed=self.seed,
            bounded=False,
        )
        realiser = Realiser(context, method=method, progress=self.progress or no_progress)
        realiser.realise(plan, stage=_stage(method, plan))
        return realiser.candidate, context.text.selection.ids[:1]


def _stage(method: str, plan: dict[str, Scheme]) -> str:
    return " ".join([method, *sorted({str(scheme) for scheme in plan.values()})])


def _layout(model: Any) -> tuple[Any, str]:
    """How the model is laid out, and why it can only run as a whole, if so."""
    from bitween.model.causal import find_layout

    copy = _copy(model)
    layout, reason = find_layout(copy)
    return (describe(copy), reason) if layout is None else (layout, "")


def _copy(model: Any) -> Any:
    from bitween.model.experts import shared_copy, unfolded

    copy = shared_copy(getattr(model, "_orig_mod", model))
    with suppress(Exception):  # stacks of experts are found by running token ids, which not every model takes
        copy = unfolded(copy)
    return copy


def _turned_where(layer: blocks.Layer, scheme: Scheme, turned: bool) -> Scheme:
    """The scheme, turned where the layer has whole blocks."""
    return Scheme.trellis(scheme.bits, scheme.width, turned=True) if turned and can_turn(layer.shape) else scheme


def _width(method: str, effort: str) -> int:
    """Bits of a trellis state."""
    if effort not in ("normal", "high"):
        raise ValueError(f"effort: expected 'normal' or 'high'; got {effort!r}")
    if effort == "high" and method != "trellis":
        raise ValueError(f"effort: expected 'normal' for method {method!r}, whose effort is its own; got 'high'")
    return TRELLIS_WIDTHS[-1] if effort == "high" else WIDTH


def _choose(rtn: bool, trainable: bool, method: str | None) -> str:
    if rtn + trainable + (method is not None) > 1:
        raise ValueError("quantize: expected one of rtn=True, trainable=True, method=...; got several")
    chosen = "signround" if trainable else method or "rtn"
    if chosen not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {chosen!r}")
    return chosen
