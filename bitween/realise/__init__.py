"""A plan made real on a model: each layer quantized on what the layers before it give."""
