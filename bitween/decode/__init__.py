"""Decoding in the C core: a few new tokens through a whole decoder in one call, beside transformers' own cache.

`attach` gives a model's decoder a forward that takes this path where it may, `detach` takes it away again; `path_of`
says which path a model takes.
"""

from bitween._lazy import lazily

_PUBLIC = {"attach": "attaching", "detach": "attaching", "path_of": "attaching"}

__all__ = list(_PUBLIC)
__getattr__, __dir__ = lazily(__name__, _PUBLIC)
