"""One choice for each of many things, so that their cost stays in a budget and their loss is least.

The multiple-choice knapsack, solved greedily along each thing's lower convex hull of (cost, loss): optimal for the linear
relaxation up to the last step, so what is lost is less than that one step. [Sinha and Zoltners 1979]
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def allocate(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """The index of the choice for each thing; their costs sum up to at most `budget`, and no single other choice that still
    fits has a lower loss. The same arguments give the same choices. ValueError when even the cheapest ones do not fit."""
    hulls = [_hull(cost, loss) for cost, loss in zip(costs, losses, strict=True)]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(cost[i] for cost, i in zip(costs, chosen, strict=True))
    if left < 0:
        raise ValueError(f"the cheapest choices cost {budget - left}, more than {budget}")
    steps = []  # (loss saved for each unit of cost, negated for sorting; thing; place on its hull)
    for thing, hull in enumerate(hulls):
        for place, (a, b) in enumerate(pairwise(hull), 1):
            saved = losses[thing][a] - losses[thing][b]
            steps.append((-saved / (costs[thing][b] - costs[thing][a]), thing, place))
    for _, thing, place in sorted(steps):
        hull = hulls[thing]
        cost = costs[thing][hull[place]] - costs[thing][hull[place - 1]]
        # After a step that does not fit, those after it on the same hull have nothing to stand on.
        if chosen[thing] == hull[place - 1] and cost <= left:
            chosen[thing] = hull[place]
            left -= cost
    return _fill(chosen, costs, losses, left)


def _hull(cost: Sequence[int], loss: Sequence[float]) -> list[int]:
    """The choices on the lower convex hull, from the cheapest one to the one of least loss."""
    hull: list[int] = []
    for i in sorted(range(len(cost)), key=lambda i: (cost[i], loss[i], i)):
        if hull and loss[i] >= loss[hull[-1]]:
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], i, cost, loss):
            hull.pop()
        hull.append(i)
    return hull


def _above(a: int, b: int, c: int, cost: Sequence[int], loss: Sequence[float]) -> bool:
    """True when b lies on or above the line from a to c."""
    return (loss[a] - loss[b]) * (cost[c] - cost[a]) <= (loss[a] - loss[c]) * (cost[b] - cost[a])


def _fill(chosen: list[int], costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], left: int) -> list[int]:
    """Spend what is left on the single changes that lower the loss most."""
    while True:
        best, gain = None, 0.0
        for thing, now in enumerate(chosen):
            for other, cost in enumerate(costs[thing]):
                saved = losses[thing][now] - losses[thing][other]
                if saved > gain and cost - costs[thing][now] <= left:
                    best, gain = (thing, other), saved
        if best is None:
            return chosen
        thing, other = best
        left -= costs[thing][other] - costs[thing][chosen[thing]]
        chosen[thing] = other
