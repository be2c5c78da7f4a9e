"""What a model's output says, for any model: distributions where it has logits, numbers elsewhere.

A distribution's distance from another is KL in nats; numbers are compared by their squared error, relative to how much
the untouched model's own numbers vary. Only positions that count are compared: not padding, and where labels say which
positions are asked for, those alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["KINDS", "Answer", "answer_of", "find_kind", "tensors_of"]

KINDS = ("kl", "error")

# Parts of a Hugging Face output that are no answer: by-products, or states that the answer was made from.
_BESIDE = (
    "loss", "cache", "past_key_values", "hidden_states", "attentions", "cross_attentions", "decoder_hidden_states",
    "decoder_attentions", "encoder_last_hidden_state", "encoder_hidden_states", "encoder_attentions", "router_logits",
    "reshaped_hidden_states", "extract_features", "image_hidden_states", "aux_loss", "rope_deltas",
)  # fmt: skip
_DISTRIBUTIONS = ("LM", "Classification", "CTC", "ConditionalGeneration", "Pretraining", "PreTraining", "Answering")
_SPREAD = 1e-4  # how far the sums of probabilities may lie from 1


@dataclass(frozen=True)
class Answer:
    """One tensor of an output, in rows.

    Attributes
    ----------
    values : float32 (rows, width); with kind "kl" logits of one distribution a row
    labels : int64 (rows,) what was to be said in each row, or None
    """

    values: torch.Tensor
    labels: torch.Tensor | None = None


def tensors_of(out: Any) -> dict[str, torch.Tensor]:
    """The tensors of floating point that are a model's answer, by name; logits alone where there are any."""
    found: dict[str, torch.Tensor] = {}
    _walk("output", out, found)
    named = {name: x for name, x in found.items() if name.rpartition(".")[2].endswith("logits")}
    return named or found


def _walk(name: str, value: Any, found: dict[str, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.numel():
            found[name] = value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            if key not in _BESIDE:
                _walk(f"{name}.{key}" if name != "output" else str(key), part, found)
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            _walk(f"{name}.{i}", part, found)


def find_kind(model: nn.Module, out: Any) -> str:
    """ "kl" where the output is distributions, "error" elsewhere.

    Logits of transformers' language models and classifiers are distributions, unless the config says that they are
    numbers (regression) or answers independent of each other (several labels). Of any other module only an output that
    is probabilities, or their logarithms, is taken for one.
    """
    tensors = tensors_of(out)
    config = getattr(model, "config", None)
    if all(name.rpartition(".")[2].endswith("logits") for name in tensors):
        problem = getattr(config, "problem_type", None)
        one = all(x.shape[-1] < 2 for x in tensors.values())
        named = any(word in type(model).__name__ for word in _DISTRIBUTIONS)
        return "kl" if named and not one and problem in (None, "single_label_classification") else "error"
    return "kl" if tensors and all(_is_probability(x) for x in tensors.values()) else "error"


def _is_probability(x: torch.Tensor) -> bool:
    if x.ndim < 1 or x.shape[-1] < 2:
        return False
    for p in (x.float(), x.float().exp()):
        if bool((p >= 0).all()) and bool(((p.sum(-1) - 1).abs() <= _SPREAD).all()):
            return True
    return False


def answer_of(out: Any, inputs: Mapping[str, Any], kind: str, *, shifted: bool = False) -> dict[str, Answer]:
    """The rows of an output that count, by the name of the tensor.

    Parameters
    ----------
    out : what the model returned
    inputs : what it was given; its "labels" (-100 where nothing is asked) or masks say which positions count
    kind : of `KINDS`
    shifted : labels are the inputs themselves, and each position is to say the next one (causal language models)
    """
    found = {}
    for name, x in tensors_of(out).items():
        x = x.float()
        if kind == "kl" and _is_probability(x) and not name.endswith("logits"):
            x = x.clamp_min(1e-30).log() if bool((x >= 0).all()) else x
        if kind == "kl" and x.ndim == 4:  # classes of pixels stand second
            x = x.movedim(1, -1)
        labels = inputs.get("labels") if name.endswith("logits") else None
        labels = labels if isinstance(labels, torch.Tensor) and not labels.is_floating_point() else None
        if shifted and x.ndim == 3:
            x, labels = x[:, :-1], None if labels is None else labels[:, 1:]
        counted = _counted(x, inputs, shifted)
        if labels is not None and labels.shape == x.shape[:-1]:
            asked = labels != -100
            counted = asked if counted is None or bool(asked.any()) else counted
        else:
            labels = None
        width = x.shape[-1] if x.ndim else 1
        rows = x.reshape(-1, width)
        labels = None if labels is None else labels.reshape(-1)
        if counted is not None and bool(counted.any()):
            where = counted.reshape(-1)
            rows, labels = rows[where], None if labels is None else labels[where]
        found[name] = Answer(rows, labels)
    return found


def _counted(x: torch.Tensor, inputs: Mapping[str, Any], shifted: bool) -> torch.Tensor | None:
    """Positions that are no padding, where a mask of the output's own length says so."""
    if x.ndim < 3:
        return None
    for name in ("decoder_attention_mask", "attention_mask"):
        mask = inputs.get(name)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            mask = mask[:, 1:] if shifted else mask
            if mask.shape == x.shape[:2] and x.ndim == 3:
                return mask.bool()
    return None
