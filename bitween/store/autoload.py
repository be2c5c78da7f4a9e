"""Makes transformers know `quant_method: "bitween"` and packed ends, peft packed layers, after a mere `import bitween`.

Neither is imported for it. If the module that has to know is loaded, bitween registers at once; else a finder waits for
that one module, steps aside when it comes, and registers once it has run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

_TABLE = "transformers.quantizers.auto"
_REGISTERS = {  # module that has to know -> (what it has when it is whole, module of ours that tells it when imported)
    _TABLE: ("register_quantizer", "bitween.store.hub"),
    "transformers.modeling_utils": ("PreTrainedModel", "bitween.store.resizing"),
    "peft.tuners.lora": ("LoraConfig", "bitween.adapters"),
}


class _Waiting(MetaPathFinder):
    def __init__(self, wanted: str = _TABLE) -> None:
        self.wanted = wanted

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.wanted:
            return None
        with contextlib.suppress(ValueError):  # another thread was here first
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register(name)

            spec.loader.exec_module = run_and_register
        return spec


def _register(name: str = _TABLE) -> None:
    if importlib.util.find_spec("torch"):
        importlib.import_module(_REGISTERS[name][1])  # which registers at its end


def install() -> None:
    """Register now with what is loaded, else as soon as it is."""
    waiting = {finder.wanted for finder in sys.meta_path if type(finder).__name__ == "_Waiting"}
    for name, (whole, _) in _REGISTERS.items():
        module = sys.modules.get(name)
        if module is not None and hasattr(module, whole):
            _register(name)
        elif name not in waiting:
            sys.meta_path.insert(0, _Waiting(name))
