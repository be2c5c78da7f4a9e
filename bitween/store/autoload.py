"""Makes transformers know `quant_method: "bitween"` after a mere `import bitween`, without importing transformers.

If transformers' table of quantizers is loaded, bitween registers at once; else a finder waits for that one module,
steps aside when it comes, and registers once it has run.
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


class _Waiting(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != _TABLE:
            return None
        with contextlib.suppress(ValueError):  # another thread was here first
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register()

            spec.loader.exec_module = run_and_register
        return spec


def _register() -> None:
    if importlib.util.find_spec("torch"):
        importlib.import_module(".hub", __package__)  # which registers at its end


def install() -> None:
    """Register now if transformers is loaded, else as soon as it is."""
    table = sys.modules.get(_TABLE)
    if table is not None and hasattr(table, "register_quantizer"):
        _register()
    elif not any(type(finder).__name__ == "_Waiting" for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())
