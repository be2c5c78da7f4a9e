"""Gradual mixed-precision quantization: find out what each layer bears, lower precision step by step, prove the result.

from bitween.gradual import GradualQuantizer

quantizer = GradualQuantizer(model, tokenizer, target_memory_reduction=0.6, max_perplexity_increase=0.05)
model = quantizer.quantize()
print(quantizer.get_quantization_report())
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "GradualQuantizer": "gradual_quantizer",
    "ImportanceAnalyzer": "importance_analyzer",
    "PrecisionOptimizer": "precision_optimizer",
    "GradualEvaluator": "evaluator",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bitween.gradual' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
