"""GGUF, the file of llama.cpp and the tools around it: one file with weights, settings and tokenizer.

Packed layers are written as GGUF's own block types (`gguf_blocks`), everything else as the model has it. Settings and
tokenizer are complete for Llama-like models; for others, or to keep what llama.cpp's own converter wrote, a template
GGUF of the same model gives them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import nn

from bitween.export import gguf_blocks, gguf_experts
from bitween.export.gguf_tokenizer import add_tokenizer
from bitween.layers import packed_layers
from bitween.model.experts import experts_of
from bitween.quantized_tensor import QuantizedTensor
from bitween.store.files import atomic_path

__all__ = ["Written", "export_gguf", "reasons"]

Type = gguf.GGMLQuantizationType
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
}
_PAIRED = (gguf.MODEL_ARCH.LLAMA,)  # llama.cpp turns neighbouring pairs there, transformers the two halves of a head
_PLAIN = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}
_WHOLE_FILE = "general.file_type"


@dataclass(frozen=True)
class Written:
    """What was written: `path`, `nbytes` of the file, tensors by block type, and layers whose numbers changed."""

    path: Path
    nbytes: int
    types: dict[str, int]
    rounded: tuple[str, ...]


def reasons(model: nn.Module, exact: bool = False) -> dict[str, str]:
    """{layer: why no block type of GGUF holds it} of a quantized model; empty when all fits."""
    found = {}
    for name, module in packed_layers(model):
        kind = gguf_blocks.block_type(module.quantized.scheme, module.quantized.shape, exact)
        if isinstance(kind, str):
            found[name] = kind
    return found or gguf_experts.reasons(model, exact)


def export_gguf(
    model: nn.Module,
    tokenizer: Any,
    path: str | os.PathLike,
    *,
    exact: bool = False,
    template: str | os.PathLike | None = None,
) -> Written:
    """Write a quantized model as one GGUF file.

    Parameters
    ----------
    model : Llama-like transformers model with packed layers: llama, mistral, qwen2, qwen3, and with experts mixtral,
        qwen2_moe, qwen3_moe
    tokenizer : its tokenizer; not needed with a template
    path : file to write; what stands there is replaced, whole or not at all
    exact : only block types that hold the same numbers. Otherwise 2, 3 and 6 bits, and asymmetric 4 and 5 bits, take
        the smaller K types where rows are multiples of 256, and are rounded again on those types' grid
    template : GGUF of the same model in any precision, whose settings and tokenizer are copied

    Raises
    ------
    ValueError
        for an architecture or tokenizer that needs a template, or naming the layers that no block type holds.
    """
    refused = reasons(model, exact)
    if refused:
        shown = "; ".join(f"{name}: {why}" for name, why in list(refused.items())[:3])
        raise ValueError(
            f"model: {len(refused)} layers do not fit GGUF ({shown}). Groups of 32, 64 or 128 do: plan with "
            'export_target="gguf"'
        )
    kind = getattr(model.config, "model_type", "")
    if kind not in _ARCHITECTURES:
        raise ValueError(f"model: expected one of {', '.join(_ARCHITECTURES)}; got {kind!r}")
    architecture = _ARCHITECTURES[kind]
    gguf_experts.check(model)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[architecture], use_temp_file=False)
    if template is not None:
        _copy_settings(writer, template)
    else:
        if tokenizer is None:
            raise ValueError("tokenizer: expected one, since a GGUF file carries it; got None")
        _add_settings(writer, model)
        add_tokenizer(writer, tokenizer, model.config.vocab_size)
    types: Counter[str] = Counter()
    rounded = []
    for name, array, stored, changed in _tensors(model, architecture, exact):
        writer.add_tensor(name, array, raw_dtype=stored)
        types[stored.name] += 1
        if changed:
            rounded.append(name)
    packed = Counter({t: n for t, n in types.items() if t not in ("F32", "F16", "BF16")})
    if packed:
        writer.add_file_type(_file_type(packed.most_common(1)[0][0]))
    path = Path(path)
    with atomic_path(path) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return Written(path, path.stat().st_size, dict(types), tuple(rounded))


# ---- tensors --------------------------------------------------------------------------------------


def _tensors(model: nn.Module, architecture: Any, exact: bool) -> Iterator[tuple[str, np.ndarray, Type, bool]]:
    """(GGUF name, rows of blocks, block type, whether numbers changed) of every tensor, shared ones once."""
    config = model.config
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tied = bool(getattr(config, "tie_word_embeddings", False))

    def renamed(name: str) -> str:
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"model: {name} has no name in GGUF")
        return found

    experts = experts_of(model)
    for module_name, module in packed_layers(model):
        if (tied and module_name == "lm_head") or module_name in experts:
            continue
        if gguf_experts.is_vector(module_name):
            yield renamed(f"{module_name}.weight"), module.quantized.dequantize()[0], Type.F32, False
            continue
        stored = _reordered(module.quantized, _order(module_name, architecture, config))
        kind = gguf_blocks.block_type(stored.scheme, stored.shape, exact)
        changed = gguf_blocks.is_rounded(stored.scheme, kind)
        yield renamed(f"{module_name}.weight"), gguf_blocks.encode(stored, kind), kind, changed
    for name, blocks, kind, changed in gguf_experts.stacks(model, exact):
        yield renamed(f"{name}.weight"), blocks, kind, changed
    for whole, parameter in model.named_parameters():
        if tied and whole.startswith("lm_head"):
            continue
        order = _order(whole.rpartition(".")[0], architecture, config)
        parameter = parameter.detach() if order is None else parameter.detach()[torch.from_numpy(order)]
        for name, tensor in gguf_experts.parameters(whole, parameter):
            kind = _plain_type(name, tensor)
            yield renamed(name), _plain(tensor, kind), kind, False
    scaled = _rope_factors(model)
    if scaled is not None:
        yield "rope_freqs.weight", scaled, Type.F32, False


def _plain_type(name: str, tensor: torch.Tensor) -> Type:
    """What llama.cpp multiplies such a tensor as: vectors and routers in float32, others as they are."""
    if tensor.ndim == 1 or name.endswith("mlp.gate.weight"):
        return Type.F32
    return _PLAIN.get(tensor.dtype, Type.F32)


def _plain(tensor: torch.Tensor, kind: Type) -> np.ndarray:
    if kind is Type.BF16:
        return tensor.contiguous().view(torch.uint8).numpy()
    return tensor.to(torch.float16 if kind is Type.F16 else torch.float32).contiguous().numpy()


def _order(module: str, architecture: Any, config: Any) -> np.ndarray | None:
    """The order of a query's or key's rows in GGUF, where rotary embedding pairs neighbours."""
    if architecture not in _PAIRED or not module.endswith(("q_proj", "k_proj")):
        return None
    heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return np.arange(heads * size).reshape(heads, 2, size // 2).swapaxes(1, 2).reshape(-1)


def _reordered(stored: QuantizedTensor, order: np.ndarray | None) -> QuantizedTensor:
    parts = [None if p is None else np.asarray(p) for p in (stored.codes, stored.scales, stored.zeros)]
    if order is not None:
        parts = [None if p is None else p[order] for p in parts]
    return QuantizedTensor(*parts, stored.scheme, stored.shape)


def _rope_factors(model: nn.Module) -> np.ndarray | None:
    """What Llama 3's long context divides each rotary frequency by; None for the plain embedding."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"model: rotary embedding of type {kind!r}; pass template= with a GGUF of the same model")
    used = next(m.inv_freq for n, m in model.named_modules() if n.endswith("rotary_emb")).float()
    size = 2 * len(used)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    return (plain / used).numpy()


# ---- settings -------------------------------------------------------------------------------------


def _add_settings(writer: gguf.GGUFWriter, model: nn.Module) -> None:
    c = model.config
    size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    rope = getattr(c, "rope_parameters", None) or {}
    writer.add_name(str(getattr(c, "_name_or_path", "") or c.model_type).rstrip("/").rpartition("/")[2] or c.model_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10_000.0)))
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    gguf_experts.add_settings(writer, c)


def _copy_settings(writer: gguf.GGUFWriter, template: str | os.PathLike) -> None:
    """Every setting of a template but those that the writer makes itself."""
    for key, field in gguf.GGUFReader(template).fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", _WHOLE_FILE):
            if key == "general.architecture" and field.contents() != writer.arch:
                raise ValueError(f"template: expected architecture {writer.arch!r}; got {field.contents()!r}")
            continue
        sub = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub)


def _file_type(most: str) -> int:
    """llama.cpp's name for the file by its most frequent block type; only shown to people."""
    kinds = {"Q2_K": "Q2_K", "Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
    return int(gguf.LlamaFileType[f"MOSTLY_{kinds.get(most, most)}"])
