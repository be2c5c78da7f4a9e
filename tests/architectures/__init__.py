"""Every model type that transformers can build: tiny, quantized, generating, saved, loaded (`make architectures`)."""
