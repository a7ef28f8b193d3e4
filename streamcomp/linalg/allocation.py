"""How many numbers a factored linear stores, and how ranks are shared among linears.

There are two ways to share them, under one bound on what all linears store together: the
same share for each, which needs the shapes alone, or the least loss, which needs the spectra.
The latter minimises sum_i loss_i(r_i) subject to sum_i numbers_i(r_i) <= (1 - ratio) total:
the ranks that minimise loss_i + lambda numbers_i, each linear by itself, are optimal for as
many numbers as they store (Everett, Operations Research 11, 1963: the main theorem).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamcomp.errors import NonFiniteError, RecipeError

__all__ = ["largest_rank", "loss_ranks", "stored_numbers", "uniform_ranks"]


def stored_numbers(form: str, rows: int, columns: int, rank: int) -> int:
    """Floats that a rows x columns linear of ``rank`` stores in ``form`` (``uv`` or ``pivot``)."""
    return rank * (rows + columns - (rank if form == "pivot" else 0))


def largest_rank(form: str, rows: int, columns: int, numbers: float) -> int:
    """The largest rank that stores at most ``numbers`` floats and less than the dense linear.

    0 if there is none.
    """
    side = rows + columns
    allowed = min(numbers, rows * columns - 1)
    if allowed < stored_numbers(form, rows, columns, 1):
        return 0
    if form == "uv":
        return int(allowed // side)
    rank = min(rows, columns, int((side - math.sqrt(side * side - 4 * allowed)) / 2) + 1)
    while stored_numbers(form, rows, columns, rank) > allowed:
        rank -= 1
    return rank


def uniform_ranks(shapes: Sequence[tuple[int, int]], ratio: float, form: str) -> list[int | None]:
    """One share of its numbers for every linear; ``None`` where it stays dense.

    A linear stays dense when no rank is smaller than its dense form, and its share is
    taken from the others, so that together at most ``1 - ratio`` of all numbers is stored,
    and the gap is less than one rank of the smallest linear. The share is found by
    bisection; what rounding leaves over is given out in single ranks, largest linear first,
    over and over. RecipeError where even rank 1 everywhere stores too much.
    """
    allowed, share = _largest_share(shapes, ratio, form)
    ranks = _ranks_at(form, shapes, share)
    spare = allowed - _stored(form, shapes, ranks)
    largest_first = sorted(range(len(shapes)), key=lambda i: -shapes[i][0] * shapes[i][1])
    given = True
    while given:
        given = False
        for place in largest_first:
            step = _next_step(form, shapes[place], ranks[place])
            if step is not None and step <= spare:
                ranks[place] = (ranks[place] or 0) + 1
                spare -= step
                given = True
    return ranks


def loss_ranks(
    spectra: Sequence[Tensor],
    shapes: Sequence[tuple[int, int]],
    ratio: float,
    form: str,
    *,
    floor: float = 0.05,
) -> list[int | None]:
    """The ranks of least total loss; ``None`` where a linear stays dense.

    The candidates of an m x n linear are its ranks, and dense, where the loss is 0. One
    multiplier for all linears is found by bisection; what is left over goes to candidates
    that no multiplier reaches, those off the lower convex hull of (numbers, loss), the
    largest decrease of loss per number first, as long as one fits. So at most ``1 - ratio``
    of all numbers is stored, and the gap is less than the next rank of any linear that would
    gain by it. The loss is above the least there is by less than one edge of one hull, and
    while the floors fit, a lower ratio never has the larger loss. RecipeError where even
    rank 1 everywhere stores too much.

    Holds 8 bytes a candidate beside the spectra: 37 MB for 560 linears of 8192 x 8192.

    Parameters
    ----------
    spectra : Tensors of shape (k,), k <= min(m, n), fp64, descending
        Energies of each linear, in one unit: they are compared across linears. The loss at
        rank r is the sum of those after the r-th. A rank without energy is never bought, so
        that more than ``ratio`` is removed where the spectra end early.
    floor : float
        Share of its numbers, rounded down to a rank but at least 1, that every linear keeps.
        Where the floors together do not fit, the share of ``uniform_ranks`` replaces it.
    """
    _check_finite(spectra, shapes)
    allowed, share = _largest_share(shapes, ratio, form)
    floors = _ranks_at(form, shapes, min(floor, share))
    numbers = {
        shape: _numbers_from(form, shape, least)
        for shape, least in zip(shapes, floors, strict=True)
    }
    curves = [
        _Curve(least, numbers[shape], _losses_from(energies, least, len(numbers[shape])))
        for energies, shape, least in zip(spectra, shapes, floors, strict=True)
    ]
    places = _fill(curves, _places_that_fit(curves, allowed), allowed)
    return [curve.rank(place) for curve, place in zip(curves, places, strict=True)]


@dataclass(frozen=True)
class _Curve:
    """The candidates of a linear, each known by its place: ranks from ``least`` on, then dense.

    Parameters
    ----------
    least : int or None
        Rank at place 0; None where there is only dense.
    numbers : Tensor of shape (candidates,), fp64, ascending
    losses : Tensor of shape (candidates,), fp64, descending to 0
    """

    least: int | None
    numbers: Tensor
    losses: Tensor

    def rank(self, place: int) -> int | None:
        if self.least is None or place == len(self.numbers) - 1:
            return None
        return self.least + place

    def stored(self, place: int) -> int:
        return int(self.numbers[place])

    def cheapest(self, price: float) -> int:
        """Place of the least loss + price * numbers, of equal ones the first.

        It is a vertex of the hull, and every vertex is found at some price.
        """
        return int(torch.add(self.losses, self.numbers, alpha=price).argmin())

    def best_step(self, place: int, spare: int) -> tuple[float, int] | None:
        """Decrease of loss per number, and place, of the best candidate that ``spare`` affords."""
        stop = int(torch.searchsorted(self.numbers, self.numbers[place] + spare, right=True))
        further = slice(place + 1, stop)
        gains = self.losses[place] - self.losses[further]
        if not bool((gains > 0).any()):
            return None
        gains /= self.numbers[further] - self.numbers[place]
        best = int(gains.argmax())
        return float(gains[best]), place + 1 + best


def _check_finite(spectra: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> None:
    for place, (energies, (rows, columns)) in enumerate(zip(spectra, shapes, strict=True)):
        if not bool(energies.sum().isfinite()):
            raise NonFiniteError(
                f"the energies of linear {place + 1} of {len(shapes)} ({rows} x {columns}) are "
                "NaN or infinite; is the dtype of the model too narrow?"
            )


def _numbers_from(form: str, shape: tuple[int, int], least: int | None) -> Tensor:
    """Numbers of every rank from ``least`` on, then of dense; whole, as all are below 2**53."""
    dense = torch.tensor([math.prod(shape)], dtype=torch.float64)
    if least is None:
        return dense
    ranks = torch.arange(least, largest_rank(form, *shape, math.inf) + 1, dtype=torch.float64)
    side = sum(shape) - (ranks if form == "pivot" else 0)
    return torch.cat((ranks * side, dense))


def _losses_from(energies: Tensor, least: int | None, candidates: int) -> Tensor:
    """Sum of the energies after every rank from ``least`` on; 0 past their end and for dense."""
    tails = energies.double().flip(0).cumsum(0).flip(0)  # smallest first: fewer digits are lost
    losses = torch.zeros(candidates, dtype=torch.float64)
    known = tails[least : (least or 0) + candidates - 1]
    losses[: len(known)] = known
    return losses


def _places_that_fit(curves: Sequence[_Curve], allowed: int) -> list[int]:
    """Places on the hulls at the lowest price at which all together store at most ``allowed``.

    ``_fill`` alone would come to the same, one vertex at a time. The price is bisected by its
    logarithm, because spectra span many orders of magnitude, and at the highest, the largest
    loss for a single number, nothing beyond place 0 is worth it.
    """
    top = max((float(curve.losses[0]) for curve in curves), default=0.0)
    places = [0] * len(curves)
    low, high = -300.0, 0.0  # log2 of the price over the highest
    for _ in range(60):  # to the last bit of a double
        middle = (low + high) / 2
        found = [curve.cheapest(top * 2**middle) for curve in curves]
        if _stored_at(curves, found) <= allowed:
            places, high = found, middle
        else:
            low = middle
    return places


def _fill(curves: Sequence[_Curve], places: Sequence[int], allowed: int) -> list[int]:
    """``places`` moved on by the best step there is in any curve, while one fits.

    A step found when more was spare is no worse than any that its curve affords now, so that
    it is looked for anew only when its turn comes.
    """
    places = list(places)
    spare = allowed - _stored_at(curves, places)
    waiting = [(-math.inf, number, place) for number, place in enumerate(places)]
    while waiting:
        _, number, place = heapq.heappop(waiting)
        curve = curves[number]
        step = curve.stored(place) - curve.stored(places[number])
        if step <= spare:
            places[number] = place
            spare -= step
        best = curve.best_step(places[number], spare)
        if best is not None:
            heapq.heappush(waiting, (-best[0], number, best[1]))
    return places


def _stored_at(curves: Sequence[_Curve], places: Sequence[int]) -> int:
    return sum(curve.stored(place) for curve, place in zip(curves, places, strict=True))


def _largest_share(shapes: Sequence[tuple[int, int]], ratio: float, form: str) -> tuple[int, float]:
    """Numbers that all linears may store together, and the share of its own for each of them.

    The share is the largest that fits, found by bisection. RecipeError where none does.
    """
    total = sum(rows * columns for rows, columns in shapes)
    allowed = math.floor((1 - ratio) * total)
    low, high = 0.0, 1.0
    for _ in range(60):  # halves the share's error each time, to the last bit of a double
        middle = (low + high) / 2
        fits = _stored(form, shapes, _ranks_at(form, shapes, middle)) <= allowed
        low, high = (middle, high) if fits else (low, middle)
    least = _stored(form, shapes, _ranks_at(form, shapes, low))
    if least > allowed:
        raise RecipeError(
            f"ratio {ratio:g} cannot be reached: rank 1 everywhere removes "
            f"{1 - least / total:.4f} of the parameters"
        )
    return allowed, low


def _next_step(form: str, shape: tuple[int, int], rank: int | None) -> int | None:
    """Numbers that one rank more costs; None where the linear cannot have it."""
    if rank is None or rank >= largest_rank(form, *shape, math.inf):
        return None
    return stored_numbers(form, *shape, rank + 1) - stored_numbers(form, *shape, rank)


def _ranks_at(form: str, shapes: Sequence[tuple[int, int]], share: float) -> list[int | None]:
    return [_rank_at(form, rows, columns, share) for rows, columns in shapes]


def _rank_at(form: str, rows: int, columns: int, share: float) -> int | None:
    """Rank of a linear that may store ``share`` of its numbers, at least 1; None = dense."""
    if largest_rank(form, rows, columns, math.inf) == 0:
        return None
    return max(1, largest_rank(form, rows, columns, share * rows * columns))


def _stored(form: str, shapes: Sequence[tuple[int, int]], ranks: Sequence[int | None]) -> int:
    return sum(
        rows * columns if rank is None else stored_numbers(form, rows, columns, rank)
        for (rows, columns), rank in zip(shapes, ranks, strict=True)
    )
