"""What is planned: items with their options, and the plan that gives every item one of them.

Bytes are exact integers; damage is in nats of KL per token and adds up over items.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

__all__ = ["Item", "Option", "Plan", "Table", "tie"]

_MOST_BYTES = 2**53  # largest whole number up to which float64 arithmetic is exact


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store an item: any hashable key, exact bytes, damage in nats per token.

    Infinite damage marks an option that failed its trial; it is chosen only for an item that has no other.
    """

    key: Hashable
    nbytes: int
    damage: float


@dataclass(frozen=True)
class Item:
    """Something that takes exactly one of its options.

    Parameters
    ----------
    name : str
        Unique among the items planned together.
    options : sequence of Option
        At least one, in any order; dominated and repeated options are welcome.
    members : sequence of str
        Layers that follow the choice; the item's own name if left out.

    Raises
    ------
    ValueError
        No options, negative bytes, or a damage that is NaN or minus infinity.
    """

    name: str
    options: tuple[Option, ...]
    members: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(self.options))
        object.__setattr__(self, "members", tuple(self.members) or (self.name,))
        if not self.options:
            raise ValueError(f"item {self.name!r}: expected at least one option; got none")
        for option in self.options:
            if not option.damage > -math.inf:
                raise ValueError(f"item {self.name!r}: damage of {option.key}: expected a number; got {option.damage}")
            if not 0 <= option.nbytes <= _MOST_BYTES:
                raise ValueError(f"item {self.name!r}: bytes of {option.key}: expected 0 to 2**53; got {option.nbytes}")


@dataclass(frozen=True)
class Plan:
    """One option for every item.

    Attributes
    ----------
    options : mapping of str to Option
        By item name, in name order.
    nbytes : int
        Sum of the options' bytes.
    damage : float
        Sum of the options' damages, nats per token.
    bound : float
        What no plan for the same target can beat: damage (nats per token) for a plan made within a byte limit,
        bytes for one made within a damage limit. NaN for a plan that was not made by optimising.
    members : mapping of str to tuple of str
        Layers of each item.
    """

    options: Mapping[str, Option]
    nbytes: int
    damage: float
    bound: float = math.nan
    members: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def schemes(self) -> dict[str, Hashable]:
        """Key of every layer, with the members of tied items spelt out."""
        return {member: option.key for name, option in self.options.items() for member in self.members[name]}

    def with_options(self, changes: Mapping[str, Option]) -> Plan:
        """The same plan with some items' options replaced, and its sums brought up to date."""
        unknown = [name for name in changes if name not in self.options]
        if unknown:
            raise ValueError(f"changes: expected items of the plan; got {unknown[0]!r}")
        options = {**self.options, **changes}
        return replace(self, options=options, **_sums(options.values()), bound=math.nan)


def _sums(options: Iterable[Option]) -> dict[str, float]:
    options = list(options)
    return {"nbytes": sum(int(o.nbytes) for o in options), "damage": math.fsum(o.damage for o in options)}


def tie(items: Iterable[Item], groups: Mapping[str, Sequence[str]], *, shared: bool = False) -> list[Item]:
    """Join items that must take the same key into one, which offers the keys they all have.

    Parameters
    ----------
    items : items to join or pass on
    groups : mapping of str to sequence of str
        Name of each new item and the items it joins; it stands where the first of them stood.
    shared : bool
        False: the items are stored one by one, so bytes add up. True: they are uses of one stored weight, so
        bytes count once (the largest). Damages add up in both cases.

    Raises
    ------
    ValueError
        A name that is no item or stands in two groups, or a group without a key in common.
    """
    items = list(items)
    by_name = {item.name: item for item in items}
    home: dict[str, str] = {}
    for group, names in groups.items():
        for name in names:
            if name not in by_name:
                raise ValueError(f"groups: expected names of items; got {name!r} in {group!r}")
            if name in home:
                raise ValueError(f"groups: expected every item once; {name!r} is in {home[name]!r} and {group!r}")
            home[name] = group
    tied: dict[str, Item] = {}
    for item in items:
        group = home.get(item.name, item.name)
        if item.name not in home:
            tied[group] = item
        elif group not in tied:
            tied[group] = _join(group, [by_name[name] for name in groups[group]], shared)
    if len(tied) != len(items) - len(home) + sum(bool(names) for names in groups.values()):
        raise ValueError("groups: expected names that differ from those of the items left alone")
    return list(tied.values())


