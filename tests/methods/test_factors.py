from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from streamcomp.errors import RecipeError
from streamcomp.linalg.allocation import stored_numbers
from streamcomp.linalg.low_rank import FIRST_DAMPING, GRADIENT_DAMPING, damped_outputs
from streamcomp.methods import METHODS, GradientMoment, Moment, factor_tensors, find_method
from streamcomp.forms.runtime import FORMS

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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 11])
def test_the_factors_multiply_out_to_the_projected_weight(
    form: str, shape: tuple[int, int], rank: int, random: Generator
) -> None:
    weight, basis = problem(shape, rank, random)

    tensors = factor_tensors(form, basis.clone(), basis.T @ weight, torch.float64)

    assert torch.allclose(product(form, tensors), basis @ (basis.T @ weight), atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_runtime_modules_hold_the_same_matrix(
    form: str, shape: tuple[int, int], random: Generator
) -> None:
    weight, basis = problem(shape, 7, random)
    module = FORMS[form](shape[1], shape[0], 7, dtype=torch.float64).requires_grad_(False)

    module.load_state_dict(factor_tensors(form, basis.clone(), basis.T @ weight, torch.float64))

    assert torch.allclose(module.dense_weight(), basis @ (basis.T @ weight), atol=1e-12)


def test_both_forms_are_one_matrix(random: Generator) -> None:
    weight, basis = problem((20, 12), 7, random)

    uv, pivot = (
        product(f, factor_tensors(f, basis.clone(), basis.T @ weight, torch.float64)) for f in FORMS
    )

    assert torch.allclose(uv, pivot, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_factors_come_as_close_as_their_dtype_allows(
    form: str, dtype: torch.dtype, random: Generator
) -> None:
    weight, basis = problem((20, 12), 7, random)

    tensors = factor_tensors(form, basis.clone(), basis.T @ weight.to(dtype).double(), dtype)

    wide = {name: t if t.dtype == torch.int32 else t.double() for name, t in tensors.items()}
    wanted = basis @ (basis.T @ weight)
    assert all(t.dtype == dtype for name, t in tensors.items() if name != "pivots")
    assert (product(form, wide) - wanted).norm() < 3 * torch.finfo(dtype).eps * wanted.norm()


def test_pivots_are_a_permutation(random: Generator) -> None:
    weight, basis = problem((20, 12), 7, random)

    pivots = factor_tensors("pivot", basis.clone(), basis.T @ weight, torch.float64)["pivots"]

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

    tensors = factor_tensors(form, basis.clone(), right.clone(), dtype)

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

    tensors = factor_tensors(form, basis.clone(), basis.T @ weight, torch.float16)

    floats = sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())
    assert floats == stored_numbers(form, *shape, rank)


def test_methods_are_found_by_the_name_they_carry() -> None:
    assert all(find_method(name).name == name for name in METHODS)
    with pytest.raises(RecipeError, match="'magic' unknown; one of: two-sided, svd-llm, rom, swsc"):
        find_method("magic")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_solved_in_fp32_are_as_close_as_those_in_fp64(
    form: str, dtype: torch.dtype, random: Generator
) -> None:
    weight, basis = problem((20, 12), 7, random)
    wanted = basis @ (basis.T @ weight)
    lost = []

    for solved in (torch.float32, torch.float64):
        tensors = factor_tensors(
            form, basis.to(solved, copy=True), (basis.T @ weight).to(solved), dtype
        )
        wide = {name: t if t.dtype == torch.int32 else t.double() for name, t in tensors.items()}
        lost.append(float((product(form, wide) - wanted).norm() / wanted.norm()))

    # What is stored has at most four digits: where fp32 rounds a few numbers to a neighbour, the
    # error moves by a part of itself.
    assert lost[0] < 1.1 * lost[1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_decomposition_outlives_the_factors_made_of_it(
    form: str, shape: tuple[int, int], random: Generator
) -> None:
    weight, inputs = problem(shape, 7, random)[0], problem(shape[::-1], 7, random)[0]
    found = find_method("svd-llm").decompose(  # type: ignore[union-attr]
        weight, Moment("inputs", inputs @ inputs.T), 0.1
    )
    before = torch.matmul(*found.factors(weight, 5))

    left, right = found.factors(weight, 5)
    factor_tensors(form, left, right, torch.float64)  # overwrites both

    assert torch.equal(torch.matmul(*found.factors(weight, 5)), before)


# -- moments of fewer rows than directions


@pytest.mark.parametrize("method", ["svd-llm", "two-sided"])
@pytest.mark.parametrize(
    ("dtype", "rows", "damped"),
    [(torch.float64, 0, False), (torch.float64, 12, False), (torch.float64, 11, True)]
    + [(torch.bfloat16, 12, False), (torch.bfloat16, 11, True)],
    ids=str,
)
@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_rows_too_few_for_the_directions_leave_them_to_the_weight(
    side: str, dtype: torch.dtype, rows: int, damped: bool, method: str, random: Generator
) -> None:
    """In no dtype, and on no side, does rounding order what the data says nothing of."""
    weight = problem((12, 20), 7, random)[0].to(dtype)
    inputs = torch.randn(20, rows or 40, dtype=torch.float64, generator=random)
    wide = weight.double()
    moment = inputs @ inputs.T
    value = moment if side == "inputs" else wide @ moment @ wide.T
    gradient = GradientMoment(torch.eye(12, dtype=torch.float64), 12.0)

    found = find_method(method).decompose(  # type: ignore[union-attr]
        weight,
        Moment(side, value, rows, gradient=gradient),  # type: ignore[arg-type]
        0.0,
    )

    outputs = wide @ moment @ wide.T
    if damped:
        outputs = damped_outputs(outputs, weight, FIRST_DAMPING)
    energies = torch.linalg.eigvalsh(outputs).flip(0)
    scale = 1.0 if method == "svd-llm" else 1 + GRADIENT_DAMPING
    # Seven digits of the moment's own: the twelfth direction has 1e-6 of the mean energy.
    assert torch.allclose(found.spectrum / scale, energies, rtol=1e-6, atol=1e-9 * energies[0])
