"""Low-rank approximation of a linear in the metric of its inputs.

For W (m x n) and inputs X (n x T) with H = X X^T, find W' of rank r that minimises
||W X - W' X||_F. With H = S S^T this is the truncated SVD of W S (SVD-LLM,
arXiv 2403.07378, section 3.1); it is also the PCA of the outputs Y = W X (LLM-ROM,
arXiv 2312.07046, section 3): with U_r the top eigenvectors of W H W^T, W' = U_r U_r^T W.

So every solution here is a *basis* of output directions, best first, and a *spectrum*: energies
sigma^2 in the same order. The loss at rank r is the sum of the energies after the r-th, and one
decomposition serves every rank. It is always the smaller side that is decomposed:

- m <= n: the eigenvectors of K = Y Y^T (m x m) are the basis;
- m > n: with H = L L^T, the eigenvectors V of L^T W^T W L (n x n) give the basis
  W L V Lambda^-1/2, and W' = (W L V_r)(V_r^T L^-1): W as it is, between two mixes of its inputs.

**Two-sided** whitening looks at what an error does to the model's loss: with the gradients
G = dL/dY (m x T) and Gamma = G G^T it minimises ||Gamma^1/2 (W - W') H^1/2||_F, whose cut
energies are second-order losses of the model and so compare across linears (OBD-LLM,
arXiv 2604.00821). One factor cancels, and again the smaller side is enough:

- m <= n: with Gamma = R^T R, the eigenvectors U of R K R^T give W' = (R^-1 U_r)(U_r^T R W);
- m > n: with H = S S^T and K' = W^T Gamma W, the moment of W^T g (n x n), the eigenvectors V of
  S^T K' S give W' = (W S V_r)(V_r^T S^-1).

With Gamma = I both are the one-sided solution. Gamma is damped by eps tr(Gamma)/m I, without
which the directions that the gradients never take would be free.

Moments are factored and multiplied in fp64; eigenvectors and factors are fp32 where the weight is
of half precision, else fp64 (:mod:`streamcomp.linalg.symmetric`). No randomised SVD: at the ranks
used here it costs perplexity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamcomp.linalg.symmetric import (
    PANEL,
    cholesky,
    eigh,
    exact_products,
    gram,
    mirror,
    sandwich,
    solve_dtype,
)

__all__ = [
    "FIRST_DAMPING",
    "GRADIENT_DAMPING",
    "Decomposition",
    "damped_outputs",
    "decompose_inputs",
    "decompose_outputs",
    "decompose_two_sided_inputs",
    "decompose_two_sided_outputs",
    "decompose_weight",
    "fit_left",
    "output_moment",
    "refit_left",
    "times",
]

# Damping starts here, relative to the mean of the moment's diagonal, and grows tenfold.
FIRST_DAMPING = 1e-6
MOST_DAMPING = 1.0

# Directions that are taken out of the metric at a time.
_WIDTH = PANEL // 2

# What is told where even that does not make a moment positive definite.
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
        Columns of the left factor, or where ``mixes`` is set, the matrix A with columns W A.
    right : Tensor of shape (k, m) or (k, n), or None; of as many rows as ``left`` has columns
        The matrix B with rows B W of the right factor, or where ``mixes`` is set, those rows
        themselves. None: the left columns are orthonormal, and the rows are left^T W.
    mixes : bool
        Which of the two sides was decomposed.
    damping : float
        What was added to a moment's diagonal, relative to its mean; 0 if nothing.
    least : float
        Damping that the moment of the inputs took to have a Cholesky factor, where it was factored.
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
    least: float = 0.0

    def factors(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Left (m, r) and right (r, n) factor of the best approximation of ``rank``.

        In the bases' dtype. Both are copies of their own, the left one in the order of columns.
        Holds them and ``PANEL`` rows of ``weight``.
        """
        left = self.left[:, :rank]
        if self.mixes:
            assert self.right is not None
            return times(weight, left), self.right[:rank].clone()
        across = left if self.right is None else self.right[:rank].T
        own = left.mT.clone(memory_format=torch.contiguous_format).mT
        return own, _transposed_times(across, weight)

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

    ``damping`` adds eps W W^T to K, as eps I would be added to H; where K is not positive
    definite in fp64, the least is added in any case: it orders the directions that the data leaves
    open, and no factorisation can fail here. Holds what :func:`eigh` does, and K once more where
    it is damped; K itself may be overwritten with ``spend``.
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
    return _decomposition(values, vectors, None, mixes=False, damping=damping)


