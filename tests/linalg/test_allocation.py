from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from streamcomp.errors import RecipeError
from streamcomp.forms import find_form
from streamcomp.linalg.allocation import Curve, even_choices, min_loss_choices

FORMS = ("uv", "pivot")
SIDES = (1, 2, 3, 8, 16, 32, 48, 64, 200)
BLOCK = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
Shape = tuple[int, int]
Ranks = list[int | None]


def stored_numbers(form: str, rows: int, columns: int, rank: int) -> int:
    return int(find_form(form)().numbers(rows, columns, rank))


def largest_rank(form: str, rows: int, columns: int, numbers: float) -> int:
    return find_form(form)().largest_rank(rows, columns, numbers)


def ranks_at(costs: list[Tensor], places: list[int]) -> Ranks:
    """The ranks at ``places``: from 1 on, and None for the last, which is dense."""
    pairs = zip(costs, places, strict=True)
    return [None if place == len(each) - 1 else place + 1 for each, place in pairs]


def uniform_ranks(shapes: list[Shape], ratio: float, form: str) -> Ranks:
    costs = [find_form(form)().costs(*shape) for shape in shapes]
    return ranks_at(costs, even_choices(costs, ratio))


def loss_ranks(
    spectra: list[Tensor], shapes: list[Shape], ratio: float, form: str, floor: float = 0.05
) -> Ranks:
    costs = [find_form(form)().costs(*shape) for shape in shapes]
    curves = [Curve.of_spectrum(*pair) for pair in zip(costs, spectra, strict=True)]
    return ranks_at(costs, min_loss_choices(curves, ratio, floor=floor))


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
    shapes = BLOCK * 4
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


# -- by loss


def spectra_of(shapes: list[Shape], seed: int) -> list[Tensor]:
    """Energies that decay at random rates, over three orders of magnitude between linears."""
    random = torch.Generator().manual_seed(seed)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=random, dtype=torch.float64)

    spectra = []
    for shape in shapes:
        ranks = torch.arange(1, min(shape) + 1, dtype=torch.float64)
        energies = 10 ** (3 * uniform(1)) * ranks ** (-2.5 * uniform(1)) * uniform(len(ranks))
        spectra.append(energies.sort(descending=True).values)
    return spectra


def loss(spectra: list[Tensor], ranks: Ranks) -> float:
    return sum(
        float(energies[rank:].sum())
        for energies, rank in zip(spectra, ranks, strict=True)
        if rank is not None
    )


def candidates(form: str, shapes: list[Shape]) -> list[Ranks]:
    return [[*range(1, largest_rank(form, *shape, math.inf) + 1), None] for shape in shapes]


def tiny(seed: int) -> tuple[list[Shape], list[Tensor]]:
    """Three linears, few enough ranks to try all combinations."""
    source = random.Random(seed)
    shapes = [(source.randint(3, 8), source.randint(3, 8)) for _ in range(3)]
    return shapes, spectra_of(shapes, seed)


def at_price(form: str, shapes: list[Shape], spectra: list[Tensor], price: float) -> Ranks:
    """What minimises loss + price * numbers, each linear by itself."""

    best: Ranks = []
    for shape, energies, ranks in zip(shapes, spectra, candidates(form, shapes), strict=True):
        costs = [loss([energies], [r]) + price * stored(form, [shape], [r]) for r in ranks]
        best.append(ranks[costs.index(min(costs))])
    return best


def prices(form: str, shapes: list[Shape], spectra: list[Tensor]) -> list[float]:
    """Decrease of loss per number between any two candidates of a linear, ascending."""
    found = set()
    for shape, energies, ranks in zip(shapes, spectra, candidates(form, shapes), strict=True):
        points = [(stored(form, [shape], [r]), loss([energies], [r])) for r in ranks]
        for (few, high), (many, low) in itertools.combinations(points, 2):
            found.add((high - low) / (many - few))
    return sorted(found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(8))
