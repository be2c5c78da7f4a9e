"""Checkpoints of other quantizers as packed layers: GPTQ, AWQ and AutoRound.

All three store words of 32 bits. GPTQ and AutoRound pack a layer's codes along its columns, least significant bit
first: the transpose of bitween's own stream of bits, so that no code changes. GPTQ's first version stores zero points
less one. AWQ packs eight rows of 4 bits a word, in the order 0 2 4 6 1 3 5 7.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from bitween import _core
from bitween.scheme import COMMON_BITS, GROUP_SIZES, Scheme
from bitween.store.checkpoint import CheckpointError, TensorFiles

__all__ = ["METHODS", "plan_and_tensors"]

METHODS = ("gptq", "awq", "auto-round")
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_AWQ_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # of the rows whose codes a word holds, from the lowest bits on


def plan_and_tensors(
    files: TensorFiles, settings: dict[str, Any], model: nn.Module
) -> tuple[dict[str, Scheme], dict[str, torch.Tensor]]:
    """The plan of a checkpoint, and all its tensors under the names of bitween's layers.

    Parameters
    ----------
    files : of the checkpoint
    settings : its `quantization_config`
    model : the plain model, on the meta device

    Raises
    ------
    CheckpointError
        for another packing, columns in activation order (`g_idx`), and whatever does not fit model and settings.
    """
    packing, zero_offset = _packing(settings)
    plan, state, taken = {}, {}, set()
    for name, layer in model.named_modules():
        if f"{name}.qweight" not in files.entries:
            continue
        if not isinstance(layer, nn.Linear):
            raise files.error(f"expected a linear layer; got {type(layer).__name__}", f"{name}.qweight")
        part = _Layer(files, name, layer.out_features, layer.in_features, _settings_of(name, settings))
        plan[name], tensors = part.stored(packing, zero_offset)
        state |= {f"{name}.{key}": value for key, value in tensors.items()}
        taken |= {f"{name}.{key}" for key in _PARTS}
        if layer.bias is None and f"{name}.bias" in files.entries:  # some writers give every layer one, of zeros
            if files.read(f"{name}.bias").any():
                raise files.error("expected zeros, as the model has no bias here", f"{name}.bias")
            taken.add(f"{name}.bias")
    taken |= {name for name in files.entries if name.endswith(".rotary_emb.inv_freq")}  # computed since long ago
    return plan, {**state, **{name: files.read(name) for name in files.names if name not in taken}}


def _packing(settings: dict[str, Any]) -> tuple[str, int]:
    """("gptq" or "awq", what is added to stored zero points)."""
    method = settings["quant_method"]
    if method == "awq":
        version = str(settings.get("version", "gemm")).lower()
        if version != "gemm":
            raise CheckpointError(f"version: expected 'gemm'; got {version[:40]!r}", "config.json")
        return "awq", 0
    if method == "gptq":
        kind = settings.get("checkpoint_format", "gptq")
        known = {"gptq": ("gptq", 1), "gptq_v2": ("gptq", 0)}
        field = "checkpoint_format"
    else:
        kind = settings.get("packing_format", "auto_round:gptqmodel")
        known = {
            "auto_round:gptqmodel": ("gptq", 0),
            "auto_round:auto_gptq": ("gptq", 1),
            "auto_round:auto_awq": ("awq", 0),
        }
        field = "packing_format"
    if not isinstance(kind, str) or kind not in known:
        raise CheckpointError(f"{field}: expected one of {', '.join(known)}; got {str(kind)[:40]!r}", "config.json")
    return known[kind]


def _settings_of(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of one layer: AutoRound keeps exceptions under its name."""
    extra = settings.get("extra_config")
    own = extra.get(name) if isinstance(extra, dict) else None
    return {**settings, **(own if isinstance(own, dict) else {})}


