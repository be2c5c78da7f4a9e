"""Tiny quantized models for tests of saving, loading and export."""

import torch

from bitween import QuantizedEmbedding, QuantizedLinear, Scheme
from tests import tiny_models

SYMMETRIC = [Scheme(bits, group, True) for bits in (2, 3, 4, 5, 6, 8) for group in (16, 32, -1)]
MIXED = [Scheme(4, 32), Scheme(1.58, 16, True), Scheme(1, 16, True), Scheme(3, 16), Scheme(1.58, 32)]


def quantize(model, schemes, *, head=False, embedding=None):
    """The model with its linear layers quantized in turn by `schemes`; a head tied to the embedding stays tied."""
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and (head or n != "lm_head")]
    for i, name in enumerate(linears):
        scheme = schemes[i % len(schemes)]
        model.set_submodule(name, QuantizedLinear.from_linear(model.get_submodule(name), scheme))
    if embedding is not None:
        table = QuantizedEmbedding.from_embedding(model.get_input_embeddings(), embedding)
        model.set_input_embeddings(table)
        if model.config.tie_word_embeddings:
            model.lm_head = QuantizedLinear.tied_to(table)
    return model


def llama(schemes, *, tied=False, dtype=torch.float32, seed=0, config=None, **options):
    """A quantized tiny Llama whose layers all have 32 or 64 columns."""
    model = tiny_models.make("llama", tie_word_embeddings=tied, intermediate_size=64, seed=seed, **(config or {}))
    frequencies = model.model.rotary_emb.inv_freq
    model.to(dtype).model.rotary_emb.inv_freq = frequencies  # which from_pretrained keeps as float32 too
    return quantize(model, schemes, **options)
