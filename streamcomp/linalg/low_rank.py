"""Low-rank approximation of a linear in the metric of its inputs.

For W (m x n) and inputs X (n x T) with H = X X^T, find W' of rank r that minimises
||W X - W' X||_F. With H = S S^T this is the truncated SVD of W S (SVD-LLM,
arXiv 2403.07378, section 3.1); it is also the PCA of the outputs Y = W X (LLM-ROM,
arXiv 2312.07046, section 3): with U_r the top eigenvectors of W H W^T, W' = U_r U_r^T W.

So every solution here is a *basis* of output directions, best first, and a *spectrum*: energies
sigma^2 in the same order. The loss at rank r is the sum of the energies after the r-th, and one
decomposition serves every rank. The smaller side is decomposed:

- m <= n: the eigenvectors of K = Y Y^T (m x m) are the basis;
- m > n: with H = L L^T, the eigenvectors V of L^T W^T W L (n x n) give the basis
  W L V Lambda^-1/2, and W' = (W L V_r)(V_r^T L^-1): only inputs are combined.

**Two-sided** whitening weighs an error by its effect on the model's loss: with the gradients
G = dL/dY (m x T) and Gamma = G G^T it minimises ||Gamma^1/2 (W - W') H^1/2||_F, whose cut
energies are second-order losses of the model and so compare across linears (OBD-LLM,
arXiv 2604.00821). One factor cancels, and again the smaller side is enough:

- m <= n: with Gamma = R^T R, the eigenvectors U of R K R^T give W' = (R^-1 U_r)(U_r^T R W);
- m > n: with H = S S^T and K' = W^T Gamma W, the moment of W^T g (n x n), the eigenvectors V of
  S^T K' S give W' = (W S V_r)(V_r^T S^-1).

With Gamma = I both are the one-sided solution. Gamma is damped by eps tr(Gamma)/m I; otherwise
errors in directions without gradients would cost nothing.

Moments are factored and multiplied in fp64; eigenvectors and factors are fp32 for a weight in
half precision, else fp64 (:mod:`streamcomp.linalg.symmetric`). A randomised SVD is not
used: at these ranks it worsens perplexity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from streamcomp.linalg.dtypes import moment_dtype, solve_dtype
from streamcomp.linalg.symmetric import PANEL, SMALL, cholesky, eigh, gram, sandwich

__all__ = [
    "FIRST_DAMPING",
    "GRADIENT_DAMPING",
    "Decomposition",
    "basis_bytes",
    "damped_outputs",
    "decompose_inputs",
    "decompose_outputs",
    "decompose_two_sided_inputs",
    "decompose_two_sided_outputs",
    "decompose_weight",
    "decomposition_bytes",
    "decomposition_flops",
    "output_moment",
    "times",
]

# Damping starts here, relative to the mean of the moment's diagonal, and grows tenfold.
FIRST_DAMPING = 1e-6
MOST_DAMPING = 1.0

_F64 = 8

# Directions that are taken out of the metric at a time.
_WIDTH = PANEL // 2

# Reported where even that does not make a moment positive definite.
_NO_METRIC = "its moment has no Cholesky factor even when damped: all directions count alike"

# Added to the gradients' moment, relative to the mean of its diagonal.
GRADIENT_DAMPING = 1e-2


@dataclass(frozen=True)
class Decomposition:
    """The factors of a linear W (m x n) for every rank at once, best directions first.

    Parameters
    ----------
    spectrum : Tensor of shape (k,), fp64, descending, k = min(m, n)
        Energy of each direction: the squared singular values of the whitened weight.
    left : Tensor of shape (m, k) or (n, k); of fewer columns where only a rank was asked for
        Columns of the left factor, or, with ``of_inputs``, the matrix A of the left factor W A.
    right : Tensor of shape (k, m) or (k, n), or None; of as many rows as ``left`` has columns
        The matrix B of the right factor B W, or, with ``of_inputs``, the right factor itself. None:
        the left columns are orthonormal, and the right factor is left^T W.
    of_inputs : bool
        Whether the side of the inputs (n x n) was decomposed, and not that of the outputs (m x m).
    damping : float
        Added to a moment's diagonal, relative to its mean; 0 if nothing was.
    min_damping : float
        Damping that the moment of the inputs needed to have a Cholesky factor, if it was factored.
    condition : float
        Largest over smallest eigenvalue of the moment that was decomposed, its damping included;
        infinite where the moment is singular.
    fallback : str
        What was done instead, where the data did not allow the method itself; otherwise empty.
    """

    spectrum: Tensor
    left: Tensor
    right: Tensor | None
    of_inputs: bool
    damping: float
    condition: float = math.nan
    fallback: str = ""
    min_damping: float = 0.0

    def factors(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Left (m, r) and right (r, n) factor of the best approximation of ``rank``.

        In the bases' dtype. Both are new tensors, the left one column-major. Holds them and
        ``PANEL`` rows of ``weight``.
        """
        left = self.left[:, :rank]
        if self.of_inputs:
            assert self.right is not None
            return times(weight, left), self.right[:rank].clone()
        across = left if self.right is None else self.right[:rank].T
        copied = left.mT.clone(memory_format=torch.contiguous_format).mT
        return copied, _transposed_times(across, weight)

    def rounded(self, dtype: torch.dtype) -> Decomposition:
        """The form that is kept for a model in ``dtype``: bases in fp32, or in fp64 for fp64.

        Factors are fitted to their rounded counterparts when they are written, so fp32 is enough.
        """
        kept = moment_dtype(dtype)
        right = None if self.right is None else self.right.to(kept)
        return replace(self, left=self.left.to(kept), right=right)

    @property
    def energy(self) -> float:
        """Sum of the spectrum."""
        return float(self.spectrum.sum())

    @property
    def figures(self) -> dict[str, Any]:
        """How it went, as the journal and the report tell it."""
        return {
            "energy": self.energy,
            "damping": self.damping,
            "condition": self.finite_condition,
            "fallback": self.fallback,
        }

    @property
    def finite_condition(self) -> float | None:
        """The condition number, None where it is not finite."""
        return self.condition if self.condition < math.inf else None

    def relative_loss(self, rank: int) -> float:
        """Share of the whole energy that is lost at ``rank``; 0 where there is no energy.

        One-sided, this is ||W X - W' X||^2 / ||W X||^2.
        """
        total = float(self.spectrum.sum())
        return float(self.spectrum[rank:].sum()) / total if total > 0 else 0.0


