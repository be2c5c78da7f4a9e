"""Gradual mixed-precision quantization: find out what each layer bears, lower precision step by step, prove the result.

from bitween.gradual import GradualQuantizer

quantizer = GradualQuantizer(model, tokenizer, target_memory_reduction=0.6, max_perplexity_increase=0.05)
model = quantizer.quantize()
print(quantizer.get_quantization_report())
"""

from __future__ import annotations

from bitween._lazy import lazily

_PUBLIC = {
    "GradualQuantizer": "gradual_quantizer",
    "ImportanceAnalyzer": "importance_analyzer",
    "PrecisionOptimizer": "precision_optimizer",
    "GradualEvaluator": "evaluator",
}

__all__ = list(_PUBLIC)
__getattr__, __dir__ = lazily(__name__, _PUBLIC)
