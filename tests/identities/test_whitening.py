"""The decomposition against its definition, and against the papers' own algorithms, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from streamcomp.linalg.low_rank import (
    Decomposition,
    decompose_inputs,
    decompose_outputs,
    output_moment,
)
from streamcomp.linalg.moments import SecondMoment
from streamcomp.methods import Moment
from streamcomp.methods.svd_llm import SvdLlm

SHAPES = [(12, 20), (20, 12), (16, 16)]


def problem(shape: tuple[int, int], random: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A weight W (m, n), correlated inputs X (n, T) and H = X X^T."""
    rows, columns = shape
    weight = torch.randn(rows, columns, dtype=torch.float64, generator=random)
    mixing = torch.randn(columns, columns, dtype=torch.float64, generator=random)
    inputs = mixing @ torch.randn(columns, 100, dtype=torch.float64, generator=random)
    inputs[0] *= 50  # a massive channel
    return weight, inputs, inputs @ inputs.T


def cut(weight: Tensor, result: Decomposition, rank: int) -> Tensor:
    """W' = B B^T W: B is the left factor, or for m > n that with its columns made of length 1."""
    left, right = result.factors(weight, rank)
    lengths = torch.ones(rank, dtype=left.dtype)
    if weight.shape[0] > weight.shape[1]:
        lengths = result.spectrum[:rank]  # the columns of W L V
    assert torch.allclose(left.T @ left, lengths.diag(), atol=1e-9 * float(lengths.max()))
    basis = left / left.norm(dim=0)
    assert torch.allclose(left @ right, basis @ (basis.T @ weight), rtol=1e-9, atol=1e-9)
    return left @ right


def textbook_svd_llm(weight: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """arXiv 2403.07378, algorithm 1: Cholesky, SVD of the whitened weight, inverse."""
    lower = torch.linalg.cholesky(moment)
    left, values, right = torch.linalg.svd(weight @ lower, full_matrices=False)
    cut_off = (left[:, :rank] * values[:rank]) @ right[:rank]
    return cut_off @ torch.linalg.inv(lower), values


@pytest.mark.parametrize("shape", SHAPES)
def test_the_spectrum_is_the_squared_singular_values_of_the_outputs(
    shape: tuple[int, int], random: Generator
) -> None:
    weight, inputs, moment = problem(shape, random)

    spectrum = decompose_inputs(weight, moment).spectrum

    expected = torch.linalg.svdvals(weight @ inputs)[: min(shape)] ** 2
    assert spectrum.shape == (min(shape),)
    assert torch.allclose(spectrum, expected, rtol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_energies_cut_are_the_loss_measured(shape: tuple[int, int], random: Generator) -> None:
    weight, inputs, moment = problem(shape, random)
    result = decompose_inputs(weight, moment)

    for rank in range(1, min(shape)):
        loss = (weight @ inputs - cut(weight, result, rank) @ inputs).norm() ** 2
        assert float(result.spectrum[rank:].sum()) == pytest.approx(float(loss), rel=1e-8)
        relative = float(loss / (weight @ inputs).norm() ** 2)
        assert result.relative_loss(rank) == pytest.approx(relative, rel=1e-8)


@pytest.mark.parametrize("shape", [(12, 20), (16, 16)])
def test_the_inputs_side_equals_the_outputs_side(shape: tuple[int, int], random: Generator) -> None:
    weight, inputs, moment = problem(shape, random)
    outputs = weight @ inputs

    from_inputs = decompose_inputs(weight, moment)
    from_outputs = decompose_outputs(weight, outputs @ outputs.T)

    assert torch.allclose(output_moment(weight, moment), outputs @ outputs.T, rtol=1e-10)
    assert torch.allclose(from_inputs.spectrum, from_outputs.spectrum, rtol=1e-8)
    assert torch.allclose(cut(weight, from_inputs, 5), cut(weight, from_outputs, 5), atol=1e-8)


def test_the_smaller_side_equals_the_larger(random: Generator) -> None:
    weight, inputs, moment = problem((20, 12), random)
    outputs = weight @ inputs

    smaller = decompose_inputs(weight, moment)  # 12 x 12
    values, vectors = torch.linalg.eigh(outputs @ outputs.T)  # 20 x 20
    basis = vectors.flip(1)[:, :5]

    assert torch.allclose(smaller.spectrum, values.flip(0)[:12], rtol=1e-8)
    assert torch.allclose(cut(weight, smaller, 5), basis @ (basis.T @ weight), atol=1e-8)


@pytest.mark.parametrize("rank", [1, 4, 11])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_svd_llm_of_the_paper(
    shape: tuple[int, int], rank: int, random: Generator
) -> None:
    weight, _, moment = problem(shape, random)

    result = decompose_inputs(weight, moment)

    expected, values = textbook_svd_llm(weight, moment, rank)
    assert torch.allclose(cut(weight, result, rank), expected, atol=1e-8)
    assert torch.allclose(result.spectrum, values**2, rtol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_other_matrix_of_the_rank_loses_less(shape: tuple[int, int], random: Generator) -> None:
    weight, inputs, moment = problem(shape, random)
    result = decompose_inputs(weight, moment)
    best = (weight @ inputs - cut(weight, result, 4) @ inputs).norm()
    basis = torch.linalg.qr(result.factors(weight, 4)[0]).Q

    for size in (1e-3, 1e-2, 1e-1):
        noise = torch.randn(basis.shape, dtype=basis.dtype, generator=random)
        other = torch.linalg.qr(basis + size * noise).Q
        assert (weight @ inputs - other @ (other.T @ weight) @ inputs).norm() > best


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_gives_the_weight_back(shape: tuple[int, int], random: Generator) -> None:
    weight, _, moment = problem(shape, random)

    result = decompose_inputs(weight, moment)

    assert torch.allclose(cut(weight, result, min(shape)), weight, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_planted_low_rank_is_recovered(shape: tuple[int, int], random: Generator) -> None:
    rows, columns = shape
    _, _, moment = problem(shape, random)
    left = torch.randn(rows, 3, dtype=torch.float64, generator=random)
    weight = left @ torch.randn(3, columns, dtype=torch.float64, generator=random)

    result = decompose_inputs(weight, moment)

    assert torch.allclose(cut(weight, result, 3), weight, atol=1e-8)
    assert result.relative_loss(3) < 1e-12
    assert result.relative_loss(2) > 1e-6


def test_a_method_is_given_either_side_of_a_running_moment(random: Generator) -> None:
    weight, inputs, moment = problem((12, 20), random)
    outputs = SecondMoment(12, dtype=torch.float64, device="cpu")
    for tokens in inputs.T.split(7):
        outputs.update(tokens @ weight.T)
    method = SvdLlm()

    by_inputs = method.decompose(weight, Moment("inputs", moment), 0.0)
    by_outputs = method.decompose(weight, Moment("outputs", outputs.value), 0.0)

    assert torch.allclose(cut(weight, by_inputs, 5), cut(weight, by_outputs, 5), atol=1e-8)
