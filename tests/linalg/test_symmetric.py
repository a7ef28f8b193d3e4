"""Products, factors and eigenvectors in panels against the plain formulas in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from streamcomp.errors import NonFiniteError
from streamcomp.linalg import symmetric
from streamcomp.linalg.dtypes import solve_dtype
from streamcomp.linalg.symmetric import cholesky, eigh, exact_products, gram, sandwich

F64, F32 = torch.float64, torch.float32
PANELS = [1, 7, 64, 1024]


@pytest.fixture(autouse=True)
def _fp32_from_256_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large enough for the deflation, small enough for a test."""
    monkeypatch.setattr(symmetric, "SMALL", 256)


@pytest.fixture(params=PANELS)
def panel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    size = int(request.param)
    monkeypatch.setattr(symmetric, "PANEL", size)
    return size


def normal(*shape: int, random: Generator) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=random)


def with_energies(energies: Tensor, random: Generator) -> Tensor:
    """A symmetric matrix (n, n) of these eigenvalues, in random directions."""
    basis = torch.linalg.qr(normal(len(energies), len(energies), random=random)).Q
    matrix: Tensor = (basis * energies) @ basis.T
    return (matrix + matrix.T) / 2


def graded(size: int, largest: float, count: int) -> Tensor:
    """``count`` energies from ``largest`` down to a thirtieth of it, then 1e-3 to 1e-6."""
    few = largest * torch.logspace(0, -1.5, count, dtype=F64)
    return torch.cat((few, torch.logspace(-3, -6, size - count, dtype=F64)))


def lost(matrix: Tensor, basis: Tensor) -> float:
    """tr((I - U U^T) A (I - U U^T))."""
    wide = basis.double()
    rest = torch.eye(len(matrix), dtype=F64) - wide @ wide.T
    return float((rest @ matrix @ rest).trace())


def orthonormality(basis: Tensor) -> float:
    wide = basis.double()
    return float((wide.T @ wide - torch.eye(len(wide), dtype=F64)).abs().max())


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-13) -> bool:
    """Up to ``tolerance`` of the largest number."""
    assert found.dtype == F64 and found.shape == expected.shape
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


# -- products


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (7, 7), (20, 14), (13, 65), (130, 66)])
def test_gram_is_the_product(shape: tuple[int, int], panel: int, random: Generator) -> None:
    matrix = normal(*shape, random=random)

    assert same(gram(matrix), matrix.T @ matrix)
    assert same(gram(matrix.T), matrix @ matrix.T)
    assert same(gram(matrix.float()), matrix.float().double().T @ matrix.float().double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gram_of_half_precision_adds_up_in_fp32(
    dtype: torch.dtype, panel: int, random: Generator
) -> None:
    matrix = normal(130, 66, random=random).to(dtype)

    # Every product is exact; 130 of them are added up with an error of 2^-24 each, at most.
    assert same(gram(matrix), matrix.double().T @ matrix.double(), 130 * 2.0**-24)


def test_gram_of_half_precision_is_exact_where_sums_are(panel: int, random: Generator) -> None:
    matrix = torch.randint(-256, 257, (130, 66), generator=random).bfloat16()  # sums below 2^24

    assert torch.equal(gram(matrix), matrix.double().T @ matrix.double())


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (7, 7), (20, 14), (13, 65), (130, 66)])
@pytest.mark.parametrize(
    ("outer", "inner"), [(F64, F64), (F32, F64), (F64, F32), (torch.bfloat16, F32)], ids=str
)
def test_sandwich_is_the_product(
    shape: tuple[int, int], outer: torch.dtype, inner: torch.dtype, panel: int, random: Generator
) -> None:
    matrix = normal(*shape, random=random).to(outer)
    rows = normal(90, shape[1], random=random)
    moment = (rows.T @ rows).to(inner)

    expected = matrix.double() @ moment.double() @ matrix.double().T

    assert same(sandwich(matrix, moment), expected)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 20, 65, 130])
@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("order", ["rows", "columns"])
def test_sandwich_of_a_triangle_is_the_product(
    size: int, dtype: torch.dtype, order: str, panel: int, random: Generator
) -> None:
    triangle = normal(size, size, random=random).tril()
    if order == "columns":  # as ``cholesky`` returns it
        triangle = triangle.mT.contiguous().mT
    rows = normal(90, size, random=random)
    moment = (rows.T @ rows).to(dtype)

    found = sandwich(triangle, moment, lower=True)

    assert same(found, triangle.T @ moment.double() @ triangle)


def test_products_leave_their_factors_as_they_were(random: Generator) -> None:
    matrix, rows = normal(20, 14, random=random), normal(90, 14, random=random)
    moment = rows.T @ rows
    before = matrix.clone(), moment.clone()

    gram(matrix), sandwich(matrix, moment), cholesky(moment, 0.5)

    assert torch.equal(matrix, before[0]) and torch.equal(moment, before[1])


