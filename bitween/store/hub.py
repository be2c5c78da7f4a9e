"""Hugging Face's `save_pretrained` and `from_pretrained` for quantized models.

`attach` decides what `model.save_pretrained(directory)` writes: a compressed-tensors checkpoint, which loads without
bitween, wherever that format holds every layer; bitween's own format otherwise. `import bitween` is all that
`AutoModelForCausalLM.from_pretrained` needs for the latter; it is registered by transformers' public functions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitween import __version__, decode
from bitween.layers import QuantizedEmbedding, QuantizedLinear
from bitween.layers.kinds import empty_like
from bitween.layers.packed import Packed
from bitween.model.experts import stack_fields, stacks_of_plan, unfold
from bitween.model.ties import untie
from bitween.scheme import Scheme
from bitween.store import compressed_tensors, names, vocabulary
from bitween.store.checkpoint import SCHEMA_VERSION, CheckpointError, read_header

__all__ = ["METHOD", "Attached", "BitweenConfig", "BitweenQuantizer", "attach", "check_stored", "plan_of", "swap"]

METHOD = "bitween"
STACK_FIELDS = {"transposed_experts": list, "fused_experts": dict}  # absent from a file without such experts


class BitweenConfig(QuantizationConfigMixin):
    """`quantization_config` of a checkpoint in bitween's own format.

    Parameters
    ----------
    plan : {layer name: Scheme or its text, as "4b g64 sym"}
    schema_version : int, of the format; a newer one than this bitween knows is refused
    bitween_version : str, of the writer
    transposed_experts : names of parameters, now stacks of experts, whose matrices were (inputs, outputs)
    fused_experts : {name of a 2-D parameter, now a stack of experts, that held them one below the other: how many}
    """

    def __init__(
        self,
        plan: dict[str, Any] | None = None,
        schema_version: int = SCHEMA_VERSION,
        bitween_version: str = __version__,
        quant_method: str = METHOD,
        transposed_experts: Any = (),
        fused_experts: Any = None,
    ) -> None:
        if not isinstance(transposed_experts, (list, tuple)) or not all(isinstance(n, str) for n in transposed_experts):
            raise CheckpointError(f"transposed_experts: expected a list of names; got {transposed_experts!r}")
        fused = {} if fused_experts is None else fused_experts
        if not isinstance(fused, dict) or not all(type(count) is int and count > 0 for count in fused.values()):
            raise CheckpointError(f"fused_experts: expected names and positive numbers; got {fused_experts!r}")
        if type(schema_version) is not int or schema_version < 1:
            raise CheckpointError(f"schema_version: expected a positive integer; got {schema_version!r}")
        if schema_version > SCHEMA_VERSION:
            raise CheckpointError(
                f"schema_version: written by bitween {bitween_version} as format {schema_version}; "
                f"this is bitween {__version__}, which reads up to {SCHEMA_VERSION}: upgrade it"
            )
        if quant_method != METHOD:
            raise CheckpointError(f"quant_method: expected {METHOD!r}; got {quant_method!r}")
        self.quant_method = METHOD
        self.schema_version = schema_version
        self.bitween_version = str(bitween_version)
        self.plan = {name: str(scheme) for name, scheme in _parsed(plan).items()}
        if transposed_experts:  # absent otherwise, so that files without experts stay as every version reads them
            self.transposed_experts = list(transposed_experts)
        if fused:
            self.fused_experts = dict(fused)

    @property
    def schemes(self) -> dict[str, Scheme]:
        """The plan with Schemes."""
        return _parsed(self.plan)

    @property
    def stacks(self) -> dict[str, Any]:
        """How experts are held, for `swap`."""
        return {name: getattr(self, name, kind()) for name, kind in STACK_FIELDS.items()}


def _parsed(plan: Any) -> dict[str, Scheme]:
    if plan is None:
        return {}
    if not isinstance(plan, dict):
        raise CheckpointError(f"plan: expected layers and their schemes; got {type(plan).__name__}")
    result = {}
    for name, scheme in plan.items():
        if not isinstance(scheme, (Scheme, str)):
            raise CheckpointError(f'expected a scheme like "4b g64 sym"; got {scheme!r}', tensor=name)
        try:
            result[name] = scheme if isinstance(scheme, Scheme) else Scheme.parse(scheme)
        except ValueError as error:
            raise CheckpointError(str(error), tensor=name) from None
    return result


class BitweenQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves a model in bitween's own format."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        swap(model, config.schemes, **config.stacks)
        _keep_own_names(model)
        if kwargs.get("checkpoint_files"):
            self._check_files(model, kwargs["checkpoint_files"])
        return model

    def _check_files(self, model: nn.Module, paths: list[str]) -> None:
        """CheckpointError unless every packed tensor is in the files with its shape: nothing is filled at random."""
        entries = {name: entry for path in paths for name, entry in read_header(Path(path)).items()}
        for layer in self.quantization_config.plan:
            for part, buffer in model.get_submodule(layer)._buffers.items():
                name = f"{layer}.{part}"
                if buffer is None or part in model.get_submodule(layer)._non_persistent_buffers_set:
                    continue
                if name not in entries:
                    raise CheckpointError("missing", tensor=name)
                if entries[name].shape != tuple(buffer.shape):
                    reason = f"expected {tuple(buffer.shape)}; got {entries[name].shape}"
                    raise CheckpointError(reason, entries[name].file, name)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name in self.quantization_config.plan:
            check_stored(model.get_submodule(name), name)
        return decode.attach(model)

    def update_weight_conversions(self, weight_conversions: list, model: nn.Module) -> list:
        """None: bitween's own format keeps the names of the modules, which no family's mapping may touch."""
        return []

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict]:
        self._follow(model)
        _check_all(model)
        _keep_own_names(model)
        warnings.warn("written in bitween's own format: `import bitween` before loading it", stacklevel=3)
        return None, {}

    def _follow(self, model: nn.Module) -> None:
        """Layers may have been exchanged since the plan was written; what is saved is what there is."""
        vocabulary.adopt(model)
        untie(model)
        self.quantization_config.plan = {name: str(scheme) for name, scheme in plan_of(model).items()}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters are: gradients pass through packed layers


class _CompressedTensorsWriter(BitweenQuantizer):
    """Makes `save_pretrained` write compressed-tensors instead."""

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict, dict]:
        before = dict(self.quantization_config.plan)
        self._follow(model)
        if self.quantization_config.plan != before:
            model.config.quantization_config = compressed_tensors.config(model)
        _check_all(model)
        state = compressed_tensors.state_dict(model)
        if not names.survives(state, model):
            _keep_own_names(model)
        return state, {}


def plan_of(model: nn.Module) -> dict[str, Scheme]:
    """The plan of a quantized model, read from its layers; a head that shares an embedding's codes is not listed."""
    return {
        name: module.scheme
        for name, module in model.named_modules()
        if isinstance(module, Packed) and "codes" in module._buffers
    }


