"""A model in full precision opened from its directory, its weights left in their files until somebody reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["DTYPES", "check_dtype", "open_model"]

DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_dtype(dtype: Any, name: str = "dtype") -> str:
    """One of `DTYPES` by its name, of a name or a torch dtype."""
    found = str(dtype).removeprefix("torch.")
    if found not in DTYPES:
        raise ValueError(f"{name}: expected one of {', '.join(DTYPES)}; got {dtype!r}")
    return found


def open_model(
    place: str | Path,
    dtype: Any = "auto",
    *,
    trust: bool = False,
    keep: Callable[[Any], Any] = lambda tensor: tensor,
    done: Callable[[Any], None] = lambda tensor: None,
    tokenizer: Any = None,
) -> tuple[Any, Any]:
    """Model and tokenizer of a directory, a .gguf file or a name on the hub.

    Safetensors in the dtype of the config are mapped: no weight is read before it is used. With another dtype one
    tensor is cast at a time, so that the model never stands in memory twice.

    Parameters
    ----------
    dtype : "auto" (what the config says), "float32", "bfloat16" or "float16", or such a torch dtype
    trust : run code that comes with the model
    keep : given every tensor that was cast; returns the one to hold, of the same numbers
    done : given every tensor of the file that was cast and is not needed again
    tokenizer : returned as it is where there is one

    Raises
    ------
    ValueError
        An unknown dtype, or a model with code of its own that is not trusted.
    OSError
        Files are missing, for instance a shard that the index names.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wanted = check_dtype(dtype)
    options: dict[str, Any] = {"trust_remote_code": trust}
    if str(place).endswith(".gguf"):
        place, options["gguf_file"] = Path(place).parent, Path(place).name
    try:
        model = AutoModelForCausalLM.from_pretrained(place, dtype="auto", **options)
        tokenizer = AutoTokenizer.from_pretrained(place, **options) if tokenizer is None else tokenizer
    except ValueError as error:
        if trust or "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"model: {place} comes with code of its own, which is not run unasked: read it, then give "
            "--trust-remote-code"
        ) from error
    if wanted != "auto":
        _cast(model, getattr(torch, wanted), keep, done)
    return model, tokenizer


def _cast(model: Any, dtype: Any, keep: Callable[[Any], Any], done: Callable[[Any], None]) -> None:
    """Floating-point parameters in another dtype; modules that a family keeps in float32 stay so, as transformers has
    it."""
    pinned = {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    if str(dtype) == "torch.float16":
        pinned |= {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype and not pinned & {*name.split(".")}:
            own, parameter.data = parameter.data, keep(parameter.data.to(dtype))
            done(own)
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        config.dtype = dtype