@pytest.mark.parametrize("added", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("size", [1, 2, 20, 130])
def test_the_factor_is_that_of_cholesky(
    size: int, dtype: torch.dtype, added: float, random: Generator
) -> None:
    rows = normal(2 * size + 3, size, random=random)
    moment = (rows.T @ rows).to(dtype)

    factor = cholesky(moment, added)

    assert factor is not None and factor.dtype == F64
    assert torch.equal(factor, factor.tril())
    expected = torch.linalg.cholesky(moment.double() + added * torch.eye(size, dtype=F64))
    assert torch.allclose(factor, expected, atol=1e-11)


@pytest.mark.parametrize(
    "moment",
    [
        torch.zeros(3, 3),
        -torch.eye(3),
        torch.ones(3, 3) - torch.eye(3),
        torch.full((3, 3), torch.nan),
    ],
    ids=["zeros", "negative", "indefinite", "nan"],
)
def test_what_is_not_positive_has_no_factor(moment: Tensor) -> None:
    assert cholesky(moment) is None


def test_what_is_added_may_make_it_positive() -> None:
    factor = cholesky(torch.zeros(3, 3), 4.0)

    assert factor is not None and torch.equal(factor, 2 * torch.eye(3, dtype=F64))


# -- eigenvectors


@pytest.mark.parametrize(
    ("dtype", "solved"),
    [(torch.bfloat16, F32), (torch.float16, F32), (F32, F64), (F64, F64)],
    ids=str,
)
def test_half_precision_is_solved_in_fp32(dtype: torch.dtype, solved: torch.dtype) -> None:
    assert solve_dtype(dtype) == solved


@pytest.mark.parametrize("size", [1, 2, 3, 20, 255, 256, 300])
def test_in_fp64_it_is_that_of_torch(size: int, random: Generator) -> None:
    matrix = with_energies(torch.linspace(1, 9, size, dtype=F64), random)
    expected, vectors = torch.linalg.eigh(matrix)

    values, found = eigh(matrix, F64)

    assert values.dtype == found.dtype == F64
    assert torch.allclose(values, expected.flip(0), rtol=1e-12)
    overlap = (found * vectors.flip(1)).sum(0).abs()  # all energies are apart
    assert torch.allclose(overlap, torch.ones(size, dtype=F64), atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 20, 255])
def test_small_matrices_are_solved_in_fp64_for_fp32(size: int, random: Generator) -> None:
    matrix = with_energies(graded(size, 1e4, min(size, 4)), random)
    expected = torch.linalg.eigvalsh(matrix).flip(0)

    values, vectors = eigh(matrix.clone(), F32)

    assert values.dtype == F64 and vectors.dtype == F32
    assert torch.allclose(values, expected, rtol=1e-9, atol=1e-12 * float(expected[0]))
    assert orthonormality(vectors) < 1e-6


