"""Plan which option every item of a model takes: least damage within the bytes, or fewest bytes within the damage.

Pure functions on measured options; no model and no torch. An item is a layer, several layers that must agree
(`tie`), or anything else with a price, such as a block that may be dropped. Damage is in nats of KL per token and
is taken to add up over items; `damage_model` corrects the sum where it does not.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from bitween.gradual.plan import knapsack
from bitween.gradual.plan.damage_model import DamageModel, recalibrate
from bitween.gradual.plan.items import Item, Option, Plan, Table, tie

__all__ = [
    "DamageModel",
    "Frontier",
    "InfeasibleTarget",
    "Item",
    "Option",
    "Plan",
    "Swap",
    "TradeOffs",
    "fewest_bytes",
    "frontier",
    "least_damage",
    "pair_swaps",
    "recalibrate",
    "tie",
    "uniform_plans",
]


class InfeasibleTarget(ValueError):
    """No selection of options reaches the target.

    Attributes
    ----------
    least : float
        Smallest value that can be reached, in `unit`.
    unit : str
        "bytes" or "nats per token".
    """

    def __init__(self, message: str, least: float, unit: str) -> None:
        super().__init__(message)
        self.least = least
        self.unit = unit


@dataclass(frozen=True)
class TradeOffs:
    """The plans nearest to a pair of targets.

    Attributes
    ----------
    feasible : bool
        True if `within_bytes` meets both targets.
    within_bytes : Plan or None
        Least damage within the byte limit; None if no plan is that small.
    within_damage : Plan or None
        Fewest bytes within the damage limit; None if no plan is that faithful.
    between : Plan
        The corner of the frontier where the worse of bytes / byte limit and damage / damage limit is least.
    """

    feasible: bool
    within_bytes: Plan | None
    within_damage: Plan | None
    between: Plan


@dataclass(frozen=True, eq=False)
class Frontier:
    """Every trade-off between bytes and damage; made by `frontier`, answers any target without new measurements.

    Attributes
    ----------
    nbytes : int64 (corners,)
        Rising bytes of the corners of the lower convex hull of all plans.
    damage : float64 (corners,)
        Falling damage at these corners, nats per token. No plan lies below the line through them.
    """

    nbytes: np.ndarray
    damage: np.ndarray
    _walk: knapsack.Walk = field(repr=False)
    _table: Table = field(repr=False)

    @property
    def items(self) -> tuple[Item, ...]:
        """The items, in name order."""
        return self._table.items

    @property
    def least_bytes(self) -> int:
        """Bytes of the smallest plan."""
        return int(self.nbytes[0])

    @property
    def least_damage(self) -> float:
        """Damage of the most faithful plan, nats per token."""
        return float(self.damage[-1])

    def __len__(self) -> int:
        return len(self.nbytes)

    def plan_at(self, corner: int) -> Plan:
        """Plan of one corner; no other plan of at most its bytes does less damage."""
        place = range(len(self))[corner]
        return self._plan(self._walk, self._walk.select(place), float(self.damage[place]))

    def points(self, most: int | None = None) -> list[tuple[int, float]]:
        """(bytes, damage) of the corners, for a plot; thinned evenly if there are more than `most`."""
        place = np.arange(len(self))
        if most is not None and len(self) > most:
            place = np.unique(np.linspace(0, len(self) - 1, max(most, 2)).round().astype(int))
        return [(int(self.nbytes[i]), float(self.damage[i])) for i in place]

    def within_bytes(self, limit: float, against: Iterable[Plan] = ()) -> Plan:
        """Plan of least damage whose bytes are at most `limit`.

        Its damage is within 0.01 % of the least possible (`bound` proves how near), and never above that of a
        uniform plan or a plan in `against` that fits.

        Raises
        ------
        InfeasibleTarget
            The limit is below `least_bytes`.
        """
        if not limit >= self.least_bytes:
            text = f"byte limit: expected at least {self.least_bytes:,} bytes, the least possible; got {limit:,}"
            raise InfeasibleTarget(text, self.least_bytes, "bytes")
        return self._solve(self._walk, limit, self._table.nbytes, self._table.damage, against)

    def within_damage(self, limit: float, against: Iterable[Plan] = ()) -> Plan:
        """Plan of fewest bytes whose damage is at most `limit` nats per token.

        Its bytes are within 0.01 % of the fewest possible (`bound` proves how near), and never above those of a
        uniform plan or a plan in `against` that fits.

        Raises
        ------
        InfeasibleTarget
            The limit is below `least_damage`.
        """
        if not limit >= self.least_damage:
            text = (
                f"damage limit: expected at least {self.least_damage:.6g} nats per token, the least possible; "
                f"got {limit:.6g}"
            )
            hopeless = np.flatnonzero(self._table.hopeless)
            if len(hopeless):
                text += f" (every option of {self.items[hopeless[0]].name!r} has infinite damage)"
            raise InfeasibleTarget(text, self.least_damage, "nats per token")
        if limit == math.inf:
            return replace(self.plan_at(0), bound=float(self.least_bytes))
        return self._solve(self._mirror, limit, self._table.damage, self._table.nbytes, against)

    def nearest(self, byte_limit: float, damage_limit: float) -> TradeOffs:
        """The plans nearest to a pair of targets, whether or not both can be met."""
        small = self.within_bytes(byte_limit) if byte_limit >= self.least_bytes else None
        faithful = self.within_damage(damage_limit) if damage_limit >= self.least_damage else None
        tiny = np.finfo(float).tiny
        with np.errstate(over="ignore"):
            worse = np.maximum(self.nbytes / max(byte_limit, tiny), self.damage / max(damage_limit, tiny))
        return TradeOffs(
            feasible=small is not None and small.damage <= damage_limit,
            within_bytes=small,
            within_damage=faithful,
            between=self.plan_at(int(np.argmin(worse))),
        )

    @cached_property
    def _mirror(self) -> knapsack.Walk:
        return self._walk.mirrored()

    def _solve(
        self, walk: knapsack.Walk, limit: float, weights: np.ndarray, costs: np.ndarray, against: Iterable[Plan]
    ) -> Plan:
        """Solve in the walk's direction, then make sure that no uniform or given plan is better."""
        limit = min(float(limit), sys.float_info.max)
        columns, bound = knapsack.solve(walk, limit)
        cost = knapsack.total(walk.cost, columns)
        rivals = self._table.uniform(self._rival_keys(weights, costs, walk.price(limit), limit, cost))
        for places in (*rivals.values(), *map(self._table.places, against)):
            weight = self._table.pick(weights, places)
            if math.fsum(weight) <= limit and math.fsum(self._table.pick(costs, places)) < cost:
                seed = (walk.weight <= weight[:, None]).sum(axis=1) - 1  # what equals or dominates each option
                columns = knapsack.fill(walk, seed, limit)
                cost = knapsack.total(walk.cost, columns)
        return self._plan(walk, columns, min(bound, cost))

    def _rival_keys(
        self, weights: np.ndarray, costs: np.ndarray, price: float, limit: float, cost: float
    ) -> list[Hashable]:
        """Keys whose uniform plan may cost less than `cost` within the limit.

        At any price of weight, a plan costs at least the sum over the items of the least (cost + price x weight),
        less price x limit, plus what its own options exceed these minima by. So a few items rule most keys out.
        """
        with np.errstate(invalid="ignore"):
            priced = costs + price * weights
        priced[~np.isfinite(priced)] = math.inf
        least = priced.min(axis=1, keepdims=True)
        if not np.isfinite(least).all():
            return []
        margin = cost + price * limit - math.fsum(least[:, 0]) + 1e-9 * (abs(cost) + price * limit)
        excess: dict[Hashable, float] | None = None
        for row, over in enumerate(priced - least):
            if len(self.items[row].options) == 1:
                continue
            at = self._table.key_places(row)
            if excess is None:
                excess = dict.fromkeys(at, 0.0)
            excess = {key: so_far + over[at[key]] for key, so_far in excess.items() if key in at}
            excess = {key: so_far for key, so_far in excess.items() if so_far <= margin}
            if not excess:
                break
        return list(excess or ())

    def _plan(self, walk: knapsack.Walk, columns: np.ndarray, bound: float) -> Plan:
        return self._table.plan(walk.option[np.arange(len(columns)), columns], bound)