def output_moment(weight: Tensor, inputs: Tensor) -> Tensor:
    """K = W H W^T (m, m) in fp64 from W (m, n) and H (n, n)."""
    return sandwich(weight, inputs)


def decompose_outputs(
    weight: Tensor, outputs: Tensor, damping: float = 0.0, *, spend: bool = False
) -> Decomposition:
    """Decompose from the moment K (m, m) of the outputs; meant for m <= n.

    ``damping`` adds eps W W^T to K, which stands for eps I added to H. Where K is not positive
    definite in fp64, ``FIRST_DAMPING`` is added in any case: it orders the directions that the data
    leaves open. No factorisation can fail here. Holds as much as :func:`eigh`, and K once more
    where it is damped; with ``spend`` K itself may be overwritten.
    """
    dtype = solve_dtype(weight.dtype)
    if dtype == torch.float64 and not damping:  # K may be needed again
        values, vectors = eigh(outputs.to(torch.float64, copy=True), dtype)
        if values[-1] <= 0 < values[0]:
            del values, vectors
            return decompose_outputs(weight, outputs, FIRST_DAMPING)
    else:
        if damping:
            outputs, spend = damped_outputs(outputs, weight, damping), True
        values, vectors = eigh(outputs.to(torch.float64, copy=not spend), dtype)
    return _decomposition(values, vectors, None, of_inputs=False, damping=damping)


