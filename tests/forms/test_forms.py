from __future__ import annotations

import math

import pytest
import torch

from streamcomp.errors import NonFiniteError, RecipeError
from streamcomp.forms import FORMS, Allowance, Floats, Form, find_form
from streamcomp.forms.runtime import MODULES
from streamcomp.recipe import FORMS as OF_RECIPE
from tests.methods.sites import Place

PRODUCTS = [name for name, form in FORMS.items() if form.is_product]
F64 = torch.float64


def test_forms_are_found_by_the_name_they_carry() -> None:
    assert all(find_form(name).name == name for name in FORMS)
    assert set(OF_RECIPE) == set(FORMS) == set(MODULES)
    with pytest.raises(RecipeError, match="form 'cube' unknown; one of: pivot, uv, shared"):
        find_form("cube")


@pytest.mark.parametrize("kind", FORMS.values(), ids=FORMS)
def test_a_form_says_what_its_module_holds(kind: type[Form]) -> None:
    form = kind()
    spec = {"clusters": 2, "axis": "rows"} if form.module.keys else {}
    module = form.module(20, 12, 3, **form.module.options(spec, 12, 20))

    assert form.module.form == form.name
    assert set(form.tensors) == set(module.tensors())
    assert set(form.shapes(12, 20, 3)) <= set(form.tensors)
    for name, shape in form.shapes(12, 20, 3).items():
        assert module.tensors()[name].shape == shape
    assert module.tensors()[form.rows_tensor].shape[0] == 12


@pytest.mark.parametrize(("rows", "columns", "rank"), [(7, 5, 3), (5, 7, 1), (6, 6, 5), (1, 4, 1)])
def test_numbers_are_those_of_the_matrices(rows: int, columns: int, rank: int) -> None:
    uv = rows * rank + rank * columns
    pivot = rank * columns + (rows - rank) * rank

    assert find_form("uv")().numbers(rows, columns, rank) == uv
    assert find_form("pivot")().numbers(rows, columns, rank) == pivot


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("columns", [1, 2, 3, 7, 24])
@pytest.mark.parametrize("rows", [1, 2, 5, 24, 31])
def test_the_largest_rank_is_that_of_trying_all(name: str, rows: int, columns: int) -> None:
    form, dense = find_form(name)(), rows * columns
    for numbers in [*range(dense + 3), math.inf]:
        fitting = [
            rank
            for rank in range(1, min(rows, columns) + 1)
            if form.numbers(rows, columns, rank) <= numbers
            and form.numbers(rows, columns, rank) < dense
        ]

        assert form.largest_rank(rows, columns, numbers) == max(fitting, default=0)
    assert form.can_hold(rows, columns) == (len(form.costs(rows, columns)) > 1)
    assert form.costs(rows, columns)[-1] == dense


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("shape", [(28672, 8192), (8192, 28672), (131072, 16384), (16384, 16384)])
def test_the_largest_rank_is_exact_for_large_linears(name: str, shape: tuple[int, int]) -> None:
    form = find_form(name)()
    for rank in (1, 1000, 4095):
        exactly = form.numbers(*shape, rank)

        assert form.largest_rank(*shape, exactly) == rank
        assert form.largest_rank(*shape, exactly - 1) == rank - 1


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_tensors(name: str, dtype: torch.dtype) -> None:
    form = find_form(name)()
    left, right = torch.randn(12, 5, dtype=F64), torch.randn(5, 20, dtype=F64)

    tensors = form.encode(left, right, dtype)

    assert tuple(tensors) == form.tensors
    allowance = Allowance(5, form.numbers(12, 20, 5))
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert nbytes == form.nbytes(12, 20, allowance, dtype)


@pytest.mark.parametrize("name", PRODUCTS)
def test_ranks_by_loss_follow_the_energies(name: str) -> None:
    form, places = find_form(name)(), [Place(32, 24), Place(32, 24), Place(1, 40)]
    flat, steep = torch.ones(24, dtype=F64), torch.logspace(2, -8, 24, dtype=F64)

    kept = form.share_by_loss(places, [100 * flat, steep, flat[:1]], 0.3)
    even = form.share_evenly(places, 0.3)

    assert kept[2] is None and even[2] is None
    assert even[0] and even[1] and kept[1] and kept[1].rank < even[1].rank
    assert kept[0] is None or kept[0].rank > even[0].rank
    assert kept[1].numbers == form.numbers(32, 24, kept[1].rank)


@pytest.mark.parametrize("energy", [math.nan, math.inf])
def test_energies_that_are_not_finite_are_refused(energy: float) -> None:
    spectra = [torch.ones(8, dtype=F64), torch.tensor([energy, 1.0])]

    with pytest.raises(NonFiniteError, match=r"of linear \(9 x 8\) are NaN or infinite"):
        find_form("uv")().share_by_loss([Place(8, 9), Place(9, 8)], spectra, 0.2)


def test_a_storage_of_floats_gives_back_what_it_rounded() -> None:
    matrix, storage = torch.randn(4, 6, dtype=F64), Floats(torch.bfloat16)

    tensors = storage.encode("weight", matrix)

    assert storage.nbytes(4, 6) == 48
    assert torch.equal(storage.decode("weight", tensors), matrix.bfloat16())


def test_numbers_that_are_no_floats_have_no_storage() -> None:
    with pytest.raises(RecipeError, match=r"no storage for numbers of torch\.int8"):
        Floats(torch.int8)
