from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from streamcomp.linalg import fitting, low_rank, symmetric
from streamcomp.linalg.fitting import fit_left
from streamcomp.linalg.low_rank import (
    Decomposition,
    damped_outputs,
    decompose_inputs,
    decompose_outputs,
    decompose_two_sided_inputs,
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
    """The left factor: an orthonormal basis of output directions, or for m > n W L V."""
    return result.factors(weight, rank)[0]


def unfit(weight: Tensor, result: Decomposition, rank: int) -> float:
    """How far B^T B is from the identity, or (W L V)^T W L V from the energies, of the largest."""
    basis = basis_of(weight, result, rank)
    if result.right is None:
        return orthonormality(basis)
    energies = result.spectrum[:rank]
    return float((basis.T @ basis - energies.diag()).abs().max() / energies.max())


def cut(weight: Tensor, result: Decomposition, rank: int) -> Tensor:
    """W' = B B^T W: B is the left factor, or for m > n that with its columns made of length 1."""
    left, right = result.factors(weight, rank)
    basis = left / left.norm(dim=0)
    assert torch.allclose(left @ right, basis @ (basis.T @ weight.double()), rtol=1e-9, atol=1e-9)
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
    assert unfit(weight, result, min(shape)) < 1e-7


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
    if result.right is None:
        assert orthonormality(basis_of(weight, result, 5)) < 1e-7
    else:  # all inputs count alike
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        best = (left[:, :5] * values[:5]) @ right[:5]
        assert torch.allclose(cut(weight, result, 5), best, atol=1e-10)


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
        left, right = result.factors(weight, 3)
        assert right.isfinite().all() and not (left @ right).any()
        if result.right is None:
            assert orthonormality(left) < 1e-7


@pytest.mark.parametrize("shape", SHAPES)
def test_the_basis_is_orthogonal_also_where_energies_are_tiny(
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
        assert unfit(weight, result, rank) < (1e-7 if result.right is None else 1e-13)
        left, right = result.factors(weight, rank)
        lost = float(((weight - left @ right) @ inputs).square().sum())
        assert lost == pytest.approx(
            float(result.spectrum[rank:].sum()),
            rel=1e-7 + result.damping,  # whose share the energies hold, and the loss does not
            abs=1e-12 * float(result.spectrum[0]),
        )
    assert (weight - left @ right).norm() < 1e-12 * weight.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_basis_of_a_lower_rank_is_a_part_of_that_of_a_higher(
    shape: tuple[int, int], random: Generator
) -> None:
    weight, inputs = normal(*shape, random=random), normal(shape[1], 90, random=random)
    result = decompose_inputs(weight, inputs @ inputs.T)

    assert torch.allclose(
        basis_of(weight, result, 3), basis_of(weight, result, 9)[:, :3], atol=1e-10
    )


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("rank", [1, 1000, 1024, 1025])
def test_up_to_a_rank_the_factors_are_those_of_every_rank(
    rank: int, two_sided: bool, random: Generator
) -> None:
    """Bit for bit, so that one ratio alone gives what it gives among several."""
    weight = normal(1300, 1200, random=random).bfloat16()
    rows = normal(2000, 1200, random=random)
    moment = rows.T @ rows

    def decompose(rank: int | None) -> Decomposition:
        if two_sided:
            return decompose_two_sided_inputs(weight, moment, moment.flip(0, 1), 1e3, rank=rank)
        return decompose_inputs(weight, moment, rank=rank)

    whole, part = decompose(None), decompose(rank)

    assert part.left.shape[1] == min(1200, -(-rank // 512) * 512)
    assert torch.equal(part.spectrum, whole.spectrum)
    for found, expected in zip(
        part.factors(weight, rank), whole.factors(weight, rank), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("two_sided", [False, True])
def test_a_damping_that_is_known_is_not_looked_for(
    two_sided: bool, random: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, rows = normal(*TALL, random=random), normal(4, TALL[1], random=random)
    moment, tried = rows.T @ rows, list[float]()
    factor = low_rank.cholesky  # type: ignore[attr-defined]

    def counted(moment: Tensor, added: float) -> Tensor | None:
        tried.append(added)
        return factor(moment, added)

    def decompose(least: float) -> Decomposition:
        tried.clear()
        if two_sided:
            whole = torch.eye(TALL[1], dtype=torch.float64)
            return decompose_two_sided_inputs(weight, moment, whole, 1.0, min_damping=least)
        return decompose_inputs(weight, moment, min_damping=least)

    monkeypatch.setattr(low_rank, "cholesky", counted)
    first = decompose(0.0)
    assert len(tried) > 1
    assert first.min_damping > 0
    again = decompose(first.min_damping)

    assert len(tried) == 1
    assert again.damping == first.damping
    for found, expected in zip(again.factors(weight, 5), first.factors(weight, 5), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("panel", [1, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_may_be_cast_in_parts(
    shape: tuple[int, int], panel: int, random: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = normal(*shape, random=random).float()
    inputs = normal(shape[1], 90, random=random)
    moment = inputs @ inputs.T
    whole = decompose_inputs(weight, moment)
    expected = cut(weight, whole, 5)
    for module in (low_rank, symmetric):
        monkeypatch.setattr(module, "PANEL", panel)

    parts = decompose_inputs(weight, moment)

    assert torch.allclose(parts.spectrum, whole.spectrum, rtol=1e-10)
    assert torch.allclose(cut(weight, parts, 5), expected, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_narrow_weights_and_moments_have_energies_in_fp64(
    shape: tuple[int, int], dtype: torch.dtype, random: Generator
) -> None:
    weight, inputs = normal(*shape, random=random).to(dtype), normal(shape[1], 90, random=random)

    result = decompose_inputs(weight, (inputs @ inputs.T).float())

    assert result.spectrum.dtype == torch.float64
    left, right = result.factors(weight, 3)
    solved = torch.float64 if dtype == torch.float32 else torch.float32
    assert left.dtype == right.dtype == solved
    # Moments are rounded to fp32, and so are factors of half-precision weights: seven digits,
    # two of which the nearest energies beside the cut may cost (they are a few percent apart).
    expected = cut(weight, decompose_inputs(weight.double(), inputs @ inputs.T), 3)
    assert (left.double() @ right.double() - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_factors_may_be_overwritten(shape: tuple[int, int], random: Generator) -> None:
    weight, inputs = normal(*shape, random=random), normal(shape[1], 90, random=random)
    result = decompose_inputs(weight, inputs @ inputs.T)
    before = cut(weight, result, 5)

    left, right = result.factors(weight, 5)
    left.zero_()
    right.zero_()

    assert left.mT.is_contiguous()
    assert torch.equal(cut(weight, result, 5), before)


@pytest.mark.parametrize("shape", SHAPES)
def test_damping_adds_what_the_identity_would_add_to_the_inputs(
    shape: tuple[int, int], random: Generator
) -> None:
    weight, inputs = normal(*shape, random=random), normal(shape[1], 90, random=random)
    outputs = output_moment(weight, inputs @ inputs.T)

    found = damped_outputs(outputs, weight, 0.25)

    added = found - outputs
    assert torch.allclose(added, weight @ weight.T * (added.trace() / weight.norm() ** 2))
    assert float(added.trace()) == pytest.approx(0.25 * float(outputs.trace()))
    narrow = damped_outputs(outputs.float(), weight, 0.25)
    assert narrow.dtype == torch.float32
    assert torch.allclose(narrow.double(), found, rtol=1e-6, atol=1e-6 * float(found.abs().max()))
    zeros = torch.zeros_like(weight)
    assert torch.equal(damped_outputs(outputs, zeros, 0.25), outputs)


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

    fitted = fit_left(left.clone(), right, right.to(dtype))

    residual = left @ right - fitted @ rounded
    assert (residual @ rounded.T).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_fitted_product_is_closer_than_a_rounded_one(
    dtype: torch.dtype, random: Generator
) -> None:
    left, right = normal(9, 5, random=random), normal(5, 14, random=random)
    rounded = right.to(dtype)

    fitted = fit_left(left.clone(), right, rounded)

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

    fitted = fit_left(left.clone(), right, rounded)

    assert fitted.isfinite().all()
    residual = left @ right - fitted @ rounded.double()
    assert (residual @ rounded.double().T).abs().max() < 1e-10


@pytest.mark.parametrize("panel", [1, 7])
def test_the_left_factor_is_corrected_in_its_place(
    panel: int, random: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, right = normal(9, 5, random=random), normal(5, 14, random=random)
    expected = fit_left(left.clone(), right, right.bfloat16())
    for module in (fitting, symmetric):
        monkeypatch.setattr(module, "PANEL", panel)

    fitted = fit_left(left, right, right.bfloat16())

    assert fitted.data_ptr() == left.data_ptr()
    assert torch.allclose(fitted, expected, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fit_in_fp32_is_as_good_as_one_in_fp64(dtype: torch.dtype, random: Generator) -> None:
    left, right = normal(9, 5, random=random), normal(5, 14, random=random)
    rounded, wanted = right.to(dtype), left @ right
    best = (wanted - fit_left(left.clone(), right, rounded) @ rounded.double()).norm()

    fitted = fit_left(left.float(), right.float(), rounded)

    assert fitted.dtype == torch.float32
    # The error is that of the rounding, 1e-3 or more; the fit adds its own 1e-6 at a right angle.
    assert (wanted - fitted.double() @ rounded.double()).norm() < (1 + 1e-4) * best