def decompose_weight(weight: Tensor) -> Decomposition:
    """Decompose W (m, n) itself, where no data says which inputs count: its truncated SVD.

    As if H = I. Holds what :func:`eigh` does on the smaller side.
    """
    if weight.shape[0] <= weight.shape[1]:
        return decompose_outputs(weight, gram(weight.T), spend=True)
    values, vectors = eigh(gram(weight), solve_dtype(weight.dtype))
    return _decomposition(values, vectors, vectors.T, mixes=True, damping=0.0)


def decompose_inputs(
    weight: Tensor,
    inputs: Tensor,
    damping: float = 0.0,
    *,
    least: float = 0.0,
    rank: int | None = None,
) -> Decomposition:
    """Decompose from the moment H (n, n) of the inputs, on the smaller side of W (m, n).

    ``damping`` adds eps I to H; where H has no Cholesky factor, as much as it takes, of which
    ``least`` is known. Without ``rank``, for every rank. Holds the fp64 factor of H beside what
    :func:`eigh` does, for m > n.
    """
    if weight.shape[0] <= weight.shape[1]:
        return decompose_outputs(weight, output_moment(weight, inputs), damping, spend=True)
    lower, least = _cholesky(inputs, max(damping, least))  # (n, n)
    return _mixing(weight, inputs, lower, gram(weight), least, least, rank)