class _Layer:
    """The tensors of one layer."""

    def __init__(self, files: TensorFiles, name: str, rows: int, cols: int, settings: dict[str, Any]) -> None:
        self.files, self.name, self.rows, self.cols = files, name, rows, cols
        self.bits, self.group = settings.get("bits"), settings.get("group_size")
        if type(self.bits) is not int or self.bits not in COMMON_BITS:
            raise CheckpointError(
                f"bits: expected one of {', '.join(map(str, COMMON_BITS))}; got {str(self.bits)[:40]}",
                "config.json",
                name,
            )
        if type(self.group) is not int or self.group not in GROUP_SIZES:
            raise CheckpointError(
                f"group_size: expected one of {', '.join(map(str, GROUP_SIZES))}; got {str(self.group)[:40]}",
                "config.json",
                name,
            )
        self.columns_a_group = cols if self.group == -1 else self.group
        self.n_groups = -(-cols // self.columns_a_group)

    def stored(self, packing: str, zero_offset: int) -> tuple[Scheme, dict[str, torch.Tensor]]:
        """Scheme, and `codes`, `scales` and `zeros` as bitween keeps them."""
        levels = Scheme(self.bits, self.group).levels
        self._check_order()
        if packing == "awq":
            if self.bits != 4:
                raise self.files.error(f"expected 4 bits; got {self.bits}", f"{self.name}.qweight")
            codes = _core.pack(np.ascontiguousarray(self._awq("qweight", self.cols).T), levels)
            zeros = self._awq("qzeros", self.n_groups)
        else:
            words = self._words("qweight", self.cols * self.bits, self.rows, first=True)
            codes = np.ascontiguousarray(words.T).view(np.uint8)
            words = self._words("qzeros", self.rows * self.bits, self.n_groups, first=False)
            zeros = _core.unpack(np.ascontiguousarray(words).view(np.uint8), self.rows, levels)
            zeros = (zeros + np.uint8(zero_offset)) & np.uint8(levels - 1)  # as its readers do
        symmetric = bool((zeros == levels // 2).all())
        scheme = Scheme(self.bits, self.group, symmetric)
        tensors = {"codes": torch.from_numpy(codes), "scales": self._scales()}
        if not symmetric:
            packed = _core.pack(np.ascontiguousarray(zeros.T), levels)
            kept = scheme.layout(self.rows, self.cols)["row_zero_bytes"]
            tensors["zeros"] = torch.from_numpy(np.ascontiguousarray(packed[:, :kept]))
        return scheme, tensors

    def _read(self, part: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> torch.Tensor:
        name = f"{self.name}.{part}"
        if name not in self.files.entries:
            raise self.files.error("missing", name)
        if self.files.entries[name].shape != shape:
            raise self.files.error(f"expected {shape}; got {self.files.entries[name].shape}", name)
        tensor = self.files.read(name)
        if tensor.dtype not in dtypes:
            raise self.files.error(f"expected {' or '.join(map(str, dtypes))}; got {tensor.dtype}", name)
        return tensor

    def _words(self, part: str, bits: int, other: int, first: bool) -> np.ndarray:
        """Words of 32 bits: `bits` packed along the first or the last dimension, `other` along the other."""
        if bits % 32:
            raise self.files.error(f"expected whole words of 32 bits; got {bits} bits", f"{self.name}.{part}")
        shape = (bits // 32, other) if first else (other, bits // 32)
        return self._read(part, (torch.int32,), shape).numpy()

    def _awq(self, part: str, n: int) -> np.ndarray:
        """Codes uint8 (n, rows)."""
        words = self._words(part, self.rows * 4, n, first=False).view(np.uint32)
        found = np.empty((n, self.rows // 8, 8), np.uint8)
        for i, row in enumerate(_AWQ_ORDER):
            found[:, :, row] = (words >> np.uint32(4 * i)) & np.uint32(15)
        return found.reshape(n, self.rows)

    def _scales(self) -> torch.Tensor:
        kinds = (torch.float16, torch.bfloat16, torch.float32)
        scales = self._read("scales", kinds, (self.n_groups, self.rows))
        half = scales.to(torch.float16)
        if not torch.equal(half.to(scales.dtype), scales):
            raise self.files.error("expected scales that float16 holds", f"{self.name}.scales")
        return half.T.contiguous()

    def _check_order(self) -> None:
        if f"{self.name}.g_idx" not in self.files.entries:
            return
        order = self._read("g_idx", (torch.int32, torch.int64), (self.cols,))
        if not torch.equal(order.long(), torch.arange(self.cols) // self.columns_a_group):
            raise self.files.error(
                "columns are grouped in activation order (desc_act), which packed layers do not hold",
                f"{self.name}.g_idx",
            )
