"""Bitween: the uniform quantizer. One scheme for every linear layer; `bitween.gradual` is the one that plans."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from bitween._progress import no_progress
from bitween.model import blocks
from bitween.model.experts import unfolded
from bitween.model.memory import MemoryAnalysis, analyze_memory
from bitween.rounding.methods import METHODS, Needs
from bitween.scheme import Scheme

__all__ = ["Bitween"]


class Bitween:
    """Quantizes every linear layer of a Hugging Face causal language model with one scheme.

    Parameters
    ----------
    model : stays as it is; `quantize` returns a new model that shares what is not quantized
    tokenizer : needed for calibrated methods without token windows
    bits : 1, 1.58, 2, 3, 4, 5, 6 or 8
    group_size : 16, 32, 64, 128 or -1 (whole rows)
    symmetric : without zero points
    embeddings : also quantize the word embedding and the head
    sequence_length : tokens of a calibration window
    calibration_samples : windows, at most
    seed : of everything random
    """

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
        self.scheme = Scheme(bits, group_size, symmetric)
        self.model, self.tokenizer = model, tokenizer
        self.embeddings = embeddings
        self.sequence_length, self.calibration_samples, self.seed = sequence_length, calibration_samples, seed
        self.progress = progress
        self._unfolded = unfolded(model)
        self.layout = blocks.inspect(self._unfolded)
        blocks.check_finite(model)
        self._memory: MemoryAnalysis | None = None

    def quantize(
        self,
        rtn: bool = False,
        trainable: bool = False,
        *,
        method: str | None = None,
        calibration_data: Any = None,
        ignore_layers: Iterable[str] = (),
    ) -> Any:
        """Quantize and return a new model of packed layers.

        Parameters
        ----------
        rtn : round to nearest; needs no text. The default when nothing else is chosen
        trainable : rounding and ranges trained on the output of each block by the sign of their gradient ("signround"),
            from GPTQ's result on. From 5 bits on, where training brings nothing, GPTQ stands alone, at 8 bits rounding
        method : a method of `bitween.quantize` by name instead: "rtn", "clip", "gptq", ...
        calibration_data : path, list of strings, (windows, length) token ids, dataset name; default bitween's own text
        ignore_layers : names or patterns (fnmatch) of layers to leave alone

        Raises
        ------
        ValueError, TypeError
            More than one way chosen, an unknown method, a missing tokenizer; the model stays untouched.
        """
        method = _choose(rtn, trainable, method)
        patterns = tuple([ignore_layers] if isinstance(ignore_layers, str) else ignore_layers)
        plan = {layer.name: self.scheme for layer in self._wanted(patterns)}
        from bitween.realise.candidate import Candidate

        dtype = self.layout.embedding.module.weight.dtype
        if METHODS[method].needs < Needs.HESSIAN:
            candidate = Candidate(self._unfolded, self.layout)
            self._direct(candidate, plan, method)
        else:
            candidate = self._calibrated(plan, method, calibration_data)
        model = candidate.install(dtype)
        self._memory = analyze_memory(model, self.model)
        return model

    def get_memory_analysis(self) -> MemoryAnalysis:
        """Bytes before and after the last `quantize`."""
        return self._memory or analyze_memory(self.model)

    def _wanted(self, patterns: tuple[str, ...]) -> list[blocks.Layer]:
        ends = {self.layout.embedding.name, self.layout.head.name}
        found = []
        for layer in self.layout.layers:
            free = layer.plain and layer.kind != "router" and not layer.matches(patterns)
            if free and (self.embeddings or layer.name not in ends):
                found.append(layer)
        return found

    def _direct(self, candidate: Any, plan: dict[str, Scheme], method: str) -> None:
        from bitween.functional import quantize

        for done, layer in enumerate(self.layout.layers):
            if layer.name in plan:
                candidate.put(layer, quantize(layer.weight, plan[layer.name], method=method))
            if self.progress:
                self.progress(f"{method} {self.scheme}", done + 1, len(self.layout.layers), layer.name)

    def _calibrated(self, plan: dict[str, Scheme], method: str, calibration_data: Any) -> Any:
        from bitween.realise.context import RunContext
        from bitween.realise.realiser import Realiser

        if self.tokenizer is None and not isinstance(calibration_data, torch.Tensor):
            raise TypeError(f"tokenizer: expected a tokenizer, since {method} needs text; got None")
        context = RunContext.build(
            self._unfolded,
            self.tokenizer,
            calibration_data=calibration_data,
            calibration_samples=self.calibration_samples,
            evaluation_samples=1,
            selection_samples=1,
            length=self.sequence_length,
            seed=self.seed,
        )
        realiser = Realiser(context, method=method, progress=self.progress or no_progress)
        realiser.realise(plan, stage=f"{method} {self.scheme}")
        return realiser.candidate


def _choose(rtn: bool, trainable: bool, method: str | None) -> str:
    if rtn + trainable + (method is not None) > 1:
        raise ValueError("quantize: expected one of rtn=True, trainable=True, method=...; got several")
    chosen = "signround" if trainable else method or "rtn"
    if chosen not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {chosen!r}")
    return chosen
