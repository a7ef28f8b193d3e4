from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from streamcomp.linalg import low_rank
from streamcomp.linalg.low_rank import (
    Decomposition,
    decompose_inputs,
    decompose_outputs,
    fit_left,
    output_moment,
)

WIDE, TALL, SQUARE = (12, 20), (20, 12), (16, 16)
SHAPES = [WIDE, TALL, SQUARE]


def normal(*shape: int, random: Generator) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=random)


def orthonormality(basis: Tensor) -> float:
    """How far B^T B is from the identity."""
    return float((basis.T @ basis - torch.eye(basis.shape[1], dtype=basis.dtype)).abs().max())


def basis_of(weight: Tensor, result: Decomposition, rank: int) -> Tensor:
    """The left factor, which one-sided is an orthonormal basis of output directions."""
    return result.factors(weight, rank)[0]


def cut(weight: Tensor, result: Decomposition, rank: int) -> Tensor:
    """W' = B B^T W."""
    left, right = result.factors(weight, rank)
    assert torch.allclose(right, left.T @ weight.double(), rtol=1e-9, atol=1e-12)
    return left @ right


@pytest.mark.parametrize("shape", SHAPES)
def test_regular_moments_are_not_damped(shape: tuple[int, int], random: Generator) -> None:
    weight, inputs = normal(*shape, random=random), normal(shape[1], 90, random=random)

    assert decompose_inputs(weight, inputs @ inputs.T).damping == 0.0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_singular_moment_is_damped_and_says_so(shape: tuple[int, int], random: Generator) -> None:
    weight, inputs = normal(*shape, random=random), normal(shape[1], 4, random=random)

    result = decompose_inputs(weight, inputs @ inputs.T)  # four tokens: rank 4

    assert 0 < result.damping <= low_rank.MOST_DAMPING
    wanted = weight @ inputs
    assert (cut(weight, result, 4) @ inputs - wanted).norm() < 1e-2 * wanted.norm()
    assert result.relative_loss(4) < 1e-4
    assert orthonormality(basis_of(weight, result, min(shape))) < 1e-7


def test_damping_grows_until_the_moment_has_a_factor(random: Generator) -> None:
    weight = normal(*TALL, random=random)
    inputs = normal(TALL[1], 90, random=random)
    moment = inputs @ inputs.T
    # As accumulated in too narrow a dtype: one eigenvalue well below zero.
    moment -= 1e-3 * moment.diagonal().mean() * torch.eye(TALL[1], dtype=moment.dtype)
    least = torch.linalg.eigvalsh(moment)[0]
    vector = torch.linalg.eigh(moment).eigenvectors[:, :1]
    moment -= (least + 1e-3 * moment.diagonal().mean()) * vector @ vector.T

    result = decompose_inputs(weight, moment)

    assert result.damping == pytest.approx(1e-2)


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_that_are_always_zero_are_survived(
    shape: tuple[int, int], random: Generator
) -> None:
    weight = normal(*shape, random=random)

    result = decompose_inputs(weight, torch.zeros(shape[1], shape[1]))

    assert result.spectrum.isfinite().all()
    assert orthonormality(basis_of(weight, result, 5)) < 1e-7


@pytest.mark.parametrize(
    "shape",
    [
        WIDE,
        SQUARE,
        TALL,
    ],
)
def test_a_linear_that_puts_out_nothing_loses_nothing(
    shape: tuple[int, int], random: Generator
) -> None:
    weight = normal(*shape, random=random)

    assert decompose_inputs(weight, torch.zeros(shape[1], shape[1])).relative_loss(1) == 0.0


def test_a_weight_of_zeros_is_survived(random: Generator) -> None:
    for rows, columns in SHAPES:
        inputs = normal(columns, 90, random=random)
        weight = torch.zeros(rows, columns)

        result = decompose_inputs(weight, inputs @ inputs.T)

        assert result.relative_loss(1) == 0.0
        assert orthonormality(basis_of(weight, result, 3)) < 1e-7


