from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

from streamcomp.linalg import pivot
from streamcomp.linalg.pivot import MOST_COEFFICIENT, interpolate


def orthonormal(rows: int, rank: int, random: Generator) -> Tensor:
    basis: Tensor = torch.linalg.qr(
        torch.randn(rows, rank, dtype=torch.float64, generator=random)
    ).Q
    return basis


def wilkinson(rows: int, rank: int) -> Tensor:
    """Partial pivoting keeps the order of its rows, and coefficients double with each column."""
    matrix = torch.full((rows, rank), -1.0, dtype=torch.float64).tril(-1)
    matrix[:rank].diagonal().fill_(1)
    return matrix


def coefficients_of_lu(basis: Tensor) -> Tensor:
    """What partial pivoting alone gives."""
    rank = basis.shape[1]
    lower = torch.linalg.lu(basis).L
    coefficients: Tensor = torch.linalg.solve(lower[:rank].T, lower[rank:].T).T
    return coefficients


CASES: dict[str, Callable[[Generator], Tensor]] = {
    "tall": lambda random: orthonormal(40, 9, random),
    "nearly square": lambda random: orthonormal(20, 19, random),
    "one column": lambda random: orthonormal(20, 1, random),
    "sparse": lambda random: torch.eye(30, dtype=torch.float64)[:, ::3],
    "steep": lambda random: (
        orthonormal(40, 9, random) * torch.logspace(0, -9, 40).double()[:, None]
    ),
    "wilkinson": lambda random: wilkinson(40, 16),
    "long wilkinson": lambda random: wilkinson(70, 40),
    "orthonormal wilkinson": lambda random: torch.linalg.qr(wilkinson(40, 16)).Q,
}


@pytest.mark.parametrize("name", CASES)
def test_pivots_span_the_other_rows(name: str, random: Generator) -> None:
    basis = CASES[name](random)
    rows, rank = basis.shape

    pivots, rest, coefficients, square = interpolate(basis.clone())

    assert sorted([*pivots.tolist(), *rest.tolist()]) == list(range(rows))
    assert pivots.tolist() == sorted(pivots.tolist())
    assert rest.tolist() == sorted(rest.tolist())
    assert coefficients.shape == (rows - rank, rank)
    assert coefficients.abs().max() <= MOST_COEFFICIENT
    assert torch.allclose(coefficients @ basis[pivots], basis[rest], atol=1e-9)
    assert torch.allclose(square, basis[pivots], atol=1e-12)


@pytest.mark.parametrize("name", ["wilkinson", "long wilkinson"])
def test_the_hard_cases_are_too_hard_for_partial_pivoting(name: str, random: Generator) -> None:
    assert coefficients_of_lu(CASES[name](random)).abs().max() > 100 * MOST_COEFFICIENT


def test_exchanges_stop_at_the_bound(monkeypatch: pytest.MonkeyPatch, random: Generator) -> None:
    monkeypatch.setattr(pivot, "MOST_COEFFICIENT", 1.5)
    basis = orthonormal(60, 25, random)

    pivots, rest, coefficients, square = interpolate(basis.clone())

    assert coefficients_of_lu(basis).abs().max() > 1.5
    assert coefficients.abs().max() <= 1.5
    assert torch.allclose(coefficients @ basis[pivots], basis[rest], atol=1e-12)
    assert torch.allclose(square, basis[pivots], atol=1e-12)


def test_all_rows_may_be_pivots(random: Generator) -> None:
    basis = orthonormal(7, 7, random)

    pivots, rest, coefficients, square = interpolate(basis.clone())

    assert sorted(pivots.tolist()) == list(range(7))
    assert rest.numel() == 0
    assert coefficients.shape == (0, 7)
    assert torch.allclose(square, basis[pivots], atol=1e-12)


@pytest.mark.parametrize("panel", [1, 7, 30])
@pytest.mark.parametrize("name", CASES)
def test_rows_may_be_solved_for_in_parts(
    name: str, panel: int, random: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    basis = CASES[name](random)
    whole = interpolate(basis.clone())
    monkeypatch.setattr(pivot, "PANEL", panel)

    pivots, rest, coefficients, square = interpolate(basis.clone())

    assert coefficients.abs().max() <= MOST_COEFFICIENT
    assert torch.allclose(coefficients @ basis[pivots], basis[rest], atol=1e-9)
    assert torch.allclose(square, basis[pivots], atol=1e-12)
    if "wilkinson" not in name:  # no ties, which may be broken either way
        assert torch.equal(pivots, whole[0]) and torch.equal(rest, whole[1])


def test_a_basis_in_fp32_is_solved_in_fp32(random: Generator) -> None:
    basis = orthonormal(40, 9, random).float()

    pivots, rest, coefficients, square = interpolate(basis.clone())

    assert coefficients.dtype == square.dtype == torch.float32
    # Coefficients of at most 10 times nine entries below 1, in a dtype of seven digits.
    assert torch.allclose(coefficients @ basis[pivots], basis[rest], atol=1e-5)
    assert torch.allclose(square, basis[pivots], atol=1e-6)


def test_a_basis_in_the_order_of_rows_is_left_as_it_was(random: Generator) -> None:
    basis = orthonormal(40, 9, random).contiguous()
    before = basis.clone()

    interpolate(basis)

    assert torch.equal(basis, before)


def test_a_basis_in_the_order_of_columns_makes_room_for_the_coefficients(
    random: Generator,
) -> None:
    basis = orthonormal(40, 9, random).mT.contiguous().mT

    coefficients = interpolate(basis)[2]

    assert coefficients.untyped_storage().data_ptr() == basis.untyped_storage().data_ptr()