def _join(name: str, items: Sequence[Item], shared: bool) -> Item:
    """One item with the sum of every option that all items have; of repeated keys the least damaging counts."""
    tables = []
    for item in items:
        best: dict[Hashable, Option] = {}
        for option in item.options:
            known = best.get(option.key)
            if known is None or (option.damage, option.nbytes) < (known.damage, known.nbytes):
                best[option.key] = option
        tables.append(best)
    options = []
    for key in tables[0]:
        if all(key in table for table in tables):
            parts = [table[key] for table in tables]
            nbytes = [int(part.nbytes) for part in parts]
            options.append(Option(key, max(nbytes) if shared else sum(nbytes), math.fsum(p.damage for p in parts)))
    if not options:
        raise ValueError(f"groups: {name!r}: expected a key that all of its items offer; they have none in common")
    return Item(name, tuple(options), tuple(member for item in items for member in item.members))


class Table:
    """The items' options as arrays, in name order, so that results do not depend on the order they came in.

    Attributes
    ----------
    items : tuple of Item
    nbytes, damage : float64 (items, options)
        Padded with inf.
    hopeless : bool (items,)
        Items whose options all have infinite damage.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        self.items = tuple(sorted(items, key=lambda item: item.name))
        if not self.items:
            raise ValueError("items: expected at least one; got none")
        for one, other in zip(self.items, self.items[1:], strict=False):
            if one.name == other.name:
                raise ValueError(f"items: expected unique names; got {one.name!r} twice")
        count = np.array([len(item.options) for item in self.items])
        self._filled = np.arange(count.max()) < count[:, None]
        self._rows = np.arange(len(count))
        self.nbytes = self._padded([o.nbytes for item in self.items for o in item.options])
        self.damage = self._padded([o.damage for item in self.items for o in item.options])
        self.hopeless = ~np.isfinite(self.damage).any(axis=1)
        if math.fsum(np.where(self._filled, self.nbytes, 0).max(axis=1)) > _MOST_BYTES:
            raise ValueError("items: expected at most 2**53 bytes in all")

    def _padded(self, values: Sequence[float]) -> np.ndarray:
        table = np.full(self._filled.shape, np.inf)
        table[self._filled] = values
        return table

    def pick(self, values: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Entries of (items, options) values for one option of each item."""
        return values[self._rows, places]

    def places(self, plan: Plan) -> np.ndarray:
        """Place of each of a plan's options among its item's, int64 (items,)."""
        if list(plan.options) != [item.name for item in self.items]:
            raise ValueError("plan: expected a plan for the same items")
        try:
            return np.array([item.options.index(plan.options[item.name]) for item in self.items])
        except ValueError:
            raise ValueError("plan: expected options that its items still offer") from None

    def plan(self, places: np.ndarray, bound: float = math.nan) -> Plan:
        """Plan that takes the option at the given place of each item."""
        options = {item.name: item.options[place] for item, place in zip(self.items, places.tolist(), strict=True)}
        return Plan(options, **_sums(options.values()), bound=bound, members={i.name: i.members for i in self.items})

    def uniform(self, keys: Iterable[Hashable] | None = None) -> dict[Hashable, np.ndarray]:
        """Places of the options for every key (of those given) that all items offer.

        An item with one option keeps that; of options with the same key the first counts.
        """
        free = [row for row, item in enumerate(self.items) if len(item.options) > 1]
        if keys is None:
            keys = [option.key for option in self.items[free[0] if free else 0].options]
        found = {key: np.zeros(len(self.items), np.int64) for key in keys}
        for row in free:
            if not found:
                break
            at = self.key_places(row)
            found = {key: places for key, places in found.items() if key in at}
            for key, places in found.items():
                places[row] = at[key]
        return found

    def key_places(self, row: int) -> dict[Hashable, int]:
        """Place of the first option with each key of one item."""
        options = self.items[row].options
        return {options[place].key: place for place in range(len(options) - 1, -1, -1)}
