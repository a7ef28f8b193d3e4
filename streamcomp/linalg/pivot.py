"""The pivoted form of a low-rank matrix (PIFA, arXiv 2501.19090, section 3).

A matrix W' (m x n) of rank r has r rows that span the others. With those *pivot* rows W_p
(r x n) and coefficients C ((m - r) x r), W' = P [W_p; C W_p] for a permutation P: the same
matrix as U V, stored in r (m + n - r) numbers instead of r (m + n).
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamcomp.linalg.symmetric import PANEL

__all__ = ["MOST_COEFFICIENT", "interpolate"]

# Coefficients above this lose digits: rows are exchanged until none is.
MOST_COEFFICIENT = 10.0


def interpolate(basis: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pivot rows of a basis (m, r) and the coefficients of the other rows.

    Returns
    -------
    pivots : int64 Tensor of shape (r,), ascending
    rest : int64 Tensor of shape (m - r,), ascending
    coefficients : Tensor of shape (m - r, r), with basis[rest] = coefficients @ basis[pivots]
    square : Tensor of shape (r, r), basis[pivots]

    Pivots come from LU with partial pivoting; rows are then exchanged as in a strong
    rank-revealing QR (Gu and Eisenstat 1996) until no coefficient exceeds
    ``MOST_COEFFICIENT``. Each exchange grows the volume of the pivot rows by that factor, so
    there are few. ``basis`` is overwritten where it is in the order of columns, else copied; the
    coefficients share its memory. Holds three r x r matrices in addition to it.
    """
    rows, rank = basis.shape
    packed = basis if basis.mT.is_contiguous() else basis.mT.contiguous().mT
    swaps = torch.empty(rank, dtype=torch.int32, device=basis.device)
    info = torch.empty((), dtype=torch.int32, device=basis.device)
    torch.linalg.lu_factor_ex(packed, out=(packed, swaps, info))  # columns of zeros cost nothing
    order = _order(swaps, rows)
    # rest = L_rest L_pivot^-1, both below the diagonal of ``packed``
    triangle = packed[:rank].clone()
    for start in range(rank, rows, PANEL):
        rest = packed[start : start + PANEL]
        rest.copy_(
            torch.linalg.solve_triangular(
                triangle, rest, upper=False, left=False, unitriangular=True
            )
        )
    coefficients = packed[rank:]
    pivots, others = order[:rank].clone(), order[rank:].clone()
    lower = triangle.tril(-1)
    lower.diagonal().fill_(1)
    square = lower @ triangle.triu_()
    del triangle, lower
    if coefficients.numel():
        _exchange(coefficients, pivots, others, square)
    return _sort(pivots, others, coefficients, square)


def _order(swaps: Tensor, rows: int) -> Tensor:
    """The row order that LAPACK's list of 1-based ``swaps`` makes of 0..rows-1."""
    order = list(range(rows))
    for row, other in enumerate(swaps.tolist()):
        order[row], order[other - 1] = order[other - 1], order[row]
    return torch.tensor(order, dtype=torch.int64, device=swaps.device)


def _exchange(coefficients: Tensor, pivots: Tensor, rest: Tensor, square: Tensor) -> None:
    """Swap rows in place until every coefficient is at most ``MOST_COEFFICIENT``."""
    for _ in range(coefficients.numel()):
        row, column = _largest(coefficients)
        pivot = coefficients[row, column].clone()
        if pivot.abs() <= MOST_COEFFICIENT:
            return
        # x_row = sum_k c_k p_k  =>  p_column = (x_row - sum_{k != column} c_k p_k) / c_column
        square[column] = coefficients[row] @ square
        replaced = -coefficients[row] / pivot
        replaced[column] = 1 / pivot
        weights = coefficients[:, column].clone()
        coefficients[:, column] = 0
        coefficients.addr_(weights, replaced)
        coefficients[row] = replaced
        held = pivots[column].clone()
        pivots[column] = rest[row]
        rest[row] = held


def _sort(
    pivots: Tensor, rest: Tensor, coefficients: Tensor, square: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows in ascending order, so that outputs are gathered from memory in order at run time."""
    pivots, columns = pivots.sort()
    rest, rows = rest.sort()
    for part in coefficients.split(PANEL):
        part.copy_(part[:, columns])
    for part in coefficients.split(PANEL, dim=1):
        part.copy_(part[rows])
    return pivots, rest, coefficients, square[columns]


def _largest(matrix: Tensor) -> tuple[int, int]:
    """Place of the entry of largest size, searched in ``PANEL`` rows at a time."""
    largest = []
    for start in range(0, len(matrix), PANEL):
        rows = matrix[start : start + PANEL].abs()
        place = int(rows.argmax())
        largest.append((float(rows.flatten()[place]), start * matrix.shape[1] + place))
    _, place = max(largest)
    return divmod(place, matrix.shape[1])
