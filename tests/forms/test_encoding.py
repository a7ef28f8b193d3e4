from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from streamcomp.forms import find_form
from streamcomp.forms.runtime import MODULES

FORMS = ("uv", "pivot")
SHAPES = [(12, 20), (20, 12), (16, 16)]


def problem(shape: tuple[int, int], rank: int, random: Generator) -> tuple[Tensor, Tensor]:
    weight = torch.randn(*shape, dtype=torch.float64, generator=random)
    noise = torch.randn(shape[0], rank, dtype=torch.float64, generator=random)
    return weight, torch.linalg.qr(noise).Q


def product(form: str, tensors: dict[str, Tensor]) -> Tensor:
    """W' by the definition of the form, without the modules."""
    if form == "uv":
        return tensors["U"] @ tensors["weight"]
    rows = torch.cat((tensors["weight"], tensors["coef"] @ tensors["weight"]))
    return torch.stack([rows[place] for place in tensors["pivots"].tolist()])


def encoded(form: str, left: Tensor, right: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    return find_form(form)().encode(left, right, dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 11])
def test_the_factors_multiply_out_to_the_projected_weight(
    form: str, shape: tuple[int, int], rank: int, random: Generator
) -> None:
    weight, basis = problem(shape, rank, random)

    tensors = encoded(form, basis.clone(), basis.T @ weight, torch.float64)

    assert torch.allclose(product(form, tensors), basis @ (basis.T @ weight), atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_runtime_modules_hold_the_same_matrix(
    form: str, shape: tuple[int, int], random: Generator
) -> None:
    weight, basis = problem(shape, 7, random)
    module = MODULES[form](shape[1], shape[0], 7, dtype=torch.float64).requires_grad_(False)

    module.load_state_dict(encoded(form, basis.clone(), basis.T @ weight, torch.float64))

    assert torch.allclose(module.dense_weight(), basis @ (basis.T @ weight), atol=1e-12)


def test_both_forms_are_one_matrix(random: Generator) -> None:
    weight, basis = problem((20, 12), 7, random)

    uv, pivot = (
        product(f, encoded(f, basis.clone(), basis.T @ weight, torch.float64)) for f in FORMS
    )

    assert torch.allclose(uv, pivot, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_factors_come_as_close_as_their_dtype_allows(
    form: str, dtype: torch.dtype, random: Generator
) -> None:
    weight, basis = problem((20, 12), 7, random)

    tensors = encoded(
        form,
        basis.clone(),
        basis.T @ weight.to(dtype).double(),
        dtype,
    )

    wide = {name: t if t.dtype == torch.int32 else t.double() for name, t in tensors.items()}
    wanted = basis @ (basis.T @ weight)
    assert all(t.dtype == dtype for name, t in tensors.items() if name != "pivots")
    assert (product(form, wide) - wanted).norm() < 3 * torch.finfo(dtype).eps * wanted.norm()


def test_pivots_are_a_permutation(random: Generator) -> None:
    weight, basis = problem((20, 12), 7, random)

    pivots = encoded("pivot", basis.clone(), basis.T @ weight, torch.float64)["pivots"]

    assert pivots.dtype == torch.int32
    assert sorted(pivots.tolist()) == list(range(20))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [slice(0, 7), slice(0, 1), slice(3, 5), slice(6, 7)])
def test_columns_of_zeros_in_the_left_factor_are_survived(
    columns: slice, form: str, dtype: torch.dtype, random: Generator
) -> None:
    """So are weights of zeros, and ranks above that of the weight, decomposed."""
    weight, basis = problem((20, 12), 7, random)
    right = basis.T @ weight
    basis[:, columns] = 0

    tensors = encoded(form, basis.clone(), right.clone(), dtype)

    wide = {name: t if t.dtype == torch.int32 else t.double() for name, t in tensors.items()}
    wanted = basis @ right
    assert (product(form, wide) - wanted).norm() <= 10 * torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 11])
def test_as_many_floats_are_stored_as_the_allocation_counts(
    form: str, shape: tuple[int, int], rank: int, random: Generator
) -> None:
    weight, basis = problem(shape, rank, random)

    tensors = encoded(form, basis.clone(), basis.T @ weight, torch.float16)

    floats = sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())
    assert floats == find_form(form)().numbers(*shape, rank)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_solved_in_fp32_are_as_close_as_those_in_fp64(
    form: str, dtype: torch.dtype, random: Generator
) -> None:
    weight, basis = problem((20, 12), 7, random)
    wanted = basis @ (basis.T @ weight)
    lost = []

    for solved in (torch.float32, torch.float64):
        tensors = encoded(
            form,
            basis.to(solved, copy=True),
            (basis.T @ weight).to(solved),
            dtype,
        )
        wide = {name: t if t.dtype == torch.int32 else t.double() for name, t in tensors.items()}
        lost.append(float((product(form, wide) - wanted).norm() / wanted.norm()))

    # What is stored has at most four digits: where fp32 rounds a few numbers to a neighbour, the
    # error moves by a part of itself.
    assert lost[0] < 1.1 * lost[1]