def decompose_two_sided_outputs(
    weight: Tensor,
    outputs: Tensor,
    gradients: Tensor,
    damping: float = GRADIENT_DAMPING,
    *,
    spend: bool = False,
) -> Decomposition:
    """Two-sided, from the moments of the outputs K and of their gradients Gamma, (m, m) both.

    Meant for m <= n. ``damping`` is added to Gamma, relative to its mean diagonal. Holds the
    fp64 factor of Gamma beside what :func:`eigh` does; K itself may be freed with ``spend``.
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
    return _decomposition(values, vectors, right, mixes=False, damping=damping)


def decompose_two_sided_inputs(
    weight: Tensor,
    inputs: Tensor,
    gradients: Tensor,
    gradient_energy: float,
    damping: float = GRADIENT_DAMPING,
    *,
    least: float = 0.0,
    rank: int | None = None,
) -> Decomposition:
    """Two-sided, from the moments H of the inputs and K' of W^T g, (n, n) both.

    Meant for m > n. ``gradient_energy`` is tr(Gamma), the sum of ||g||^2, by which Gamma is
    damped: K' + eps tr(Gamma)/m W^T W. ``least`` and ``rank`` as in :func:`decompose_inputs`.
    Holds the fp64 factor of H beside what :func:`eigh` does.
    """
    if not gradient_energy > 0:
        return _without_gradients(decompose_inputs(weight, inputs, least=least, rank=rank))
    lower, least = _cholesky(inputs, least)  # S
    outer = gram(weight).mul_(damping * gradient_energy / weight.shape[0]).add_(gradients)
    return _mixing(weight, inputs, lower, outer, max(damping, least), least, rank)


def _mixing(
    weight: Tensor,
    inputs: Tensor,
    lower: Tensor,
    outer: Tensor,
    damping: float,
    least: float,
    rank: int | None,
) -> Decomposition:
    """From the eigenvectors V of S^T C S with S = ``lower`` and C = ``outer``: S V and V^T S^-1.

    Of V as many panels as hold ``rank`` columns: those come out as they do among all.
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
    found = _decomposition(values, left, vectors.T, mixes=True, damping=damping)
    return replace(found, least=least if least < MOST_DAMPING else 0.0)


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
    small correction to ``left`` alone, in its dtype, with as much of a ridge on it as that takes,
    which never makes it worse than none. ``left`` is overwritten, and the product (k, n) never
    formed. Holds three r x r matrices and ``PANEL`` columns of ``right``.
    """
    correction = _ridged(*_products_of_rounded(right, rounded))
    with exact_products(rounded.dtype):  # a correction of the size of that rounding
        for rows in left.split(PANEL):
            rows += rows @ correction
    return left


def _products_of_rounded(right: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor]:
    """V~ V~^T and (V - V~) V~^T, (r, r) both, of V (r, n) and V~ as it is rounded."""
    rank = len(right)
    inner = torch.zeros(rank, rank, dtype=right.dtype, device=right.device)
    cross = torch.zeros_like(inner)
    for start in range(0, right.shape[1], PANEL):
        columns = slice(start, start + PANEL)
        wide = rounded[:, columns].to(right.dtype)
        missing = right[:, columns] - wide  # small: its own rounding does not count
        with exact_products(rounded.dtype):
            cross.addmm_(missing, wide.T)
            for first in range(0, rank, PANEL):
                last = min(first + PANEL, rank)
                inner[first:last, :last].addmm_(wide[first:last], wide[:last].T)
    return mirror(inner), cross


def _ridged(inner: Tensor, cross: Tensor) -> Tensor:
    """cross (inner + eps I)^-1 with the least eps that works, in place; 0 where none does."""
    mean = float(inner.diagonal().mean()) if len(inner) else 0.0
    info = torch.empty((), dtype=torch.int32, device=inner.device)
    ridge = torch.finfo(inner.dtype).eps
    while mean > 0 and ridge < 1:
        factor = inner.clone()
        factor.diagonal().add_(ridge * mean)
        columns = factor.mT
        torch.linalg.cholesky_ex(columns, out=(columns, info))
        if not int(info):
            for rows in cross.split(PANEL):
                rows.copy_(torch.cholesky_solve(rows.mT, columns).mT)
            return cross
        ridge *= 10
    return cross.zero_()


def _decomposition(
    values: Tensor, left: Tensor, right: Tensor | None, *, mixes: bool, damping: float
) -> Decomposition:
    """Values in descending order; rounding below zero counts as zero."""
    most, least = float(values[0]), float(values[-1])
    return Decomposition(
        values.clamp_min(0),
        left,
        right,
        mixes,
        damping,
        most / least if least > 0 else math.inf,
        _NO_METRIC if damping >= MOST_DAMPING else "",
    )


def _without_gradients(found: Decomposition) -> Decomposition:
    """What is done where no gradient ever arrives: the inputs decide, and no loss is expected."""
    spectrum = torch.zeros_like(found.spectrum)
    return replace(found, spectrum=spectrum, fallback="no gradient arrives: one-sided")


def damped_outputs(outputs: Tensor, weight: Tensor, damping: float) -> Tensor:
    """K + eps W W^T (m, m) in K's dtype, as if eps I had been added to H; scaled to K's mean."""
    inner = gram(weight.T)  # (m, m) = W W^T
    trace = inner.trace()
    if trace > 0:
        inner *= damping * outputs.diagonal().sum(dtype=torch.float64) / trace
    return inner.to(outputs.dtype).add_(outputs)


def times(weight: Tensor, mixing: Tensor) -> Tensor:
    """W A (m, r) in A's dtype, ``PANEL`` rows of W (m, n) at a time.

    In the order of columns, in which LU overwrites it without a copy.
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
    """V^T T (k, n) in V's dtype of V (n, k) and an upper triangle T (n, n) in fp64.

    ``PANEL`` columns of T and ``_WIDTH`` of V at a time; what is zero in T is not multiplied.
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
    """Lower fp64 factor of ``moment`` (n, n) with at least ``damping``, and the damping it took."""
    mean = float(moment.diagonal().double().mean())
    while True:
        factor = cholesky(moment, damping * mean if mean > 0 else 0.0)
        if factor is not None:
            return factor, damping
        damping = max(10 * damping, FIRST_DAMPING)
        if damping > MOST_DAMPING or mean <= 0:  # an input that is always zero
            return torch.eye(len(moment), dtype=torch.float64, device=moment.device), MOST_DAMPING
