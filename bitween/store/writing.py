"""Models that come out of `quantize()` know how to save themselves."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["writable"]


def writable(model: Any) -> Any:
    """The model, with the writer attached that a plain `model.save_pretrained(directory)` needs; returns it.

    Without it transformers writes packed tensors and a config that says nothing of them, and fills the layers at
    random when it loads that. Models that are not transformers' own, and those without a packed layer, stay as they
    are.
    """
    library = sys.modules.get("transformers")
    if library is None or not isinstance(model, library.PreTrainedModel):
        return model
    from bitween.store.hub import attach, plan_of

    if plan_of(model):
        attach(model)
    return model
