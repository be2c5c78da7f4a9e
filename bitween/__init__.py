"""bitween: the best mixed-precision language model within a memory target and a perplexity budget.

    from bitween.gradual import GradualQuantizer
    model = GradualQuantizer(model, tokenizer, target_memory_reduction=0.6, max_perplexity_increase=0.05).quantize()

Importing this package loads NumPy and the C core only; torch and transformers are imported where they are used.
"""

from __future__ import annotations

import os

from bitween import _core
from bitween._lazy import lazily
from bitween.store import autoload

if os.environ.get("BITWEEN_ISA"):
    _core.set_isa(os.environ["BITWEEN_ISA"])

# Public name -> module that defines it.
_PUBLIC = {
    "Scheme": "scheme",
    "QuantizedTensor": "quantized_tensor",
    "Hessian": "rounding.hessian",
    "gptq": "rounding.gptq",
    "GptqResult": "rounding.gptq",
    "SequentialQuantizer": "realise.sequential",
    "LayerResult": "realise.sequential",
    "quantize": "functional",
    "search": "functional",
    "cross_entropy": "functional",
    "kl_divergence": "functional",
    "head_cross_entropy": "model.head",
    "head_kl_divergence": "model.head",
    "mean": "functional",
    "info": "decode.telling",
    "set_num_threads": "_threads",
    "get_num_threads": "_threads",
    "QuantizedLinear": "layers.linear",
    "CheckpointError": "store.checkpoint",
    "attach": "store.hub",
    "load_model": "store.loading",
    "save_model": "store.saving",
    "QuantizedEmbedding": "layers.embedding",
    "set_matmul_mode": "layers.linear",
    "multiply_together": "layers.together",
    "Bitween": "quantizer",
}

__all__ = ["__version__", *_PUBLIC]
__version__: str = _core.info()["version"]
__getattr__, __dir__ = lazily(__name__, _PUBLIC)


autoload.install()
