"""Whether head and embedding are one, as a model's configs and its list of ties say it."""

from __future__ import annotations

from typing import Any

from torch import nn

from bitween.layers.packed import Packed

__all__ = ["untie", "write_tied_flag"]


def write_tied_flag(model: Any, tied: bool) -> None:
    """Let every config say whether head and embedding are one, as they are: saving and loading go by the flag."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "to_dict")}
    wrong = [c for c in configs.values() if getattr(c, "tie_word_embeddings", tied) != tied]
    if not wrong:
        return
    for config in wrong:
        config.tie_word_embeddings = tied
    if hasattr(model, "all_tied_weights_keys"):  # transformers 5 keeps the list that saving goes by
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def untie(model: nn.Module) -> None:
    """Forget ties between weights that are no longer there: quantized layers share codes by `tied_to`."""
    for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
        ties = getattr(model, attribute, None)
        if isinstance(ties, dict):
            setattr(model, attribute, {t: s for t, s in ties.items() if not _is_packed(model, s)})


def _is_packed(model: nn.Module, parameter: str) -> bool:
    try:
        return isinstance(model.get_submodule(parameter.rpartition(".")[0]), Packed)
    except AttributeError:
        return False
