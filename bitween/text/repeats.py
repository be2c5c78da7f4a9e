"""Documents that say again what another one says: found by the runs of tokens that they share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["Repeats"]

_RUN = 12  # tokens that two documents seldom share by chance
_EVERY = 8  # of the runs only those that begin with a token divisible by this are kept: the same ones in any copy
_FEWEST = 5  # shared runs
_SHARE = 0.5  # of the runs of the document that came later
_LONGEST = 20_000  # tokens looked at


class Repeats:
    """Documents seen so far, each under a name."""

    def __init__(self) -> None:
        self._first: dict[bytes, int] = {}
        self._names: list[object] = []

    def original(self, tokens: Sequence[int], name: object) -> object | None:
        """The name of a document that `tokens` repeat for more than half; else None, and they count as seen from now.

        Parameters
        ----------
        tokens : token ids of one document
        name : what to call it later
        """
        runs = _runs(tokens)
        found: dict[int, int] = {}
        for run in runs:
            place = self._first.get(run)
            if place is not None:
                found[place] = found.get(place, 0) + 1
        if found:
            place, shared = max(found.items(), key=lambda item: item[1])
            if shared >= _FEWEST and shared > _SHARE * len(runs):
                return self._names[place]
        self._names.append(name)
        for run in runs:
            self._first.setdefault(run, len(self._names) - 1)
        return None


def _runs(tokens: Sequence[int]) -> set[bytes]:
    ids = np.asarray(tokens[:_LONGEST], np.int64)
    if len(ids) < _RUN:
        return set()
    starts = np.flatnonzero(ids[: len(ids) - _RUN + 1] % _EVERY == 0)
    return {ids[start : start + _RUN].tobytes() for start in starts}
