from __future__ import annotations

import math
import random

import pytest

from streamcomp.errors import RecipeError
from streamcomp.linalg.allocation import largest_rank, stored_numbers, uniform_ranks

FORMS = ("uv", "pivot")
SIDES = (1, 2, 3, 8, 16, 32, 48, 64, 200)
Shape = tuple[int, int]


def stored(form: str, shapes: list[Shape], ranks: list[int | None]) -> int:
    return sum(
        m * n if rank is None else stored_numbers(form, m, n, rank)
        for (m, n), rank in zip(shapes, ranks, strict=True)
    )


def lists_of_shapes(count: int, sides: tuple[int, ...]) -> list[tuple[list[Shape], float]]:
    """Random models with random ratios, the same ones every time."""
    source = random.Random(0)
    lists = [
        (
            [(source.choice(sides), source.choice(sides)) for _ in range(source.randint(1, 9))],
            source.uniform(0.02, 0.9),
        )
        for _ in range(count)
    ]
    return [(shapes, ratio) for shapes, ratio in lists if possible(shapes, ratio)]


def possible(shapes: list[Shape], ratio: float) -> bool:
    """Whether rank 1 everywhere is small enough, in either form."""
    allowed = math.floor((1 - ratio) * sum(m * n for m, n in shapes))
    least = [1 if largest_rank("uv", *shape, math.inf) else None for shape in shapes]
    return stored("uv", shapes, least) <= allowed


@pytest.mark.parametrize(("rows", "columns", "rank"), [(7, 5, 3), (5, 7, 1), (6, 6, 5), (1, 4, 1)])
def test_stored_numbers_counts_the_factors(rows: int, columns: int, rank: int) -> None:
    uv = rows * rank + rank * columns
    pivot = rank * columns + (rows - rank) * rank

    assert stored_numbers("uv", rows, columns, rank) == uv
    assert stored_numbers("pivot", rows, columns, rank) == pivot


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [1, 2, 3, 7, 24])
@pytest.mark.parametrize("rows", [1, 2, 5, 24, 31])
def test_the_largest_rank_is_that_of_trying_all(form: str, rows: int, columns: int) -> None:
    for numbers in [*range(rows * columns + 3), math.inf]:
        fitting = [
            rank
            for rank in range(1, min(rows, columns) + 1)
            if stored_numbers(form, rows, columns, rank) <= numbers
            and stored_numbers(form, rows, columns, rank) < rows * columns
        ]

        assert largest_rank(form, rows, columns, numbers) == max(fitting, default=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(28672, 8192), (8192, 28672), (131072, 16384), (16384, 16384)])
def test_the_largest_rank_is_exact_for_large_linears(form: str, shape: Shape) -> None:
    for rank in (1, 1000, 4095):
        exactly = stored_numbers(form, *shape, rank)

        assert largest_rank(form, *shape, exactly) == rank
        assert largest_rank(form, *shape, exactly - 1) == rank - 1


@pytest.mark.parametrize("form", FORMS)
def test_uniform_ranks_never_store_more_than_the_ratio_allows(form: str) -> None:
    for shapes, ratio in lists_of_shapes(400, SIDES):
        ranks = uniform_ranks(shapes, ratio, form)
        allowed = math.floor((1 - ratio) * sum(m * n for m, n in shapes))

        assert stored(form, shapes, ranks) <= allowed


def test_a_ratio_that_rank_one_everywhere_does_not_reach_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"rank 1 everywhere removes 0\.7500"):
        uniform_ranks([(8, 8)], 0.8, "uv")


@pytest.mark.parametrize("form", FORMS)
def test_uniform_ranks_leave_less_than_any_linear_could_still_take(form: str) -> None:
    for shapes, ratio in lists_of_shapes(400, SIDES[3:]):
        ranks = uniform_ranks(shapes, ratio, form)
        gap = math.floor((1 - ratio) * sum(m * n for m, n in shapes)) - stored(form, shapes, ranks)

        for shape, rank in zip(shapes, ranks, strict=True):
            if rank is not None and rank < largest_rank(form, *shape, math.inf):
                step = stored_numbers(form, *shape, rank + 1) - stored_numbers(form, *shape, rank)
                assert gap < step, (shapes, ratio)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.4, 0.6])
def test_the_ratio_of_a_model_is_reached_within_a_fifth_of_a_point(form: str, ratio: float) -> None:
    block = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    shapes = block * 4
    total = sum(m * n for m, n in shapes)

    ranks = uniform_ranks(shapes, ratio, form)

    assert 0 <= 1 - stored(form, shapes, ranks) / total - ratio <= 0.002


@pytest.mark.parametrize("form", FORMS)
def test_every_rank_is_at_least_one_and_smaller_than_dense(form: str) -> None:
    for shapes, ratio in lists_of_shapes(400, SIDES):
        for (m, n), rank in zip(shapes, uniform_ranks(shapes, ratio, form), strict=True):
            if rank is not None:
                assert rank >= 1
                assert stored_numbers(form, m, n, rank) < m * n


@pytest.mark.parametrize("form", FORMS)
def test_linears_of_one_shape_differ_by_one_rank_at_most(form: str) -> None:
    for shapes, ratio in lists_of_shapes(400, SIDES):
        ranks = uniform_ranks(shapes, ratio, form)
        for shape in set(shapes):
            same = [r for s, r in zip(shapes, ranks, strict=True) if s == shape and r is not None]
            assert not same or max(same) - min(same) <= 1


@pytest.mark.parametrize("form", FORMS)
def test_linears_that_cannot_shrink_stay_dense_and_the_others_pay(form: str) -> None:
    row, square = (1, 500), (64, 64)  # a single row has no smaller form

    alone = uniform_ranks([square], 0.3, form)
    beside = uniform_ranks([row, square], 0.3, form)

    assert beside[0] is None
    assert alone[0] is not None and beside[1] is not None
    assert beside[1] < alone[0]
    assert stored(form, [row, square], beside) <= 0.7 * (500 + 64 * 64)


def test_the_pivot_form_affords_higher_ranks() -> None:
    (uv,), (pivot,) = (uniform_ranks([(1000, 1000)], 0.2, form) for form in FORMS)

    assert uv == 400  # 0.40 n
    assert pivot == 552  # 0.55 n
