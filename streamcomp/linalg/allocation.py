"""How many numbers a factored linear stores, and how ranks are shared among linears."""

from __future__ import annotations

import math
from collections.abc import Sequence

from streamcomp.errors import RecipeError

__all__ = ["largest_rank", "stored_numbers", "uniform_ranks"]


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
    total = sum(rows * columns for rows, columns in shapes)
    allowed = math.floor((1 - ratio) * total)

    def ranks_at(share: float) -> list[int | None]:
        return [_rank_at(form, rows, columns, share) for rows, columns in shapes]

    def stored(ranks: Sequence[int | None]) -> int:
        return sum(_stored(form, shape, rank) for shape, rank in zip(shapes, ranks, strict=True))

    low, high = 0.0, 1.0
    for _ in range(60):  # halves the share's error each time, to the last bit of a double
        middle = (low + high) / 2
        low, high = (middle, high) if stored(ranks_at(middle)) <= allowed else (low, middle)
    ranks = ranks_at(low)
    spare = allowed - stored(ranks)
    if spare < 0:
        raise RecipeError(
            f"ratio {ratio:g} cannot be reached: rank 1 everywhere removes "
            f"{1 - stored(ranks) / total:.4f} of the parameters"
        )
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


def _next_step(form: str, shape: tuple[int, int], rank: int | None) -> int | None:
    """Numbers that one rank more costs; None where the linear cannot have it."""
    if rank is None or rank >= largest_rank(form, *shape, math.inf):
        return None
    return stored_numbers(form, *shape, rank + 1) - stored_numbers(form, *shape, rank)


def _rank_at(form: str, rows: int, columns: int, share: float) -> int | None:
    """Rank of a linear that may store ``share`` of its numbers, at least 1; None = dense."""
    if largest_rank(form, rows, columns, math.inf) == 0:
        return None
    return max(1, largest_rank(form, rows, columns, share * rows * columns))


def _stored(form: str, shape: tuple[int, int], rank: int | None) -> int:
    rows, columns = shape
    return rows * columns if rank is None else stored_numbers(form, rows, columns, rank)
