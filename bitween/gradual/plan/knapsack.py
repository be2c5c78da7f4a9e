"""Multiple-choice knapsack on NumPy arrays: one option per item, least cost within a weight limit.

The arrays know nothing of bytes or damage, so both directions of planning share this file: weight is
whatever is limited, cost whatever is to be small.

Method: the lower convex hull of every item, merged by slope, solves the linear relaxation for every limit
at once (Sinha and Zoltners 1979; Pisinger 1995). For one limit the walk stops before the step that no longer
fits, what is left over is filled greedily, and, where the relaxation's bound shows that something may still
be gained, a branch and bound over the few items that matter closes the gap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

TOLERANCE = 1e-4  # of the relaxation's bound: a solution this near to it is not improved further
ROUNDING = 1e-12  # relative; totals this little over the limit are summed exactly before they are refused
MOST_STATES = 4000  # partial solutions kept per item by the branch and bound
MOST_EXPANDED = 400_000  # partial solutions looked at before the branch and bound settles for what it has


@dataclass(frozen=True, eq=False)
class Walk:
    """Undominated options of every item, and the hull walk from least weight to least cost.

    Attributes
    ----------
    weight, cost : float64 (items, columns)
        Undominated options in order of rising weight and falling cost; padded with inf.
    option : int64 (items, columns)
        Place of each column among the item's options as given.
    step_item, step_from, step_to : int64 (steps,)
        Hull steps in the order taken: the item, the column it leaves and the column it moves to.
    weights, costs : float64 (steps + 1,)
        Totals after each number of steps; costs is a convex function of weights.
    """

    weight: np.ndarray
    cost: np.ndarray
    option: np.ndarray
    step_item: np.ndarray
    step_from: np.ndarray
    step_to: np.ndarray
    weights: np.ndarray
    costs: np.ndarray

    def select(self, steps: int) -> np.ndarray:
        """Column of every item after so many steps of the walk, int64 (items,)."""
        columns = np.zeros(len(self.weight), np.int64)
        np.maximum.at(columns, self.step_item[:steps], self.step_to[:steps])
        return columns

    def steps_within(self, limit: float) -> int:
        """Number of steps that the limit has room for; -1 when not even the start fits."""
        return int(np.searchsorted(self.weights, limit, side="right")) - 1

    def relaxed(self, limit: float) -> float:
        """Least cost of the linear relaxation: no selection within the limit costs less."""
        return float(np.interp(limit, self.weights, self.costs))

    def price(self, limit: float) -> float:
        """Cost that one more unit of weight saves at this limit (the Lagrange multiplier)."""
        step = self.steps_within(limit)
        if not 0 <= step < len(self.step_item):
            return 0.0
        return float((self.costs[step] - self.costs[step + 1]) / (self.weights[step + 1] - self.weights[step]))

    def mirrored(self) -> Walk:
        """The same options with weight and cost exchanged, walked the other way."""
        count = np.isfinite(self.weight).sum(axis=1)
        columns = count[:, None] - 1 - np.arange(self.weight.shape[1])
        filled, columns = columns >= 0, np.maximum(columns, 0)

        def turned(values: np.ndarray) -> np.ndarray:
            return np.where(filled, np.take_along_axis(values, columns, axis=1), np.inf)

        item = self.step_item[::-1]
        last = count[item] - 1
        return Walk(
            weight=turned(self.cost),
            cost=turned(self.weight),
            option=np.take_along_axis(self.option, columns, axis=1),
            step_item=item,
            step_from=last - self.step_to[::-1],
            step_to=last - self.step_from[::-1],
            weights=self.costs[::-1],
            costs=self.weights[::-1],
        )


def walk(weight: np.ndarray, cost: np.ndarray) -> Walk:
    """Build the hull walk.

    Parameters
    ----------
    weight, cost : float64 (items, options)
        inf in either leaves the option out; every item has at least one option left. Steps of equal slope
        are taken in the order of the items.
    """
    weight, cost, option = _undominated(weight, cost)
    item, left, right, rate = _hull_steps(weight, cost)
    order = np.argsort(-rate, kind="stable")
    item, left, right = item[order], left[order], right[order]
    rise, fall = weight[item, right] - weight[item, left], cost[item, left] - cost[item, right]
    rows, last = np.arange(len(cost)), np.isfinite(cost).sum(axis=1) - 1
    # Costs are summed from the cheap end, where cancellation would hurt.
    falls_ahead = np.concatenate([np.cumsum(fall[::-1])[::-1], [0.0]])
    return Walk(
        weight=weight,
        cost=cost,
        option=option,
        step_item=item,
        step_from=left,
        step_to=right,
        weights=math.fsum(weight[:, 0]) + np.concatenate([[0.0], np.cumsum(rise)]),
        costs=math.fsum(cost[rows, last]) + falls_ahead,
    )


def _undominated(weight: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keep each item's options that no other one beats or equals in both; rising weight, padded with inf."""
    usable = np.isfinite(weight) & np.isfinite(cost)
    weight, cost = np.where(usable, weight, np.inf), np.where(usable, cost, np.inf)
    option = np.lexsort((cost, weight), axis=-1)  # stable: of equals the first given stays
    weight, cost = np.take_along_axis(weight, option, axis=1), np.take_along_axis(cost, option, axis=1)
    keep = np.isfinite(weight)
    keep[:, 1:] &= cost[:, 1:] < np.minimum.accumulate(cost, axis=1)[:, :-1]
    item, source = np.nonzero(keep)
    column = np.cumsum(keep, axis=1)[item, source] - 1
    shape = (len(weight), int(column.max(initial=0)) + 1)
    packed = (np.full(shape, np.inf), np.full(shape, np.inf), np.zeros(shape, np.int64))
    for into, values in zip(packed, (weight, cost, option), strict=True):
        into[item, column] = values[item, source]
    return packed


