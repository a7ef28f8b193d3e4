"""Choices of one candidate per linear so that their total cost stays within a bound.

A linear has *candidates*, cheapest first, each with a cost; the last one is the dense linear.
There are two ways to choose: an equal share of its cost for each linear, which needs only the
costs, or the smallest total loss. The latter minimises sum_i loss_i subject to
sum_i cost_i <= (1 - ratio) total: the candidates that minimise loss_i + lambda cost_i, each linear
by itself, are optimal for their total cost (Everett, Operations Research 11, 1963: main theorem).
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamcomp.errors import RecipeError

__all__ = ["Curve", "even_choices", "min_loss_choices"]


@dataclass(frozen=True)
class Curve:
    """The candidates of one linear, each identified by its place.

    Parameters
    ----------
    costs : Tensor of shape (candidates,), fp64, whole numbers, ascending
    losses : Tensor of shape (candidates,), fp64, descending to 0
    """

    costs: Tensor
    losses: Tensor

    @classmethod
    def of_spectrum(cls, costs: Tensor, energies: Tensor, step: int = 1) -> Curve:
        """Candidates are multiples of ``step`` as ranks, and last the dense linear: no loss.

        The loss at rank r is the sum of the ``energies`` (k,) after the r-th; 0 past their end.
        """
        tails = energies.double().flip(0).cumsum(0).flip(0)  # smallest first: less rounding
        losses = torch.zeros(len(costs), dtype=torch.float64)
        lost = tails[step::step][: len(costs) - 1]
        losses[: len(lost)] = lost
        return cls(costs, losses)

    def from_place(self, place: int) -> Curve:
        """The curve from the candidate at ``place`` on."""
        return Curve(self.costs[place:], self.losses[place:])

    def cost(self, place: int) -> int:
        return int(self.costs[place])

    def cheapest(self, price: float) -> int:
        """Place of the smallest loss + price * cost, the first one in a tie.

        It is a vertex of the lower convex hull, and every vertex is the cheapest at some price.
        """
        return int(torch.add(self.losses, self.costs, alpha=price).argmin())

    def best_step(self, place: int, spare: int) -> tuple[float, int] | None:
        """Decrease of loss per cost, and place, of the best candidate that ``spare`` pays for."""
        stop = int(torch.searchsorted(self.costs, self.costs[place] + spare, right=True))
        further = slice(place + 1, stop)
        gains = self.losses[place] - self.losses[further]
        if not bool((gains > 0).any()):
            return None
        gains /= self.costs[further] - self.costs[place]
        best = int(gains.argmax())
        return float(gains[best]), place + 1 + best


def even_choices(costs: Sequence[Tensor], ratio: float) -> list[int]:
    """Places in ``costs``, (candidates,) fp64 each, at an equal share of each linear's last cost.

    A linear of several candidates never takes the last one. One with a single candidate takes it,
    and the excess over its share is taken from the others, so that the total is at most
    ``1 - ratio`` of the last costs. The share is found by bisection; what rounding leaves over is
    given out one place at a time, largest linear first, round after round, until it does not pay
    for the next place of any linear. RecipeError where even place 0 everywhere costs too much.
    """
    allowed, share = _largest_share(costs, ratio)
    places = _places_at(costs, share)
    spare = allowed - _spent(costs, places)
    largest_first = sorted(range(len(costs)), key=lambda i: -int(costs[i][-1]))
    given = True
    while given:
        given = False
        for linear in largest_first:
            place = places[linear]
            if place + 2 >= len(costs[linear]):
                continue
            step = int(costs[linear][place + 1]) - int(costs[linear][place])
            if step <= spare:
                places[linear] = place + 1
                spare -= step
                given = True
    return places


def min_loss_choices(curves: Sequence[Curve], ratio: float, *, floor: float = 0.05) -> list[int]:
    """The places with the smallest total loss.

    One multiplier for all linears is found by bisection; the rest of the bound goes to candidates
    that no multiplier reaches, those off the lower convex hull of (cost, loss), the largest
    decrease of loss per cost first, as long as one fits. So at most ``1 - ratio`` of the last
    costs is spent, and the rest is too little for the next candidate of any linear that would lower
    its loss. The total loss exceeds the optimum by less than one edge of one hull, and while the
    floors fit, a lower ratio never has a larger loss. A candidate whose loss is no smaller than the
    one before is never chosen. RecipeError where even place 0 everywhere costs too much.

    Holds 8 bytes a candidate in addition to the curves.

    Parameters
    ----------
    curves : with losses in one unit, since they are compared across linears
    floor : float
        Share of its last cost, rounded down to a candidate, that every linear keeps. Where the
        floors together do not fit, the share of :func:`even_choices` replaces it.
    """
    costs = [curve.costs for curve in curves]
    allowed, share = _largest_share(costs, ratio)
    floors = _places_at(costs, min(floor, share))
    above = [curve.from_place(place) for curve, place in zip(curves, floors, strict=True)]
    places = _fill(above, _places_that_fit(above, allowed), allowed)
    return [floor + place for floor, place in zip(floors, places, strict=True)]


def _places_that_fit(curves: Sequence[Curve], allowed: int) -> list[int]:
    """Places on the hulls at the lowest price at which the total cost is at most ``allowed``.

    ``_fill`` alone would arrive at the same places, one vertex at a time. The price is bisected by
    its logarithm, because spectra span many orders of magnitude. At the highest price, the largest
    loss for a cost of 1, nothing beyond place 0 is worth it.
    """
    top = max((float(curve.losses[0]) for curve in curves), default=0.0)
    places = [0] * len(curves)
    low, high = -300.0, 0.0  # log2 of price / highest price
    for _ in range(60):  # to the last bit of a double
        middle = (low + high) / 2
        cheapest = [curve.cheapest(top * 2**middle) for curve in curves]
        if _cost_of(curves, cheapest) <= allowed:
            places, high = cheapest, middle
        else:
            low = middle
    return places


def _fill(curves: Sequence[Curve], places: Sequence[int], allowed: int) -> list[int]:
    """``places``, advanced by the best step in any curve again and again, while one fits.

    A curve's best step can only get worse as ``spare`` shrinks, so it is computed anew only when
    its turn comes.
    """
    places = list(places)
    spare = allowed - _cost_of(curves, places)
    waiting = [(-math.inf, number, place) for number, place in enumerate(places)]
    while waiting:
        _, number, place = heapq.heappop(waiting)
        curve = curves[number]
        step = curve.cost(place) - curve.cost(places[number])
        if step <= spare:
            places[number] = place
            spare -= step
        best = curve.best_step(places[number], spare)
        if best is not None:
            heapq.heappush(waiting, (-best[0], number, best[1]))
    return places


def _cost_of(curves: Sequence[Curve], places: Sequence[int]) -> int:
    return _spent([curve.costs for curve in curves], places)


def _spent(costs: Sequence[Tensor], places: Sequence[int]) -> int:
    return sum(int(each[place]) for each, place in zip(costs, places, strict=True))


def _largest_share(costs: Sequence[Tensor], ratio: float) -> tuple[int, float]:
    """The total cost allowed, and the largest share of its last cost that each linear can have.

    The share is found by bisection. RecipeError where none fits.
    """
    kinds = Counter(map(id, costs))  # linears of one shape have one tensor
    by_id = {id(each): each for each in costs}
    distinct, counts = [by_id[kind] for kind in kinds], list(kinds.values())

    def spent(share: float) -> int:
        places = _places_at(distinct, share)
        pairs = zip(distinct, places, counts, strict=True)
        return sum(int(each[place]) * count for each, place, count in pairs)

    total = sum(int(each[-1]) for each in costs)
    allowed = math.floor((1 - ratio) * total)
    low, high = 0.0, 1.0
    for _ in range(60):  # halves the share's error each time, to the last bit of a double
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) <= allowed else (low, middle)
    smallest = spent(low)
    if smallest > allowed:
        raise RecipeError(
            f"ratio {ratio:g} cannot be reached: rank 1 everywhere removes "
            f"{1 - smallest / total:.4f} of the parameters"
        )
    return allowed, low


def _places_at(costs: Sequence[Tensor], share: float) -> list[int]:
    """The last place, except dense, that costs at most ``share`` of the last cost; at least 0."""
    return [
        max(0, int(torch.searchsorted(each[:-1], share * float(each[-1]), right=True)) - 1)
        for each in costs
    ]