@pytest.mark.parametrize("shape", SHAPES)
def test_the_basis_is_orthonormal_also_where_energies_are_tiny(
    shape: tuple[int, int], random: Generator
) -> None:
    rows, columns = shape
    weight = normal(rows, columns, random=random)
    weight *= torch.logspace(0, -11, columns, dtype=torch.float64)
    weight *= torch.logspace(0, -11, rows, dtype=torch.float64)[:, None]
    inputs = normal(columns, 90, random=random)

    result = decompose_inputs(weight, inputs @ inputs.T)

    assert result.spectrum[-1] < 1e-16 * result.spectrum[0]
    for rank in (1, 5, min(shape)):
        assert orthonormality(basis_of(weight, result, rank)) < 1e-7


@pytest.mark.parametrize("shape", SHAPES)
def test_the_basis_of_a_lower_rank_is_a_part_of_that_of_a_higher(
    shape: tuple[int, int], random: Generator
) -> None:
    weight, inputs = normal(*shape, random=random), normal(shape[1], 90, random=random)
    result = decompose_inputs(weight, inputs @ inputs.T)

    assert torch.allclose(
        basis_of(weight, result, 3), basis_of(weight, result, 9)[:, :3], atol=1e-10
    )


@pytest.mark.parametrize("at_once", [1, 7])
def test_a_weight_may_be_cast_in_parts(
    at_once: int, random: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, inputs = normal(*TALL, random=random).float(), normal(12, 90, random=random)
    moment = inputs @ inputs.T
    whole = basis_of(weight, decompose_inputs(weight, moment), 5)
    monkeypatch.setattr(low_rank, "ROWS_AT_ONCE", at_once)

    parts = basis_of(weight, decompose_inputs(weight, moment), 5)

    assert torch.allclose(parts @ parts.T, whole @ whole.T, atol=1e-10)


def test_narrow_weights_and_moments_are_decomposed_in_fp64(random: Generator) -> None:
    for shape in SHAPES:
        weight, inputs = normal(*shape, random=random), normal(shape[1], 90, random=random)
        result = decompose_inputs(weight.bfloat16(), (inputs @ inputs.T).float())

        assert result.spectrum.dtype == torch.float64
        assert basis_of(weight.bfloat16(), result, 3).dtype == torch.float64


def test_relative_loss_is_a_share_that_falls_with_rank(random: Generator) -> None:
    weight, inputs = normal(*WIDE, random=random), normal(20, 90, random=random)
    result = decompose_outputs(weight, output_moment(weight, inputs @ inputs.T))

    losses = [result.relative_loss(rank) for rank in range(13)]

    assert losses[0] == pytest.approx(1)
    assert losses[-1] == 0
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_left_factor_solves_the_normal_equations(dtype: torch.dtype, random: Generator) -> None:
    left, right = normal(9, 5, random=random), normal(5, 14, random=random)
    rounded = right.to(dtype).double()

    fitted = fit_left(left, right, right.to(dtype))

    residual = left @ right - fitted @ rounded
    assert (residual @ rounded.T).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_fitted_product_is_closer_than_a_rounded_one(
    dtype: torch.dtype, random: Generator
) -> None:
    left, right = normal(9, 5, random=random), normal(5, 14, random=random)
    rounded = right.to(dtype)

    fitted = fit_left(left, right, rounded)

    wanted = left @ right
    assert (wanted - fitted @ rounded.double()).norm() < (wanted - left @ rounded.double()).norm()


def test_the_left_factor_may_have_no_rows(random: Generator) -> None:
    right = normal(5, 14, random=random)

    assert fit_left(right.new_empty(0, 5), right, right.half()).shape == (0, 5)


def test_rows_that_rounding_made_dependent_still_give_the_best_left_factor(
    random: Generator,
) -> None:
    left, right = normal(9, 5, random=random), normal(5, 14, random=random)
    right[3] = 1e-30  # becomes zero in half precision
    rounded = right.half()
    assert not rounded[3].any()

    fitted = fit_left(left, right, rounded)

    assert fitted.isfinite().all()
    residual = left @ right - fitted @ rounded.double()
    assert (residual @ rounded.double().T).abs().max() < 1e-10
