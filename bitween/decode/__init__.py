"""Decoding in the C core: a few new tokens through a whole decoder in one call, beside transformers' own cache.

`attach` gives a model's decoder a forward that takes this path where it may; `path_of` says which path it takes.
"""

from bitween.decode.attaching import attach, detach, path_of

__all__ = ["attach", "detach", "path_of"]