def test_what_a_multiplier_stores_is_spent_as_the_best_of_all_combinations(
    form: str, seed: int
) -> None:
    shapes, spectra = tiny(seed)
    total = sum(m * n for m, n in shapes)
    combinations = [
        (stored(form, shapes, list(ranks)), loss(spectra, list(ranks)))
        for ranks in itertools.product(*candidates(form, shapes))
    ]
    for price in prices(form, shapes, spectra)[::4]:
        allowed = stored(form, shapes, at_price(form, shapes, spectra, price * 1.001))
        optimum = min(lost for numbers, lost in combinations if numbers <= allowed)

        ranks = loss_ranks(spectra, shapes, 1 - (allowed + 0.5) / total, form, floor=0)

        assert loss(spectra, ranks) == pytest.approx(optimum, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ratio", [0.15, 0.3, 0.45])
def test_the_loss_is_within_one_edge_of_the_best_of_all_combinations(
    form: str, seed: int, ratio: float
) -> None:
    shapes, spectra = tiny(seed)
    allowed = math.floor((1 - ratio) * sum(m * n for m, n in shapes))
    fitting = [
        list(ranks)
        for ranks in itertools.product(*candidates(form, shapes))
        if stored(form, shapes, list(ranks)) <= allowed
    ]
    optimum = min(loss(spectra, ranks) for ranks in fitting)
    hulls = [at_price(form, shapes, spectra, p * 1.001) for p in prices(form, shapes, spectra)]
    best_on_hulls = next(ranks for ranks in hulls if stored(form, shapes, ranks) <= allowed)
    bounds = [  # Lagrangian: no allocation that fits loses less, whatever the price
        loss(spectra, ranks) + price * 1.001 * (stored(form, shapes, ranks) - allowed)
        for ranks, price in zip(hulls, prices(form, shapes, spectra), strict=True)
    ]

    found = loss(spectra, loss_ranks(spectra, shapes, ratio, form, floor=0))

    assert max(bounds) <= optimum * (1 + 1e-12)
    assert optimum * (1 - 1e-12) <= found <= loss(spectra, best_on_hulls) * (1 + 1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(20))
def test_the_loss_is_no_larger_than_at_uniform_ranks(form: str, seed: int) -> None:
    source = random.Random(seed)
    shapes = [(source.randint(8, 40), source.randint(8, 40)) for _ in range(12)]
    spectra = spectra_of(shapes, seed)
    for ratio in (0.1, 0.2, 0.4, 0.6):
        ours = loss(spectra, loss_ranks(spectra, shapes, ratio, form))

        assert ours <= loss(spectra, uniform_ranks(shapes, ratio, form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(20))
def test_a_lower_ratio_never_loses_more(form: str, seed: int) -> None:
    source = random.Random(seed)
    shapes = [(source.randint(2, 30), source.randint(2, 30)) for _ in range(seed % 4 + 1)]
    spectra = spectra_of(shapes, seed)
    ratios = [ratio / 100 for ratio in range(2, 60, 3)]
    ratios = [ratio for ratio in ratios if possible(shapes, ratio)]

    losses = [loss(spectra, loss_ranks(spectra, shapes, r, form, floor=0)) for r in ratios]

    assert all(low <= high * (1 + 1e-12) for low, high in itertools.pairwise(losses))


@pytest.mark.parametrize("form", FORMS)
def test_loss_ranks_never_store_more_than_the_ratio_allows(form: str) -> None:
    for seed, (shapes, ratio) in enumerate(lists_of_shapes(100, SIDES)):
        spectra = spectra_of(shapes, seed)
        ranks = loss_ranks(spectra, shapes, ratio, form)
        gap = math.floor((1 - ratio) * sum(m * n for m, n in shapes)) - stored(form, shapes, ranks)

        assert gap >= 0
        for shape, rank in zip(shapes, ranks, strict=True):
            if rank is not None:
                assert 1 <= rank <= largest_rank(form, *shape, math.inf)
            if rank is not None and rank < largest_rank(form, *shape, math.inf):
                step = stored_numbers(form, *shape, rank + 1) - stored_numbers(form, *shape, rank)
                assert gap < step, (shapes, ratio)  # no rank more would fit


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.4, 0.6])
def test_loss_ranks_reach_the_ratio_within_a_fifth_of_a_point(form: str, ratio: float) -> None:
    shapes = BLOCK * 4
    total = sum(m * n for m, n in shapes)

    ranks = loss_ranks(spectra_of(shapes, 0), shapes, ratio, form)

    assert 0 <= 1 - stored(form, shapes, ranks) / total - ratio <= 0.002


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("unit", [1e-200, 3e-7, 1e9, 1e200])
def test_the_unit_of_the_energies_does_not_matter(form: str, unit: float) -> None:
    spectra = spectra_of(BLOCK, 0)

    scaled = loss_ranks([unit * energies for energies in spectra], BLOCK, 0.3, form)

    assert scaled == loss_ranks(spectra, BLOCK, 0.3, form)