def decompose_weight(weight: Tensor) -> Decomposition:
    """Decompose W (m, n) without data, as if H = I: its truncated SVD.

    Holds as much as :func:`eigh` on the smaller side.
    """
    if weight.shape[0] <= weight.shape[1]:
        return decompose_outputs(weight, gram(weight.T), spend=True)
    values, vectors = eigh(gram(weight), solve_dtype(weight.dtype))
    return _decomposition(values, vectors, vectors.T, of_inputs=True, damping=0.0)


def decompose_inputs(
    weight: Tensor,
    inputs: Tensor,
    damping: float = 0.0,
    *,
    min_damping: float = 0.0,
    rank: int | None = None,
) -> Decomposition:
    """Decompose from the moment H (n, n) of the inputs, on the smaller side of W (m, n).

    ``damping`` adds eps I to H: at least ``min_damping``, and as much as a Cholesky factor of H
    needs. Without ``rank``, for every rank. For m > n it holds the fp64 factor of H in addition to
    the memory of :func:`eigh`.
    """
    if weight.shape[0] <= weight.shape[1]:
        return decompose_outputs(weight, output_moment(weight, inputs), damping, spend=True)
    lower, taken = _cholesky(inputs, max(damping, min_damping))  # (n, n)
    return _from_inputs(weight, inputs, lower, gram(weight), taken, taken, rank)


def decompose_two_sided_outputs(
    weight: Tensor,
    outputs: Tensor,
    gradients: Tensor,
    damping: float = GRADIENT_DAMPING,
    *,
    spend: bool = False,
) -> Decomposition:
    """Two-sided, from the moments of the outputs K and of their gradients Gamma, (m, m) both.

    Meant for m <= n. ``damping`` is added to Gamma, relative to its mean diagonal. Holds the fp64
    factor of Gamma in addition to the memory of :func:`eigh`; with ``spend`` K may be freed.
    """
    if not float(gradients.diagonal().sum()) > 0:
        return _without_gradients(decompose_outputs(weight, outputs))
    lower, damping = _cholesky(gradients, damping)  # R = lower^T
    dtype = solve_dtype(weight.dtype)
    small = sandwich(lower, outputs, lower=True)  # R K R^T (m, m)
    if spend and dtype == torch.float32:
        outputs.set_()  # type: ignore[call-overload]  # makes room for the solver
    values, vectors = eigh(small, dtype)
    if dtype == torch.float64 and values[-1] <= 0 < values[0]:
        del values, vectors
        damped = damped_outputs(outputs, weight, FIRST_DAMPING)
        values, vectors = eigh(sandwich(lower, damped, lower=True), dtype)
    right = _transposed_product(vectors, lower.T)
    _solve_transposed(lower, vectors)  # R^-1 V
    return _decomposition(values, vectors, right, of_inputs=False, damping=damping)


def decompose_two_sided_inputs(
    weight: Tensor,
    inputs: Tensor,
    gradients: Tensor,
    gradient_energy: float,
    damping: float = GRADIENT_DAMPING,
    *,
    min_damping: float = 0.0,
    rank: int | None = None,
) -> Decomposition:
    """Two-sided, from the moments H of the inputs and K' of W^T g, (n, n) both.

    Meant for m > n. ``gradient_energy`` is tr(Gamma), the sum of ||g||^2, by which Gamma is
    damped: K' + eps tr(Gamma)/m W^T W. ``min_damping`` and ``rank`` are those of
    :func:`decompose_inputs`. Holds the fp64 factor of H in addition to the memory of :func:`eigh`.
    """
    if not gradient_energy > 0:
        return _without_gradients(
            decompose_inputs(weight, inputs, min_damping=min_damping, rank=rank)
        )
    lower, taken = _cholesky(inputs, min_damping)  # S
    outer = gram(weight).mul_(damping * gradient_energy / weight.shape[0]).add_(gradients)
    return _from_inputs(weight, inputs, lower, outer, max(damping, taken), taken, rank)


