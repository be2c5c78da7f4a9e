"""transformers' DynamicCache on memory with room to grow, so that a new token is written and nothing is copied.

The layers of a cache that decoding has taken over keep all their behaviour: `keys` and `values` are views of the rows
that are filled. Whoever assigns others (a crop, a beam search, the slow path) parts a layer from its room, and the next
step takes the cache over again.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

__all__ = ["Room", "Rooms", "is_taken_over", "rooms_of"]

_LEAST_SPARE = 64  # tokens


class Room:
    """Keys and values of some layers: data (places, 2, batch, kv_heads, capacity, dim), rows start .. end-1 filled with
    the last tokens of the `seen`; of older ones than a window only what fits is kept."""

    def __init__(self, places: int, like: torch.Tensor, seen: int, window: int) -> None:
        batch, heads, length, dim = like.shape
        self.window, self.seen, self.start, self.end = window, seen, 0, length
        self.parted = False
        self.data = like.new_empty((places, 2, batch, heads, self._capacity(length), dim))

    @staticmethod
    def _capacity(length: int) -> int:
        return length + max(_LEAST_SPARE, length // 4)

    def make_space(self, n: int) -> None:
        """Have n free rows after the last filled one."""
        if self.window:  # what no later token sees is let go
            self.start = max(self.start, self.end - (self.window - 1))
        if self.end + n <= self.data.shape[4]:
            return
        filled = self.data[:, :, :, :, self.start : self.end]
        length = self.end - self.start
        if self._capacity(length + n) > self.data.shape[4]:
            shape = (*self.data.shape[:4], self._capacity(length + n), self.data.shape[5])
            data = self.data.new_empty(shape)
            data[:, :, :, :, :length] = filled
            self.data = data
        else:
            self.data[:, :, :, :, :length] = filled.clone()
        self.start, self.end = 0, length

    def advance(self, n: int) -> None:
        """Count n rows as filled."""
        self.end += n
        self.seen += n
        if self.window:
            self.start = max(self.start, self.end - (self.window - 1))

    def view(self, place: int, which: int) -> torch.Tensor:
        """Keys (0) or values (1) of a layer, (batch, kv_heads, filled, dim)."""
        return self.data[place, which, :, :, self.start : self.end]


class _Roomy:
    """A cache layer whose keys and values lie in a room, until others are assigned."""

    __slots__ = ()  # and after its base in bases: so a layer of that class may become one

    @property
    def keys(self) -> torch.Tensor | None:
        own = self.__dict__.get("_own_keys")
        return own if own is not None or self._room is None else self._room.view(self._place, 0)

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        self._part("_own_keys", value)

    @property
    def values(self) -> torch.Tensor | None:
        own = self.__dict__.get("_own_values")
        return own if own is not None or self._room is None else self._room.view(self._place, 1)

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        self._part("_own_values", value)

    def _part(self, name: str, value: Any) -> None:
        self.__dict__[name] = value
        if self._room is None:
            return
        self._room.parted = True
        if value is None:  # reset: nothing of the room is to be seen any more
            self._room = None

    def _hold(self, room: Room, place: int) -> None:
        for name in ("keys", "values", "cumulative_length", "_own_keys", "_own_values", "_own_length"):
            self.__dict__.pop(name, None)
        self._room, self._place = room, place


class RoomyLayer(DynamicLayer, _Roomy):
    """A DynamicLayer in a room."""

    def get_seq_length(self) -> int:
        """Tokens that are cached."""
        if self._room is not None and self.__dict__.get("_own_keys") is None:
            return self._room.end - self._room.start
        return super().get_seq_length()


class RoomySlidingLayer(DynamicSlidingWindowLayer, _Roomy):
    """A DynamicSlidingWindowLayer in a room."""

    @property
    def cumulative_length(self) -> int:
        own = self.__dict__.get("_own_length")
        return own if own is not None or self._room is None else self._room.seen

    @cumulative_length.setter
    def cumulative_length(self, value: int) -> None:
        self._part("_own_length", value)


_ROOMY = {DynamicLayer: RoomyLayer, DynamicSlidingWindowLayer: RoomySlidingLayer}


class Rooms:
    """The rooms of a cache, and the layers that lie in them."""

    def __init__(self, layers: list[Any], places: list[tuple[int, int]]) -> None:
        self.layers = list(layers)
        counts: dict[int, int] = {}
        first: dict[int, Any] = {}
        for layer, (room, _) in zip(layers, places, strict=True):
            counts[room] = counts.get(room, 0) + 1
            first.setdefault(room, layer)
        self.rooms = []
        for number in sorted(counts):
            layer = first[number]
            window = layer.sliding_window if layer.is_sliding else 0
            self.rooms.append(Room(counts[number], layer.keys, layer.get_seq_length(), window))
        for layer, (number, place) in zip(layers, places, strict=True):
            room = self.rooms[number]
            room.view(place, 0).copy_(layer.keys)
            room.view(place, 1).copy_(layer.values)
            if type(layer) in _ROOMY:
                layer.__class__ = _ROOMY[type(layer)]
            layer._hold(room, place)

    def whole(self, layers: list[Any]) -> bool:
        """Whether these are the layers, and all of them still lie in the rooms."""
        return layers == self.layers and not any(room.parted for room in self.rooms)

    def described(self) -> tuple[tuple[torch.Tensor, int, int, int], ...]:
        """For the core."""
        return tuple((room.data, room.start, room.end, room.seen) for room in self.rooms)


def is_taken_over(cache: DynamicCache) -> bool:
    """Whether a cache lies in rooms."""
    rooms = cache.__dict__.get("_bitween_rooms")
    return rooms is not None and rooms.whole(cache.layers)


def rooms_of(cache: DynamicCache, known: Any, batch: int) -> Rooms | None:
    """The rooms of a cache, which is taken over where it is not yet; None for one that does not fit.

    Parameters
    ----------
    known : the recognised decoder (`bitween.decode.recognising.Recognised`)
    batch : sequences of the step
    """
    rooms = cache.__dict__.get("_bitween_rooms")
    if rooms is not None and rooms.whole(cache.layers):
        data = rooms.rooms[0].data
        return rooms if data.shape[2] == batch and data.dtype is known.dtype and rooms.places == known.places else None
    if not _fits(cache, known, batch):
        return None
    rooms = Rooms(cache.layers, known.places)
    rooms.places = known.places
    cache._bitween_rooms = rooms
    return rooms


def _fits(cache: DynamicCache, known: Any, batch: int) -> bool:
    """Whether a cache holds what the decoder's steps would have put there."""
    layers = cache.layers
    if len(layers) != known.n_blocks or getattr(cache, "offloading", False):
        return False
    lengths = set()
    for layer, window in zip(layers, known.windows, strict=True):
        if type(layer) not in (*_ROOMY, *_ROOMY.values()) or not layer.is_initialized:
            return False
        recording = getattr(layer, "record_past", False)  # the first versions of transformers 5 can't
        if layer.is_sliding and (layer.sliding_window != window or window < 2 or recording):
            return False
        seen = layer.get_seq_length()
        lengths.add(seen)
        shape = (batch, known.kv_heads, min(seen, window - 1) if layer.is_sliding else seen, known.dim)
        for tensor in (layer.keys, layer.values):
            if tensor is None or tensor.dtype is not known.dtype or tensor.device.type != "cpu":
                return False
            if tuple(tensor.shape) != shape:
                return False
    kinds = {(place[0], layer.is_sliding) for layer, place in zip(layers, known.places, strict=True)}
    return len(lengths) == 1 and lengths != {0} and len(kinds) == len({number for number, _ in kinds})