@pytest.mark.parametrize("form", FORMS)
def test_a_linear_whose_every_energy_is_dear_stays_dense(form: str) -> None:
    spectra = spectra_of(BLOCK, 0)
    spectra[4] = 1e9 + spectra[4]

    ranks = loss_ranks(spectra, BLOCK, 0.3, form)

    assert ranks[4] is None
    assert any(rank is not None for rank in ranks)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("floor", [0.02, 0.1, 0.5])
def test_no_linear_goes_below_its_floor(form: str, floor: float) -> None:
    spectra = spectra_of(BLOCK, 0)
    spectra[0] *= 1e-9

    ranks = loss_ranks(spectra, BLOCK, 0.3, form, floor=floor)

    least = [largest_rank(form, m, n, floor * m * n) for m, n in BLOCK]
    assert ranks[0] in (least[0], least[0] + 1)  # what is left over may buy a rank
    assert all(rank is None or rank >= low for rank, low in zip(ranks, least, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_floors_that_do_not_fit_become_uniform_ranks(form: str) -> None:
    shapes = [(64, 64)] * 8
    spectra = spectra_of(shapes, 0)

    ranks = loss_ranks(spectra, shapes, 0.9, form, floor=0.5)

    uniform = [rank or 0 for rank in uniform_ranks(shapes, 0.9, form)]
    assert all((rank or 0) >= min(uniform) for rank in ranks)
    assert stored(form, shapes, ranks) <= 0.1 * 8 * 64 * 64


@pytest.mark.parametrize("form", FORMS)
def test_ranks_without_energy_are_not_bought(form: str) -> None:
    spectra = spectra_of(BLOCK, 0)
    spectra[0] = torch.zeros_like(spectra[0])
    spectra[4][40:] = 0
    short = [*spectra[:4], spectra[4][:40], *spectra[5:]]  # its zeros left away

    ranks = loss_ranks(spectra, BLOCK, 0.3, form)

    assert ranks[0] == largest_rank(form, *BLOCK[0], 0.05 * 576 * 576)
    assert ranks[4] is not None and ranks[4] <= max(
        40, largest_rank(form, *BLOCK[4], 0.05 * 1536 * 576)
    )
    assert loss_ranks(short, BLOCK, 0.3, form) == ranks


@pytest.mark.parametrize("form", FORMS)
def test_a_model_without_any_energy_is_left_at_its_floors(form: str) -> None:
    for spectra in ([torch.zeros(576, dtype=torch.float64)], [torch.zeros(0)]):
        ranks = loss_ranks(spectra, [(576, 576)], 0.2, form)

        assert ranks == [largest_rank(form, 576, 576, 0.05 * 576 * 576)]


def test_what_is_left_over_goes_where_it_saves_most_per_number() -> None:
    shapes = [(20, 20), (8, 8), (5, 5), (5, 5)]  # a rank costs 40, 16, 10 and 10 numbers
    energies = [[200.0] * 20, [100.0, 12.0], [100.0, 10.0], [100.0, 10.0]]
    spectra = [torch.tensor(values, dtype=torch.float64) for values in energies]
    allowed = stored("uv", shapes, [1, 1, 1, 1]) + 20

    ranks = loss_ranks(spectra, shapes, 1 - (allowed + 0.5) / 514, "uv", floor=0)

    assert ranks == [1, 1, 2, 2]


@pytest.mark.parametrize("form", FORMS)
def test_a_single_linear_gets_the_largest_rank_that_fits(form: str) -> None:
    for seed, ratio in enumerate((0.1, 0.35, 0.6)):
        shapes = [(48, 64)]

        ranks = loss_ranks(spectra_of(shapes, seed), shapes, ratio, form)

        assert ranks == uniform_ranks(shapes, ratio, form)


@pytest.mark.parametrize("form", FORMS)
def test_a_linear_that_cannot_shrink_stays_dense_whatever_its_loss(form: str) -> None:
    shapes = [(1, 500), (64, 64), (64, 64)]
    spectra = [torch.zeros(1, dtype=torch.float64), *spectra_of(shapes[1:], 0)]

    ranks = loss_ranks(spectra, shapes, 0.3, form)

    assert ranks[0] is None
    assert stored(form, shapes, ranks) <= 0.7 * (500 + 2 * 64 * 64)


def test_loss_ranks_refuse_a_ratio_that_rank_one_everywhere_does_not_reach() -> None:
    with pytest.raises(RecipeError, match=r"rank 1 everywhere removes 0\.7500"):
        loss_ranks([torch.ones(8, dtype=torch.float64)], [(8, 8)], 0.8, "uv")