def _hull_steps(weight: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps along every item's lower convex hull: item, column left, column reached, cost saved per weight."""
    item, column = np.nonzero(np.isfinite(weight))
    while True:
        w, c = weight[item, column], cost[item, column]
        same = item[1:] == item[:-1]
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            rate = np.where(same, (c[:-1] - c[1:]) / (w[1:] - w[:-1]), 0.0)
        # A point on or above the line between its neighbours is no corner of the hull, whatever else goes.
        drop = same[:-1] & same[1:] & (rate[:-1] <= rate[1:])
        if not drop.any():
            return item[:-1][same], column[:-1][same], column[1:][same], rate[same]
        keep = np.ones(len(item), bool)
        keep[1:-1] = ~drop
        item, column = item[keep], column[keep]


def solve(walk: Walk, limit: float, tolerance: float = TOLERANCE) -> tuple[np.ndarray, float]:
    """Selection of least cost whose weight is at most the limit.

    Returns
    -------
    columns : int64 (items,)
        Chosen column of each item.
    bound : float
        No selection within the limit costs less than this.

    The limit has room for the least weight; where that only holds by rounding, the lightest is returned.
    """
    steps = max(walk.steps_within(limit + ROUNDING * abs(limit)), 0)
    while steps > 0 and total(walk.weight, walk.select(steps)) > limit:
        steps -= 1
    columns = fill(walk, walk.select(steps), limit)
    bound = walk.relaxed(limit)
    slack = tolerance * abs(bound)
    if total(walk.cost, columns) - bound <= slack:
        return columns, min(bound, total(walk.cost, columns))
    columns, proved = _Branch(walk, limit, columns, bound, slack).run()
    cost = total(walk.cost, columns)
    return columns, min(cost, max(bound, cost - slack) if proved else bound)


def total(values: np.ndarray, columns: np.ndarray) -> float:
    """Exactly rounded sum of the chosen entries."""
    return math.fsum(values[np.arange(len(columns)), columns])


def fill(walk: Walk, columns: np.ndarray, limit: float) -> np.ndarray:
    """Spend what is left of the limit on the moves that save most cost per weight, until none fits."""
    columns = columns.copy()
    rows = np.arange(len(columns))
    while True:
        left = limit - total(walk.weight, columns)
        rise = walk.weight - walk.weight[rows, columns][:, None]
        item, column = np.nonzero((rise > 0) & (rise <= left))
        if not len(item):
            return columns
        rise = rise[item, column]
        fall = walk.cost[item, columns[item]] - walk.cost[item, column]
        before, taken = columns.copy(), set()
        for move in np.argsort(-fall / rise, kind="stable").tolist():
            if rise[move] <= left and item[move] not in taken:
                left -= rise[move]
                taken.add(item[move])
                columns[item[move]] = column[move]
        if total(walk.weight, columns) > limit:  # by rounding only
            return before


class _Branch:
    """Breadth-first branch and bound over the items whose choice the relaxation leaves open.

    An option whose reduced cost exceeds the gap between the best selection known and the relaxation cannot be
    part of a better one, so most items are settled at once. The others are decided one after the other, those
    with the widest choice first; a partial solution is dropped when another one is no heavier and no dearer, or
    when the relaxation of what remains cannot beat the best known by more than the tolerance.
    """

    def __init__(self, walk: Walk, limit: float, columns: np.ndarray, bound: float, slack: float) -> None:
        self.walk, self.limit, self.slack = walk, limit, slack
        self.best, self.best_cost = columns, total(walk.cost, columns)
        price = walk.price(limit)
        with np.errstate(invalid="ignore"):
            reduced = np.where(np.isfinite(walk.cost), walk.cost + price * walk.weight, np.inf)
        reduced -= reduced.min(axis=1, keepdims=True)
        self.kept = reduced <= max(self.best_cost - bound - slack, 0.0)
        self.start = reduced.argmin(axis=1)
        open_items = np.flatnonzero(self.kept.sum(axis=1) > 1)
        kept_cost = np.where(self.kept, walk.cost, np.nan)[open_items]
        spread = np.nanmax(kept_cost, axis=1) - np.nanmin(kept_cost, axis=1) if len(open_items) else open_items
        self.order = open_items[np.argsort(-spread, kind="stable")]
        self.trail: list[tuple[np.ndarray, np.ndarray]] = []  # per decided item: parent state, chosen column

    def run(self) -> tuple[np.ndarray, bool]:
        """Return the best selection found, and whether none is better by more than the tolerance."""
        settled = np.ones(len(self.start), bool)
        settled[self.order] = False
        columns, rows = self.start[settled], np.flatnonzero(settled)
        weight = np.array([math.fsum(self.walk.weight[rows, columns])])
        cost = np.array([math.fsum(self.walk.cost[rows, columns])])
        expanded, complete = 0, True
        for depth, item in enumerate(self.order):
            choice = np.flatnonzero(self.kept[item])
            parent = np.repeat(np.arange(len(weight)), len(choice))
            column = np.tile(choice, len(weight))
            weight = weight[parent] + self.walk.weight[item, column]
            cost = cost[parent] + self.walk.cost[item, column]
            expanded += len(weight)
            low = self._look_ahead(depth, weight, cost, parent, column)
            keep = _frontier(weight, cost, low < self.best_cost - self.slack)
            if len(keep) > MOST_STATES:
                keep, complete = np.sort(keep[np.argsort(low[keep], kind="stable")[:MOST_STATES]]), False
            if not len(keep) or expanded > MOST_EXPANDED:
                return self.best, complete and not len(keep)
            weight, cost = weight[keep], cost[keep]
            self.trail.append((parent[keep], column[keep]))
        return self.best, complete

    def _look_ahead(
        self, depth: int, weight: np.ndarray, cost: np.ndarray, parent: np.ndarray, column: np.ndarray
    ) -> np.ndarray:
        """Lower bound of each state's completions; tries the most promising completion as a new best."""
        walk = self.walk
        ahead = np.zeros(len(self.start), bool)
        ahead[self.order[depth + 1 :]] = True
        steps = np.flatnonzero(ahead[walk.step_item])
        item, left, right = walk.step_item[steps], walk.step_from[steps], walk.step_to[steps]
        rise, fall = walk.weight[item, right] - walk.weight[item, left], walk.cost[item, left] - walk.cost[item, right]
        weights = walk.weight[ahead, 0].sum() + np.concatenate([[0.0], np.cumsum(rise)])
        costs = walk.cost[ahead, 0].sum() - np.concatenate([[0.0], np.cumsum(fall)])
        room = self.limit + ROUNDING * abs(self.limit) - weight
        low = np.where(room >= weights[0], cost + np.interp(room, weights, costs), np.inf)
        reached = np.searchsorted(weights, room, side="right") - 1
        high = np.where(reached >= 0, cost + costs[reached], np.inf)
        first = int(np.argmin(high))
        if high[first] < np.inf:
            self._try(depth, parent[first], column[first], steps[: reached[first]])
        return low

    def _try(self, depth: int, parent: int, column: int, steps: np.ndarray) -> None:
        """Complete one state along the hull walk, fill it, and keep it if it is the best yet."""
        columns = self.start.copy()
        columns[self.order[depth]] = column
        for back in range(depth - 1, -1, -1):
            parents, chosen = self.trail[back]
            columns[self.order[back]], parent = chosen[parent], parents[parent]
        ahead = self.order[depth + 1 :]
        columns[ahead] = 0
        np.maximum.at(columns, self.walk.step_item[steps], self.walk.step_to[steps])
        if total(self.walk.weight, columns) > self.limit:
            return
        columns = fill(self.walk, columns, self.limit)
        cost = total(self.walk.cost, columns)
        if cost < self.best_cost:
            self.best, self.best_cost = columns, cost


def _frontier(weight: np.ndarray, cost: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Places of the allowed states that no other allowed one beats or equals in both, by rising weight."""
    place = np.flatnonzero(allowed)
    place = place[np.lexsort((cost[place], weight[place]))]
    keep = np.ones(len(place), bool)
    keep[1:] = cost[place][1:] < np.minimum.accumulate(cost[place])[:-1]
    return place[keep]
