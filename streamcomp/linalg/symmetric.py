"""Products, Cholesky factors and eigenvectors of symmetric matrices, in little memory.

A linear of a 70B model has moments of 8192 x 8192: 0.5 GiB each in fp64. So products are formed in
panels, factors overwrite their input, and of what is symmetric one half is computed.

**Eigenvectors in fp32.** A moment of a language model is graded: a few directions (massive
activations) hold 10^4 to 10^8 times the energy of the median one. A solver in fp32 is wrong by
about 10^-7 of the largest energy in every direction, which drowns the small ones. Here the
dominant directions are found first, by subspace iteration that ends in fp64, and taken out by a
similarity transform (a block Householder reflection); what is left has energies of like size, and
fp32 serves it well, in half the time and memory of fp64. The measured loss over the best one is in
``benchmarks/decompositions.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from streamcomp.errors import NonFiniteError
from streamcomp.linalg.dtypes import solve_dtype

__all__ = [
    "PANEL",
    "SMALL",
    "cholesky",
    "eigh",
    "exact_products",
    "gram",
    "mirror",
    "sandwich",
]

# Rows or columns of a matrix that are worked on at a time.
PANEL = 1024

# Directions that are taken out before fp32 does the rest, and how they are looked for.
_DOMINANT = 32
_OVERSAMPLED = 16
_ITERATIONS, _CORRECTIONS = 6, 2  # in fp32, in fp64
# Below this size fp64 is as fast.
SMALL = 1024
# What the eigenvectors may miss of the matrix as a vector sees it, relative to the result or to
# this share of the largest eigenvalue.
_RESIDUAL, _ROUNDING = 1e-4, 1e-8


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """For products in fp32 of matrices cast from ``dtype``: the units of narrower numbers do them.

    Numbers of half precision that were cast to fp32 lose nothing where such a unit rounds them
    (bf16 on the CPU, TF32 on a GPU), and it adds up in fp32. Other dtypes, and processors
    without such a unit, multiply in fp32 as ever.
    """
    with ExitStack() as stack:
        if dtype == torch.bfloat16:
            backend: Any = torch.backends.mkldnn  # its attributes are known at run time alone
            stack.enter_context(_precision(backend.matmul, "bf16"))
        if solve_dtype(dtype) == torch.float32 and torch.cuda.is_available():
            stack.enter_context(_precision(torch.backends.cuda.matmul, "tf32"))
        yield


@contextmanager
def _precision(products: Any, name: str) -> Iterator[None]:
    before = products.fp32_precision
    products.fp32_precision = name
    try:
        yield
    finally:
        products.fp32_precision = before


def gram(matrix: Tensor) -> Tensor:
    """A^T A (n, n) in fp64 of A (m, n), ``PANEL`` rows at a time.

    Products of half-precision numbers are exact in fp32: they are added up there within a panel,
    and in fp64 across panels. Holds the result and two panels.
    """
    size, panel = matrix.shape[1], (PANEL + 1) // 2  # narrow ones multiply less next to it
    result = torch.zeros(size, size, dtype=torch.float64, device=matrix.device)
    for rows in matrix.split(PANEL):
        wide = rows.to(solve_dtype(matrix.dtype))
        for start in range(0, size, panel):
            stop = min(start + panel, size)
            with exact_products(matrix.dtype):
                result[start:stop, :stop] += wide[:, start:stop].T @ wide[:, :stop]
    return mirror(result, panel)


def sandwich(outer: Tensor, inner: Tensor, *, lower: bool = False) -> Tensor:
    """A M A^T (p, p) in fp64 of A (p, q) and a symmetric M (q, q), whatever their dtypes.

    With ``lower``, A is a lower triangle L (q, q) and L^T M L is meant; then no zero is multiplied.
    Holds the result, ``PANEL`` rows of the product A M and as many of either matrix.
    """
    size = outer.shape[1] if lower else outer.shape[0]
    result = torch.empty(size, size, dtype=torch.float64, device=outer.device)

    def rows(start: int) -> Tensor:
        """Rows of A (of L^T, without the zeros before column ``start``) from ``start`` on."""
        stop = min(start + PANEL, size)
        piece = outer[start:, start:stop].T if lower else outer[start:stop]
        return piece.double()

    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        first = start if lower else 0
        left = rows(start)  # (panel, q - first)
        product = left.new_zeros(len(left), len(inner) - first)
        for begin in range(first, len(inner), PANEL):
            end = min(begin + PANEL, len(inner))
            piece = inner[begin:end, first:].double()
            product.addmm_(left[:, begin - first : end - first], piece)
        for other in range(start, size, PANEL):
            right = rows(other)
            part = product[:, other - start :] if lower else product
            result[other : other + len(right), start:stop] = right @ part.T
    return mirror(result)


def cholesky(moment: Tensor, added: float = 0.0) -> Tensor | None:
    """The lower fp64 factor of ``moment`` (n, n) + ``added`` I; None if there is none.

    Holds the factor alone.
    """
    factor = moment.to(torch.float64, copy=True)
    factor.diagonal().add_(added)
    columns = factor.mT  # symmetric, and as LAPACK wants it: overwritten without a copy
    info = torch.empty((), dtype=torch.int32, device=factor.device)
    torch.linalg.cholesky_ex(columns, out=(columns, info))
    return None if int(info) else columns


def eigh(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,) fp64, descending, and eigenvectors (n, n) in ``dtype``.

    The symmetric ``matrix`` (n, n) fp64 is overwritten. In fp32 the dominant directions are taken
    out first, as the module says. Bytes per entry, ``matrix`` among them: 24 for fp64, whose
    solver has a workspace of two matrices, and 12 for fp32. NonFiniteError where the solver fails.
    """
    try:
        if dtype == torch.float64 or len(matrix) < SMALL:
            values, vectors = _in_place(matrix)
            return values.flip(0), vectors.flip(1).to(dtype)
        return _graded(matrix)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NonFiniteError(f"an eigendecomposition failed: {error}") from None