def frontier(items: Iterable[Item]) -> Frontier:
    """Walk the lower convex hull of all plans, from the fewest bytes to the least damage.

    Options of infinite damage are left out; an item that has no others takes the smallest of them, and every
    plan's damage is infinite then. Ties go to the item first in name order and the option given first.

    Raises
    ------
    ValueError
        No items, or two of the same name.
    """
    table = Table(items)
    damage = np.where(table.hopeless[:, None] & np.isfinite(table.nbytes), 0.0, table.damage)
    walk = knapsack.walk(table.nbytes, damage)
    return Frontier(
        nbytes=walk.weights.astype(np.int64),
        damage=walk.costs + (math.inf if table.hopeless.any() else 0.0),
        _walk=walk,
        _table=table,
    )


def least_damage(items: Iterable[Item], byte_limit: float, against: Iterable[Plan] = ()) -> Plan:
    """Plan of least damage within `byte_limit` bytes: see `Frontier.within_bytes`."""
    return frontier(items).within_bytes(byte_limit, against)


def fewest_bytes(items: Iterable[Item], damage_limit: float, against: Iterable[Plan] = ()) -> Plan:
    """Plan of fewest bytes within `damage_limit` nats per token: see `Frontier.within_damage`."""
    return frontier(items).within_damage(damage_limit, against)


