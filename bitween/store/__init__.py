"""Bytes on disk: files that appear whole, checkpoints, saving, loading, and transformers' way in."""
