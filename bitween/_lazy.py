"""Public names that are imported when they are first used, so that a package imports quickly and without torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["lazily"]

# Package that an extra brings -> the extra, as pyproject.toml lists them.
_EXTRAS = dict.fromkeys(("torch", "transformers", "safetensors", "tqdm", "scipy", "compressed_tensors", "typer"), "hf")
_EXTRAS |= {"matplotlib": "report", "gguf": "gguf", "sentencepiece": "gguf", "accelerate": "gguf", "peft": "adapters"}


def lazily(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package with the public names of `modules`: name -> module that defines it."""

    def __getattr__(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(f".{modules[name]}", package)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing not in _EXTRAS:
                raise
            text = (
                f"{package}.{name} needs {missing}, which is not installed: pip install 'bitween[{_EXTRAS[missing]}]'"
            )
            raise ModuleNotFoundError(text, name=error.name, path=error.path) from error
        value = getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__, lambda: sorted(sys.modules[package].__all__)