@dataclass(frozen=True)
class Attached:
    """What `save_pretrained` will write: `format`, and the `reasons` against compressed-tensors by layer."""

    format: str
    reasons: dict[str, str]


def attach(model: nn.Module, plan: dict[str, Scheme] | None = None, *, format: str = "auto") -> Attached:
    """Choose what `model.save_pretrained(directory)` writes.

    Parameters
    ----------
    model : a transformers model with QuantizedLinear and QuantizedEmbedding layers; only its config and its
        `hf_quantizer` change
    plan : checked against the layers when given
    format : "compressed-tensors" (loads without bitween), "native" (needs `import bitween`), or "auto": the first
        that holds every layer

    Returns
    -------
    Attached

    Raises
    ------
    ValueError
        An unknown format, a model without quantized layers, a plan that is not the model's, or layers that
        compressed-tensors cannot hold when it is asked for; all of them are named.
    """
    if format not in ("auto", "native", "compressed-tensors"):
        raise ValueError(f"format: expected 'auto', 'native' or 'compressed-tensors'; got {format!r}")
    vocabulary.adopt(model)
    found = plan_of(model)
    if not found:
        raise ValueError("model: expected quantized layers; it has none")
    if plan is not None and plan != found:
        wrong = sorted(n for n in plan.keys() | found.keys() if plan.get(n) != found.get(n))
        raise ValueError(f"plan: differs from the model's layers at {', '.join(wrong[:5])}")
    reasons = compressed_tensors.reasons(model)
    if format == "compressed-tensors" and reasons:
        raise ValueError("format: compressed-tensors cannot hold " + "; ".join(f"{n}: {r}" for n, r in reasons.items()))
    untie(model)
    if reasons or format == "native":
        config = BitweenConfig(found, **stack_fields(model))
        model.hf_quantizer = BitweenQuantizer(config)
        model.config.quantization_config = config
        return Attached("native", reasons)
    model.hf_quantizer = _CompressedTensorsWriter(BitweenConfig(found))
    model.config.quantization_config = compressed_tensors.config(model)
    return Attached("compressed-tensors", {})


