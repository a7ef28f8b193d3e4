"""Low-rank approximation of a linear in the metric of its inputs.

For W (m x n) and inputs X (n x T) with H = X X^T, find W' of rank r that minimises
||W X - W' X||_F. With H = S S^T this is the truncated SVD of W S (SVD-LLM,
arXiv 2403.07378, section 3.1); it is also the PCA of the outputs Y = W X (LLM-ROM,
arXiv 2312.07046, section 3): with U_r the top eigenvectors of W H W^T, W' = U_r U_r^T W.

So every solution here is an orthonormal *basis* of output directions, best first, and a
*spectrum*: energies sigma^2 in the same order. The loss at rank r is the sum of the
energies after the r-th, and one decomposition serves every rank. It is always the smaller
side that is decomposed:

- m <= n: the eigenvectors of K = Y Y^T (m x m) are the basis;
- m > n: with H = L L^T, the eigenvectors V of M = L^T W^T W L (n x n) give the basis
  W L V Lambda^-1/2, and no inverse of L is needed.

Everything runs in fp64. No randomised SVD: at the ranks used here it costs perplexity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "ROWS_AT_ONCE",
    "Decomposition",
    "decompose_inputs",
    "decompose_outputs",
    "fit_left",
    "output_moment",
]

# Damping starts here, relative to the mean of the moment's diagonal, and grows tenfold.
FIRST_DAMPING = 1e-6
MOST_DAMPING = 1.0

# Rows of a weight that are cast to fp64 at a time.
ROWS_AT_ONCE = 2048

# Columns of a basis may deviate this much from orthonormal before they are made so.
_ORTHONORMAL = 1e-8


@dataclass(frozen=True)
class Decomposition:
    """Output directions of a linear, best first, with their energies.

    Parameters
    ----------
    spectrum : Tensor of shape (k,), fp64, descending, k = min(m, n)
        Energy of each direction: the squared singular values of W H^1/2.
    vectors : Tensor of shape (m, k) or (n, k), fp64
        The basis itself, or where ``mixes`` is set, the matrix B with basis = W B.
    mixes : bool
        Whether ``vectors`` has to be multiplied by the weight from the left.
    damping : float
        What was added to the moment's diagonal, relative to its mean; 0 if nothing.
    """

    spectrum: Tensor
    vectors: Tensor
    mixes: bool
    damping: float

    def basis(self, weight: Tensor, rank: int) -> Tensor:
        """Orthonormal columns spanning the best ``rank`` output directions, (m, r) fp64."""
        if not self.mixes:
            return self.vectors[:, :rank]
        mixing = self.vectors[:, :rank]
        basis = torch.empty(weight.shape[0], rank, dtype=mixing.dtype, device=mixing.device)
        for start in range(0, weight.shape[0], ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            torch.mm(weight[rows].to(mixing.dtype), mixing, out=basis[rows])
        gram = basis.T @ basis  # (r, r)
        gram.diagonal().sub_(1)
        if gram.abs().max() > _ORTHONORMAL:  # tiny energies: columns lost their length
            basis = torch.linalg.qr(basis).Q
        return basis

    def relative_loss(self, rank: int) -> float:
        """||W X - W' X||^2 / ||W X||^2 at ``rank``; 0 for a linear that puts out nothing."""
        total = float(self.spectrum.sum())
        return float(self.spectrum[rank:].sum()) / total if total > 0 else 0.0


def output_moment(weight: Tensor, inputs: Tensor) -> Tensor:
    """K = W H W^T (m, m) in fp64 from W (m, n) and H (n, n)."""
    wide = weight.double()
    return wide @ inputs.double() @ wide.T


def decompose_outputs(weight: Tensor, outputs: Tensor) -> Decomposition:
    """Decompose from the moment K (m, m) of the outputs; meant for m <= n.

    Where K is not positive definite, damping adds eps W W^T to it once, as eps I would to H:
    it orders the directions that the data leaves open, and no factorisation can fail here.
    Holds four m x m fp64 matrices at its peak, LAPACK's workspace among them.
    """
    moment = outputs.double()
    values, vectors = torch.linalg.eigh(moment)
    damping = 0.0
    if values[0] <= 0 < values[-1]:
        damping = FIRST_DAMPING
        inner = _gram(weight.T)  # (m, m) = W W^T
        inner *= damping * moment.trace() / inner.trace()
        values, vectors = torch.linalg.eigh(inner.add_(moment))
    return _decomposition(values, vectors, mixes=False, damping=damping)


def decompose_inputs(weight: Tensor, inputs: Tensor) -> Decomposition:
    """Decompose from the moment H (n, n) of the inputs, on the smaller side of W (m, n).

    Where H has no Cholesky factor, damping adds eps I to it. Holds five n x n fp64
    matrices at its peak for m > n, LAPACK's workspace among them.
    """
    if weight.shape[0] <= weight.shape[1]:
        return decompose_outputs(weight, output_moment(weight, inputs))
    lower, damping = _cholesky(inputs)  # (n, n)
    small = lower.T @ _gram(weight) @ lower  # (n, n) = L^T W^T W L
    values, vectors = torch.linalg.eigh(small)
    if not bool(inputs.diagonal().any()):  # an input that is always zero: nothing is lost
        values = torch.zeros_like(values)
    scale = values.clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    scale[values <= 0] = 0
    vectors *= scale
    return _decomposition(values, lower @ vectors, mixes=True, damping=damping)


def fit_left(left: Tensor, right: Tensor, rounded: Tensor) -> Tensor:
    """The left factor (k, r) that minimises ||left right - L rounded||_F over L.

    ``left`` (k, r), ``right`` and ``rounded`` (r, n): ``rounded`` is ``right`` in the dtype it
    is stored in; the left factor makes up for the rounding where it can. Solved for the
    small correction to ``left`` alone, and the product (k, n) is never formed.
    """
    wide = rounded.double()
    cross = wide @ (right - wide).T  # (r, r): the correction alone, which is small
    gram = wide @ wide.T  # (r, r)
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info):  # rows that rounding made dependent: the least correction is as good as any
        correction: Tensor = torch.linalg.pinv(gram, hermitian=True) @ cross
    else:
        correction = torch.cholesky_solve(cross, factor)
    return left + left @ correction.T


def _decomposition(
    values: Tensor, vectors: Tensor, *, mixes: bool, damping: float
) -> Decomposition:
    """Turn eigh's ascending order around; rounding below zero counts as zero."""
    return Decomposition(values.flip(0).clamp_min(0), vectors.flip(1), mixes, damping)


def _gram(matrix: Tensor) -> Tensor:
    """A^T A (n, n) in fp64 of A (m, n), ``ROWS_AT_ONCE`` rows at a time."""
    gram = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for rows in matrix.split(ROWS_AT_ONCE):
        wide = rows.double()
        gram.addmm_(wide.T, wide)
    return gram


def _cholesky(moment: Tensor) -> tuple[Tensor, float]:
    """Lower fp64 factor of ``moment`` (n, n) and the relative damping it took."""
    wide = moment.double()
    mean = float(wide.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(wide)
    damping = 0.0
    while int(info):
        damping = damping * 10 or FIRST_DAMPING
        if damping > MOST_DAMPING or mean <= 0:  # an input that is always zero
            return torch.eye(len(wide), dtype=wide.dtype, device=wide.device), MOST_DAMPING
        damped = wide.clone()
        damped.diagonal().add_(damping * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
    return factor, damping