@pytest.mark.parametrize("largest", [1e2, 1e3, 1e4])
@pytest.mark.parametrize(("size", "count"), [(256, 1), (301, 4), (320, 8), (400, 16)])
def test_few_large_energies_do_not_drown_the_small_ones(
    size: int, count: int, largest: float, panel: int, random: Generator
) -> None:
    matrix = with_energies(graded(size, largest, count), random)
    best = torch.linalg.eigvalsh(matrix).flip(0)
    plain = torch.linalg.eigh(matrix.float()).eigenvectors.flip(1)

    values, vectors = eigh(matrix.clone(), F32)

    assert values.dtype == F64 and vectors.dtype == F32
    assert bool((values.diff() <= 0).all())
    assert orthonormality(vectors) < 1e-5
    for rank in (size // 5, size // 2, 4 * size // 5):
        tail = float(best[rank:].sum())
        excess = lost(matrix, vectors[:, :rank]) / tail - 1
        # U is rounded to fp32: I - U U^T leaves (1e-7)^2 of the largest energy, some 1e-6 of 1e4.
        assert abs(excess) < 1e-3
        assert excess < 0.05 * (lost(matrix, plain[:, :rank]) / tail - 1)
        # The tail is what is reported as the loss.
        assert float(values[rank:].sum()) == pytest.approx(tail, rel=1e-3)


@pytest.mark.parametrize("power", [-0.5, -1.0, -2.0])
def test_energies_without_a_gap_lose_little_more_than_the_least(
    power: float, random: Generator
) -> None:
    """Where subspace iteration ends before it has found the dominant directions."""
    energies = torch.arange(1, 301, dtype=F64) ** power
    matrix = with_energies(energies, random)

    values, vectors = eigh(matrix.clone(), F32)

    assert float(values.sum()) == pytest.approx(float(energies.sum()), rel=1e-6)
    assert bool((values.diff() <= 0).all())
    for rank in (1, 10, 20, 32, 40, 48, 60, 150, 240):
        assert lost(matrix, vectors[:, :rank]) == pytest.approx(
            float(energies[rank:].sum()), rel=1e-3
        )


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("size", [1, 5, 255, 256, 300])
def test_a_matrix_of_zeros_has_orthonormal_vectors(size: int, dtype: torch.dtype) -> None:
    values, vectors = eigh(torch.zeros(size, size, dtype=F64), dtype)

    assert not values.any() and values.shape == (size,)
    assert orthonormality(vectors) < 1e-6


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("size", [1, 5, 255, 256, 300])
@pytest.mark.parametrize("scale", [1.0, -1.0, 1e-12, 1e12])
def test_equal_energies_have_orthonormal_vectors(
    scale: float, size: int, dtype: torch.dtype
) -> None:
    values, vectors = eigh(scale * torch.eye(size, dtype=F64), dtype)

    assert torch.allclose(values, torch.full((size,), scale, dtype=F64), rtol=1e-5)
    assert bool((values.diff() <= 0).all())
    assert orthonormality(vectors) < 1e-5


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("rank", [1, 5, 31, 32, 33, 47, 48, 60, 200])
@pytest.mark.parametrize("size", [200, 256, 300])
def test_a_matrix_of_low_rank_is_spanned_by_as_many_directions(
    size: int, rank: int, dtype: torch.dtype, random: Generator
) -> None:
    rows = normal(rank, size, random=random)
    matrix = rows.T @ rows
    whole = float(matrix.trace())

    values, vectors = eigh(matrix.clone(), dtype)

    assert orthonormality(vectors) < 1e-5
    assert bool((values.diff() <= 0).all())
    assert lost(matrix, vectors[:, :rank]) < 1e-6 * whole
    assert float(values[:rank].sum()) == pytest.approx(whole, rel=1e-5)
    assert float(values[rank:].abs().sum()) < 1e-4 * whole


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("size", [1, 3, 20, 255, 256, 300])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("everywhere", [True, False])
def test_what_is_not_finite_is_an_error(
    everywhere: bool, bad: float, size: int, dtype: torch.dtype
) -> None:
    matrix = torch.eye(size, dtype=F64)
    if everywhere:
        matrix[:] = bad
    else:
        matrix[-1, 0] = matrix[0, -1] = bad

    with pytest.raises(NonFiniteError):
        eigh(matrix, dtype)


def test_the_same_matrix_has_the_same_vectors(random: Generator) -> None:
    """A job that is resumed finds what it would have found."""
    matrix = with_energies(graded(300, 1e4, 8), random)
    torch.manual_seed(1)
    values, vectors = eigh(matrix.clone(), F32)
    torch.manual_seed(2)

    again = eigh(matrix.clone(), F32)

    assert torch.equal(values, again[0]) and torch.equal(vectors, again[1])


@pytest.mark.parametrize(("size", "count"), [(300, 32), (300, 1), (5, 5), (6, 5)])
def test_a_reflection_is_orthogonal_and_begins_with_the_basis(
    size: int, count: int, random: Generator
) -> None:
    basis = torch.linalg.qr(normal(size, count, random=random)).Q

    reflector, middle = symmetric._reflection(basis)

    whole = torch.eye(size, dtype=F64) - reflector @ middle @ reflector.T
    assert torch.allclose(whole.T @ whole, torch.eye(size, dtype=F64), atol=1e-13)
    first = whole[:, :count]
    assert torch.allclose(first @ first.T, basis @ basis.T, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_precision_numbers_lose_nothing_but_rounding_of_fp32(
    dtype: torch.dtype, random: Generator
) -> None:
    narrow = torch.randn(256, 64, generator=random).to(dtype)
    wide, exact = narrow.float(), narrow.double()

    with exact_products(dtype):
        product = wide.T @ wide

    expected = exact.T @ exact
    assert float((product - expected).abs().max() / expected.abs().max()) < 1e-6


def test_numbers_of_fp32_are_never_rounded_to_multiply_them(random: Generator) -> None:
    wide = torch.randn(256, 64, generator=random)
    expected = wide.T @ wide

    with exact_products(torch.float32):
        product = wide.T @ wide

    assert torch.equal(product, expected)


def test_the_precision_of_other_products_is_as_before(random: Generator) -> None:
    wide = torch.randn(256, 64, generator=random)
    expected = wide.T @ wide

    with pytest.raises(KeyError), exact_products(torch.bfloat16):
        raise KeyError

    assert torch.equal(wide.T @ wide, expected)