def swap(
    model: nn.Module,
    plan: dict[str, Scheme],
    transposed_experts: Iterable[str] = (),
    fused_experts: Mapping[str, int] | None = None,
) -> None:
    """Replace the layers that the plan names by empty quantized ones, on the device of their weights (often meta).

    A parameter of which the plan names experts becomes a stack of layers first; `transposed_experts` names those whose
    matrices are (inputs, outputs), `fused_experts` those that hold them one below the other, and how many.

    Raises
    ------
    CheckpointError
        when a name is not that of a linear layer or an embedding.
    """
    try:
        stacks = stacks_of_plan(model, plan, transposed_experts, fused_experts or {})
    except ValueError as error:
        raise CheckpointError(f"fused_experts: {error}") from None
    unfold(model, stacks)
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    for name, scheme in plan.items():
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise CheckpointError("the plan names it, the model has no such layer", tensor=name) from None
        new = empty_like(old, scheme)
        if new is None:
            kind = type(old).__name__
            raise CheckpointError(f"expected a linear layer or an embedding to quantize; got {kind}", tensor=name)
        for path in paths.get(old, ()):
            model.set_submodule(path, new.train(old.training))  # one module may stand under several names
        for target, source in list((getattr(model, "all_tied_weights_keys", None) or {}).items()):
            if source == f"{name}.weight":
                tied = target.removesuffix(".weight")
                use = model.get_submodule(tied)
                if isinstance(use, nn.Embedding):  # the table of a decoder beside the encoder's
                    model.set_submodule(tied, QuantizedEmbedding.tied_to(new))
                elif use is not new:
                    model.set_submodule(tied, QuantizedLinear.tied_to(new, getattr(use, "bias", None)))
    untie(model)


def _keep_own_names(model: nn.Module) -> None:
    """Save under the names of the modules: transformers' mapping to a family's first names knows no packed tensors.

    The library writes through the mapping that a model was loaded with; a model loaded with none is written as it is.
    """
    model._weight_conversions = []


def _check_all(model: nn.Module) -> None:
    """What could not be loaded again is not written."""
    for name in plan_of(model):
        check_stored(model.get_submodule(name), name)


def check_stored(module: Packed, name: str) -> None:
    """CheckpointError unless scales are finite and above 0, and codes and zeros are those of the scheme."""
    scales = module.scales
    if scales.is_meta:
        return
    if scales.numel() and not bool(((scales > 0) & torch.isfinite(scales)).all()):
        raise CheckpointError("expected scales that are finite and above 0", tensor=f"{name}.scales")
    if module.scheme.coding == "trellis":
        rates = module.zeros.to(torch.int64)
        if rates.numel() and not bool(
            ((rates >= 1) & (rates <= 5)).all() and 32 * rates.sum() == module.codes.shape[1]
        ):
            raise CheckpointError("expected rates of 1 to 5 bits that fill the codes", tensor=f"{name}.zeros")
        return
    if module.scheme.levels == 3 and module.codes.numel():
        if int(module.codes.max()) > 242:
            raise CheckpointError("expected five ternary digits a byte, at most 242", tensor=f"{name}.codes")
        if module.zeros is not None and bool((module.zeros & (module.zeros >> 1) & 0x55).any()):
            raise CheckpointError("expected ternary zeros of at most 2", tensor=f"{name}.zeros")


def _register() -> None:
    """Add bitween to transformers' table of quantizers, once; a reloaded module leaves it as it is."""
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(BitweenConfig)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(BitweenQuantizer)


_register()