def uniform_plans(
    items: Iterable[Item], keys: Sequence[Hashable] | None = None, otherwise: Hashable | None = None
) -> dict[Hashable, Plan]:
    """The plan of every key that can be used throughout.

    Parameters
    ----------
    items : iterable of Item
        An item with a single option keeps it.
    keys : sequence, optional
        Keys wanted; every key that all items offer if left out.
    otherwise : optional
        Key taken by items that do not offer the one in question, such as an embedding kept at 8 bits.

    Raises
    ------
    ValueError
        A wanted key that some item offers neither by itself nor through `otherwise`.
    """
    table = Table(items)
    if keys is None and otherwise is None:
        return {key: table.plan(places) for key, places in table.uniform().items()}
    if keys is None:
        keys = list(dict.fromkeys(option.key for item in table.items for option in item.options))
    plans = {}
    for key in keys:
        places = []
        for item in table.items:
            offered = [option.key for option in item.options]
            wanted = next((k for k in (key, otherwise) if k in offered), None)
            if wanted is None and len(offered) > 1:
                raise ValueError(f"keys: expected keys that {item.name!r} offers; got {key}")
            places.append(offered.index(wanted) if wanted is not None else 0)
        plans[key] = table.plan(np.array(places))
    return plans


@dataclass(frozen=True)
class Swap:
    """Two items that change together: `up` takes more bytes, `down` gives them up.

    `nbytes` and `damage` are the predicted changes of the whole plan; negative damage is a gain.
    """

    up: str
    up_option: Option
    down: str
    down_option: Option
    nbytes: int
    damage: float

    def apply(self, plan: Plan) -> Plan:
        """The plan after the swap."""
        return plan.with_options({self.up: self.up_option, self.down: self.down_option})


def pair_swaps(plan: Plan, items: Iterable[Item], limit: float | None = None, reach: int = 3) -> Iterator[Swap]:
    """Moves of one item up and another down that keep the plan within the bytes, best predicted gain first.

    Near an optimal plan every gain is slightly negative: the order says which swaps to measure first, where
    the prediction may be wrong.

    Parameters
    ----------
    plan : Plan
        A plan for the same items.
    limit : float, optional
        Most bytes after the swap; the plan's own if left out.
    reach : int
        How many undominated options away from its present one an item may move.
    """
    table = Table(items)
    walk = knapsack.walk(table.nbytes, table.damage)
    places = table.places(plan)
    nbytes, damage = table.pick(table.nbytes, places), table.pick(table.damage, places)
    at = np.maximum((walk.weight <= nbytes[:, None]).sum(axis=1) - 1, 0)
    away = np.arange(walk.weight.shape[1]) - at[:, None]
    item, column = np.nonzero(np.isfinite(walk.weight) & (np.abs(away) <= reach) & np.isfinite(damage)[:, None])
    more, worse = walk.weight[item, column] - nbytes[item], walk.cost[item, column] - damage[item]
    option = walk.option[item, column]
    moves = np.lexsort((option, item, more, worse))
    ups, downs = (moves[(more * sign)[moves] > 0] for sign in (1, -1))
    room = (plan.nbytes if limit is None else limit) - plan.nbytes

    def partners(up: int) -> Iterator[tuple[float, float, int, int]]:
        for start in range(0, len(downs), 256):  # lazily: few of the many pairs are ever asked for
            some = downs[start : start + 256]
            for down in some[(more[some] + more[up] <= room) & (item[some] != item[up])].tolist():
                yield worse[up] + worse[down], more[up] + more[down], up, down

    names, choices = [i.name for i in table.items], [i.options for i in table.items]
    for change, size, up, down in heapq.merge(*map(partners, ups.tolist())):
        u, d = item[up], item[down]
        yield Swap(names[u], choices[u][option[up]], names[d], choices[d][option[down]], int(size), float(change))