def _from_inputs(
    weight: Tensor,
    inputs: Tensor,
    lower: Tensor,
    outer: Tensor,
    damping: float,
    min_damping: float,
    rank: int | None,
) -> Decomposition:
    """Bases S V and V^T S^-1, V the eigenvectors of S^T C S with S = ``lower`` and C = ``outer``.

    Only the panels of V that hold the first ``rank`` columns are used: the result for these columns
    is the same as with all of them.
    """
    small = sandwich(lower, outer, lower=True)
    outer.set_()  # type: ignore[call-overload]  # makes room for the solver
    values, vectors = eigh(small, solve_dtype(weight.dtype))
    if not bool(inputs.diagonal().any()):  # an input that is always zero: nothing is lost
        values = torch.zeros_like(values)
    if rank is not None:
        vectors = vectors[:, : -(-rank // _WIDTH) * _WIDTH]
    left = _transposed_product(vectors, lower.T).T
    _solve_transposed(lower, vectors)  # S^-T V
    analysis = _decomposition(values, left, vectors.T, of_inputs=True, damping=damping)
    return replace(analysis, min_damping=min_damping if min_damping < MOST_DAMPING else 0.0)


def _decomposition(
    values: Tensor, left: Tensor, right: Tensor | None, *, of_inputs: bool, damping: float
) -> Decomposition:
    """The result for descending ``values``; those rounded to below zero count as zero."""
    largest, smallest = float(values[0]), float(values[-1])
    return Decomposition(
        values.clamp_min(0),
        left,
        right,
        of_inputs,
        damping,
        largest / smallest if smallest > 0 else math.inf,
        _NO_METRIC if damping >= MOST_DAMPING else "",
    )


def _without_gradients(one_sided: Decomposition) -> Decomposition:
    """``one_sided`` with energies of zero: without gradients no error should change the loss."""
    spectrum = torch.zeros_like(one_sided.spectrum)
    return replace(one_sided, spectrum=spectrum, fallback="no gradient arrives: one-sided")


def damped_outputs(outputs: Tensor, weight: Tensor, damping: float) -> Tensor:
    """K + eps W W^T (m, m) in K's dtype, as for H + eps I; ``damping`` is relative to K's mean."""
    inner = gram(weight.T)  # (m, m) = W W^T
    trace = inner.trace()
    if trace > 0:
        inner *= damping * outputs.diagonal().sum(dtype=torch.float64) / trace
    return inner.to(outputs.dtype).add_(outputs)


def times(weight: Tensor, mixing: Tensor) -> Tensor:
    """W A (m, r) in A's dtype, ``PANEL`` rows of W (m, n) at a time.

    Column-major, so that LU overwrites it without a copy.
    """
    product = torch.empty(
        mixing.shape[1], weight.shape[0], dtype=mixing.dtype, device=mixing.device
    )
    for start in range(0, weight.shape[0], PANEL):
        rows = weight[start : start + PANEL].to(mixing.dtype)
        product[:, start : start + PANEL] = (rows @ mixing).T
    return product.T


def _transposed_times(left: Tensor, weight: Tensor) -> Tensor:
    """left^T W (r, n) in left's dtype, ``PANEL`` rows of W (m, n) at a time."""
    product = torch.zeros(left.shape[1], weight.shape[1], dtype=left.dtype, device=left.device)
    for start in range(0, len(left), PANEL):
        rows = slice(start, start + PANEL)
        product.addmm_(left[rows].T, weight[rows].to(left.dtype))
    return product


def _transposed_product(vectors: Tensor, triangle: Tensor) -> Tensor:
    """V^T T (k, n) in V's dtype, for V (n, k) and an upper triangle T (n, n) in fp64.

    ``PANEL`` columns of T and ``_WIDTH`` of V at a time; zeros below T's diagonal are skipped.
    """
    result = torch.empty(
        vectors.shape[1], triangle.shape[1], dtype=vectors.dtype, device=vectors.device
    )
    for first in range(0, len(triangle), PANEL):
        last = min(first + PANEL, len(triangle))
        columns = triangle[:last, first:last].to(vectors.dtype)
        for start in range(0, len(result), _WIDTH):
            rows = slice(start, start + _WIDTH)
            result[rows, first:last] = vectors[:last, rows].T @ columns
    return result


def _solve_transposed(lower: Tensor, vectors: Tensor) -> None:
    """Replace V (n, k) by L^-T V, computed in fp64, ``_WIDTH`` columns at a time."""
    for start in range(0, vectors.shape[1], _WIDTH):
        columns = slice(start, start + _WIDTH)
        vectors[:, columns] = torch.linalg.solve_triangular(
            lower.T, vectors[:, columns].double(), upper=True
        )


def _cholesky(moment: Tensor, damping: float = 0.0) -> tuple[Tensor, float]:
    """Lower fp64 factor of ``moment`` (n, n) with at least ``damping``, and the damping used."""
    mean = float(moment.diagonal().double().mean())
    while True:
        factor = cholesky(moment, damping * mean if mean > 0 else 0.0)
        if factor is not None:
            return factor, damping
        damping = max(10 * damping, FIRST_DAMPING)
        if damping > MOST_DAMPING or mean <= 0:  # an input that is always zero
            return torch.eye(len(moment), dtype=torch.float64, device=moment.device), MOST_DAMPING


# -- their memory and time ---------------------------------------------------------------


def decomposition_bytes(
    rows: int,
    columns: int,
    side: str,
    dtype: torch.dtype,
    *,
    gradients: bool = False,
    damped: bool = False,
) -> int:
    """Peak of the functions above in addition to the weight, of ``dtype``, and its moments.

    Bytes per entry of the small matrix: ``eigh`` takes 24 in fp64, 12 in fp32, and the Cholesky
    factor, if there is one, 8 at that time. Before it, the factor, the result and its operand are
    held. K is kept too: for a weight in fp64 if it was computed from H or ``damped``, for others in
    its own dtype if it was measured and ``damped``. In addition, ``PANEL`` rows of the moment, and
    three times as many of the weight, or of the products.
    """
    small = min(rows, columns)
    narrow = solve_dtype(dtype) == torch.float32 and small >= SMALL
    solver = 12 if narrow else 24
    if rows > columns:
        entry = max(24, 8 + solver)
    else:
        made = 8 if damped or side == "inputs" else 0
        factor = 8 if gradients else 0
        copied = moment_dtype(dtype).itemsize if damped and side == "outputs" else 0
        kept = made if solve_dtype(dtype) == torch.float64 else copied
        entry = max(2 * made, made + factor + 8, kept + factor + solver)
        if damped:
            entry = max(entry, made + factor + 12)
    wide = columns if side == "inputs" else small if gradients else 0
    rows = min(PANEL, small)
    panels = wide * (3 * rows + min(PANEL, wide)) + (2 * small * rows if narrow else 0)
    return entry * small * small + _F64 * panels


def basis_bytes(rows: int, columns: int, dtype: torch.dtype, *, gradients: bool = False) -> int:
    """Bytes of a :class:`Decomposition`: its spectrum in fp64 and one or two bases in ``dtype``."""
    side = min(rows, columns)
    bases = 2 if gradients or rows > columns else 1
    return side * (_F64 + dtype.itemsize * side * bases)


def decomposition_flops(
    rows: int, columns: int, side: str, *, gradients: bool = False
) -> dict[str, float]:
    """Operations of the functions above without those of ``eigh``, by the rate that they run at.

    Rates are fields of ``MachineRates``. Symmetric results count their lower half, and products of
    triangles skip the zeros.
    """
    small = min(rows, columns)
    flops = {"moment_flops": 0.0, "wide_flops": 0.0, "solve_flops": 0.0}
    if rows > columns:
        flops["moment_flops"] += rows * columns**2  # W^T W
    elif side == "inputs":
        flops["wide_flops"] += 2.0 * rows * columns**2 + rows**2 * columns  # W H W^T
    if rows > columns or gradients:
        flops["wide_flops"] += (1 / 3 + 1 + 1) * small**3  # Cholesky, L^T M L, one basis
        flops["solve_flops"] += small**3  # the other one
    return flops
