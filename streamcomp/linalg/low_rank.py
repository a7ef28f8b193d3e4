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

**Two-sided** whitening looks at what an error does to the model's loss: with the gradients
G = dL/dY (m x T) and Gamma = G G^T it minimises ||Gamma^1/2 (W - W') H^1/2||_F, whose cut
energies are second-order losses of the model and so compare across linears. One factor
cancels, and again the smaller side is enough:

- m <= n: with Gamma = R^T R, the eigenvectors U of R K R^T give W' = (R^-1 U_r)(U_r^T R W);
- m > n: with H = S S^T and K' = W^T Gamma W, the moment of W^T g (n x n), the eigenvectors V of
  S^T K' S give W' = (W S V_r)(V_r^T S^-1).

With Gamma = I both are the one-sided solution. Gamma is damped by eps tr(Gamma)/m I, without
which the directions that the gradients never take would be free.

Everything runs in fp64. No randomised SVD: at the ranks used here it costs perplexity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = [
    "GRADIENT_DAMPING",
    "ROWS_AT_ONCE",
    "Decomposition",
    "centred",
    "decompose_inputs",
    "decompose_outputs",
    "decompose_two_sided_inputs",
    "decompose_two_sided_outputs",
    "fit_left",
    "output_moment",
    "refit_left",
]

# Damping starts here, relative to the mean of the moment's diagonal, and grows tenfold.
FIRST_DAMPING = 1e-6
MOST_DAMPING = 1.0

# What is told where even that does not make a moment positive definite.
_NO_METRIC = "its moment has no Cholesky factor even when damped: all directions count alike"

# Added to the gradients' moment, relative to the mean of its diagonal.
GRADIENT_DAMPING = 1e-2

# Rows of a weight that are cast to fp64 at a time.
ROWS_AT_ONCE = 2048

# Columns of a basis may deviate this much from orthonormal before they are made so.
_ORTHONORMAL = 1e-8


@dataclass(frozen=True)
class Decomposition:
    """The factors of a linear W (m x n) for every rank at once, best directions first.

    Parameters
    ----------
    spectrum : Tensor of shape (k,), fp64, descending, k = min(m, n)
        Energy of each direction: the squared singular values of the whitened weight.
    left : Tensor of shape (m, k) or (n, k)
        Columns of the left factor, or where ``mixes`` is set, the matrix A with columns W A.
    right : Tensor of shape (k, m) or (k, n), or None
        The matrix B with rows B W of the right factor, or where ``mixes`` is set, those rows
        themselves. None: the left columns are orthonormal, and the rows are left^T W.
    mixes : bool
        Which of the two sides was decomposed.
    damping : float
        What was added to a moment's diagonal, relative to its mean; 0 if nothing.
    condition : float
        Largest over smallest eigenvalue of the moment that was decomposed, its damping included;
        infinite where the moment is singular.
    fallback : str
        What was done because the data did not allow the method itself; empty if nothing.
    """

    spectrum: Tensor
    left: Tensor
    right: Tensor | None
    mixes: bool
    damping: float
    condition: float = math.nan
    fallback: str = ""

    def factors(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Left (m, r) and right (r, n) factor of the best approximation of ``rank``, fp64."""
        left = self.left[:, :rank].double()
        if self.mixes:
            left = _times(weight, left)
        if self.right is None:
            if self.mixes:
                left = _orthonormal(left)
            return left, _transposed_times(left, weight)
        right = self.right[:rank].double()
        return left, right if self.mixes else _transposed_times(right.T, weight)

    def relative_loss(self, rank: int) -> float:
        """Share of the whole energy that is lost at ``rank``; 0 where there is no energy.

        One-sided, this is ||W X - W' X||^2 / ||W X||^2.
        """
        total = float(self.spectrum.sum())
        return float(self.spectrum[rank:].sum()) / total if total > 0 else 0.0


def output_moment(weight: Tensor, inputs: Tensor) -> Tensor:
    """K = W H W^T (m, m) in fp64 from W (m, n) and H (n, n)."""
    wide = weight.double()
    return wide @ inputs.double() @ wide.T


def decompose_outputs(weight: Tensor, outputs: Tensor, damping: float = 0.0) -> Decomposition:
    """Decompose from the moment K (m, m) of the outputs; meant for m <= n.

    ``damping`` adds eps W W^T to K, as eps I would be added to H; where K is not positive
    definite, the least is added in any case: it orders the directions that the data leaves open,
    and no factorisation can fail here. Holds four m x m fp64 matrices at its peak, LAPACK's
    workspace among them.
    """
    moment = outputs.double()
    values, vectors = torch.linalg.eigh(_damped(moment, weight, damping) if damping else moment)
    if values[0] <= 0 < values[-1] and not damping:
        damping = FIRST_DAMPING
        values, vectors = torch.linalg.eigh(_damped(moment, weight, damping))
    return _decomposition(values, vectors, None, mixes=False, damping=damping)


def decompose_inputs(weight: Tensor, inputs: Tensor, damping: float = 0.0) -> Decomposition:
    """Decompose from the moment H (n, n) of the inputs, on the smaller side of W (m, n).

    ``damping`` adds eps I to H; where H has no Cholesky factor, as much as it takes. Holds five
    n x n fp64 matrices at its peak for m > n, LAPACK's workspace among them.
    """
    if weight.shape[0] <= weight.shape[1]:
        return decompose_outputs(weight, output_moment(weight, inputs), damping)
    lower, damping = _cholesky(inputs, damping)  # (n, n)
    small = lower.T @ _gram(weight) @ lower  # (n, n) = L^T W^T W L
    values, vectors = torch.linalg.eigh(small)
    if not bool(inputs.diagonal().any()):  # an input that is always zero: nothing is lost
        values = torch.zeros_like(values)
    scale = values.clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    scale[values <= 0] = 0
    vectors *= scale
    return _decomposition(values, lower @ vectors, None, mixes=True, damping=damping)


def decompose_two_sided_outputs(
    weight: Tensor, outputs: Tensor, gradients: Tensor, damping: float = GRADIENT_DAMPING
) -> Decomposition:
    """Two-sided, from the moments of the outputs K and of their gradients Gamma, (m, m) both.

    Meant for m <= n. ``damping`` is added to Gamma, relative to its mean diagonal. Holds six
    m x m fp64 matrices at its peak, LAPACK's workspace among them.
    """
    if not float(gradients.diagonal().sum()) > 0:
        return _without_gradients(decompose_outputs(weight, outputs))
    lower, damping = _cholesky(gradients, damping)  # R = lower^T
    small = lower.T @ outputs.double() @ lower  # (m, m) = R K R^T
    values, vectors = torch.linalg.eigh(small)
    if values[0] <= 0 < values[-1]:
        small = lower.T @ _damped(outputs.double(), weight, FIRST_DAMPING) @ lower
        values, vectors = torch.linalg.eigh(small)
    right = vectors.T @ lower.T
    left = torch.linalg.solve_triangular(lower.T, vectors, upper=True)
    return _decomposition(values, left, right, mixes=False, damping=damping)


def decompose_two_sided_inputs(
    weight: Tensor,
    inputs: Tensor,
    gradients: Tensor,
    gradient_energy: float,
    damping: float = GRADIENT_DAMPING,
) -> Decomposition:
    """Two-sided, from the moments H of the inputs and K' of W^T g, (n, n) both.

    Meant for m > n. ``gradient_energy`` is tr(Gamma), the sum of ||g||^2, by which Gamma is
    damped: K' + eps tr(Gamma)/m W^T W. Holds six n x n fp64 matrices at its peak, LAPACK's
    workspace among them.
    """
    if not gradient_energy > 0:
        return _without_gradients(decompose_inputs(weight, inputs))
    lower, least = _cholesky(inputs)  # S
    outer = _gram(weight).mul_(damping * gradient_energy / weight.shape[0])
    values, vectors = torch.linalg.eigh(lower.T @ outer.add_(gradients) @ lower)  # S^T K' S
    if not bool(inputs.diagonal().any()):
        values = torch.zeros_like(values)
    right = torch.linalg.solve_triangular(lower, vectors.T, upper=False, left=False)  # V^T S^-1
    return _decomposition(values, lower @ vectors, right, mixes=True, damping=max(damping, least))


def centred(moment: Tensor, total: Tensor, rows: int) -> Tensor:
    """The moment of rows less their mean, fp64, from their moment, sum and number."""
    wide = total.double()
    return moment.double() - torch.outer(wide, wide) / rows


def refit_left(
    outputs: Tensor, inner: Tensor, ridge: float = 1e-6, towards: Tensor | None = None
) -> Tensor:
    """The left factor U (m, r) that minimises ||Y - U Z||^2 + eps ||U - U0||^2 (SVD-LLM's update).

    With the right factor V fixed, Z = V X^ is what it makes of the compressed stream's inputs and
    Y = W X are the dense stream's outputs. ``outputs`` is Y Z^T (m, r), ``inner`` Z Z^T (r, r),
    eps is ``ridge`` times the mean of its diagonal. ``towards`` is the factor U0 (m, r) as it was,
    or zero: the directions that the data leaves open stay, and ||Y - U Z|| never grows.
    """
    wide = inner.double()
    if towards is not None:
        before = towards.double()
        return before + refit_left(outputs.double() - before @ wide, wide, ridge)
    mean = float(wide.diagonal().mean())
    damped = wide.clone()
    damped.diagonal().add_(ridge * mean if mean > 0 else 1.0)
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info):
        solved: Tensor = outputs.double() @ torch.linalg.pinv(damped, hermitian=True)
        return solved
    return torch.cholesky_solve(outputs.double().T, factor).T


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
    values: Tensor, left: Tensor, right: Tensor | None, *, mixes: bool, damping: float
) -> Decomposition:
    """Turn eigh's ascending order around; rounding below zero counts as zero."""
    least, most = float(values[0]), float(values[-1])
    return Decomposition(
        values.flip(0).clamp_min(0),
        left.flip(1),
        None if right is None else right.flip(0),
        mixes,
        damping,
        most / least if least > 0 else math.inf,
        _NO_METRIC if damping >= MOST_DAMPING else "",
    )


def _without_gradients(found: Decomposition) -> Decomposition:
    """What is done where no gradient ever arrives: the inputs decide, and no loss is expected."""
    spectrum = torch.zeros_like(found.spectrum)
    return replace(found, spectrum=spectrum, fallback="no gradient arrives: one-sided")


def _damped(moment: Tensor, weight: Tensor, damping: float) -> Tensor:
    """K + eps W W^T (m, m), as if eps I had been added to H; scaled to K's mean diagonal."""
    inner = _gram(weight.T)  # (m, m) = W W^T
    trace = inner.trace()
    if trace > 0:
        inner *= damping * moment.trace() / trace
    return inner.add_(moment)


def _orthonormal(basis: Tensor) -> Tensor:
    """``basis`` (m, r), its columns made orthonormal where tiny energies cost them that."""
    gram = basis.T @ basis  # (r, r)
    gram.diagonal().sub_(1)
    return torch.linalg.qr(basis).Q if gram.abs().max() > _ORTHONORMAL else basis


def _times(weight: Tensor, mixing: Tensor) -> Tensor:
    """W A (m, r) in A's dtype, ``ROWS_AT_ONCE`` rows of W (m, n) at a time."""
    product = torch.empty(
        weight.shape[0], mixing.shape[1], dtype=mixing.dtype, device=mixing.device
    )
    for start in range(0, weight.shape[0], ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        torch.mm(weight[rows].to(mixing.dtype), mixing, out=product[rows])
    return product


def _transposed_times(left: Tensor, weight: Tensor) -> Tensor:
    """left^T W (r, n) in left's dtype, ``ROWS_AT_ONCE`` rows of W (m, n) at a time."""
    product = torch.zeros(left.shape[1], weight.shape[1], dtype=left.dtype, device=left.device)
    for start in range(0, len(left), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        product.addmm_(left[rows].T, weight[rows].to(left.dtype))
    return product


def _gram(matrix: Tensor) -> Tensor:
    """A^T A (n, n) in fp64 of A (m, n), ``ROWS_AT_ONCE`` rows at a time."""
    gram = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for rows in matrix.split(ROWS_AT_ONCE):
        wide = rows.double()
        gram.addmm_(wide.T, wide)
    return gram


def _cholesky(moment: Tensor, damping: float = 0.0) -> tuple[Tensor, float]:
    """Lower fp64 factor of ``moment`` (n, n) with at least ``damping``, and the damping it took."""
    wide = moment.double()
    mean = float(wide.diagonal().mean())
    while True:
        damped = wide
        if damping and mean > 0:
            damped = wide.clone()
            damped.diagonal().add_(damping * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
        if not int(info):
            return factor, damping
        damping = max(10 * damping, FIRST_DAMPING)
        if damping > MOST_DAMPING or mean <= 0:  # an input that is always zero
            return torch.eye(len(wide), dtype=wide.dtype, device=wide.device), MOST_DAMPING