def _graded(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`eigh` in fp32 behind a deflation in fp64."""
    size, count = len(matrix), _DOMINANT
    scale = float(matrix.diagonal().max())  # into the range of fp32
    scale = scale if scale > 0 else 1.0
    matrix /= scale
    reflector, middle = _reflection(_dominant(matrix)[:, :count])
    # H^T A H with H = I - V T V^T, as a symmetric update of rank 2k
    product = matrix @ (reflector @ middle)  # A V T
    half = product - 0.5 * reflector @ (middle.T @ (reflector.T @ product))
    matrix.addmm_(half, reflector.T, alpha=-1).addmm_(reflector, half.T, alpha=-1)
    few, turned = torch.linalg.eigh(matrix[:count, :count])
    # what couples both parts is between directions that are all kept, and is left out
    rest = matrix[count:, count:].float()
    probe = torch.ones(size - count, dtype=torch.float64, device=matrix.device)
    probe[1::2] = -1
    seen = matrix[count:, count:] @ probe
    matrix.set_()  # type: ignore[call-overload]  # nothing of it is needed any more
    values, vectors = _in_place(rest)
    part = vectors @ (values * (vectors.T @ probe.float()))
    noise = _ROUNDING * size**0.5 * float(few[-1])  # of fp64, where nothing else is left
    if not float((part - seen).norm()) <= _RESIDUAL * max(float(seen.norm()), noise):
        raise NonFiniteError("an eigendecomposition in fp32 did not converge")
    result = torch.zeros(size, size, dtype=torch.float32, device=rest.device)
    result[:count, :count] = turned
    result[count:, count:] = vectors
    del rest, vectors
    narrow = reflector.float()
    for columns in result.split(PANEL, dim=1):
        columns.addmm_(narrow, middle.float() @ (narrow.T @ columns), alpha=-1)
    eigenvalues = scale * torch.cat((few, values.double()))
    order = eigenvalues.argsort(descending=True)
    return eigenvalues[order], _permuted(result, order)


def _dominant(matrix: Tensor) -> Tensor:
    """Orthonormal directions (n, k) of the largest energies, the largest first.

    Looked for in fp32, of which ``matrix`` (n, n) is copied, and corrected in fp64.
    """
    random = torch.Generator().manual_seed(0)
    width = _DOMINANT + _OVERSAMPLED
    basis = torch.randn(len(matrix), width, generator=random, dtype=torch.float64)
    basis = basis.to(matrix.device)
    narrow = matrix.float()
    for _ in range(_ITERATIONS):
        # in this order of the factors BLAS is half as fast again
        basis = torch.linalg.qr((basis.float().T @ narrow).T.double()).Q
    del narrow
    for _ in range(_CORRECTIONS):
        basis = torch.linalg.qr((basis.T @ matrix).T).Q
    turned: Tensor = torch.linalg.eigh(basis.T @ (matrix @ basis)).eigenvectors
    return basis @ turned.flip(1)


def _reflection(basis: Tensor) -> tuple[Tensor, Tensor]:
    """V (n, k) and T (k, k) of H = I - V T V^T, orthogonal, whose first k columns span ``basis``.

    The compact WY form of the Householder reflections of a QR decomposition (Schreiber and Van
    Loan, SIAM J. Sci. Stat. Comput. 10, 1989).
    """
    packed, scales = torch.geqrf(basis)
    count = basis.shape[1]
    reflector = packed.tril(-1)
    reflector.diagonal().fill_(1)
    inverse = (reflector.T @ reflector).triu()
    inverse.diagonal().copy_(1 / scales)
    unit = torch.eye(count, dtype=basis.dtype, device=basis.device)
    middle = torch.linalg.solve_triangular(inverse, unit, upper=True)
    return reflector, middle


def _in_place(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues, and eigenvectors that overwrite ``matrix`` (symmetric, contiguous)."""
    columns = matrix.mT
    values = torch.empty(len(matrix), dtype=matrix.dtype, device=matrix.device)
    torch.linalg.eigh(columns, out=(values, columns))
    if not bool(values.sum().isfinite()):
        raise NonFiniteError("an eigendecomposition did not converge")
    return values, columns


def _permuted(matrix: Tensor, order: Tensor) -> Tensor:
    """Columns of ``matrix`` in ``order``, ``PANEL`` rows at a time."""
    for rows in matrix.split(PANEL):
        rows.copy_(rows[:, order])
    return matrix


def mirror(matrix: Tensor, panel: int | None = None) -> Tensor:
    """The lower half of ``matrix``, whose panels on the diagonal are whole, copied to the upper."""
    panel = panel or PANEL
    for start in range(0, len(matrix), panel):
        stop = start + panel
        matrix[:start, start:stop] = matrix[start:stop, :start].T
    return matrix
