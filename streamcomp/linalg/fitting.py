"""Left factors fitted to data, or to a right factor that was rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from streamcomp.linalg.symmetric import PANEL, exact_products, mirror

__all__ = ["balanced", "fit_left", "refit_left"]


def refit_left(
    outputs: Tensor, inner: Tensor, ridge: float = 1e-6, towards: Tensor | None = None
) -> Tensor:
    """The left factor U (m, r) that minimises ||Y - U Z||^2 + eps ||U - U0||^2 (SVD-LLM's update).

    The right factor V is fixed, Z = V X^ are its outputs on the compressed stream's inputs, and
    Y = W X are the dense stream's outputs. ``outputs`` is Y Z^T (m, r), ``inner`` Z Z^T (r, r),
    eps is ``ridge`` times the mean of its diagonal. ``towards`` is the former factor U0 (m, r),
    by default zero: directions that the data leaves open stay as they were, and ||Y - U Z|| never
    grows.
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


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Scale the columns of one factor and the rows of the other to equal lengths.

    Then neither overflows nor underflows in a narrow dtype. ``left`` (m, r) and ``right`` (r, n)
    are overwritten.
    """
    lengths = left.norm(dim=0), right.norm(dim=1)
    scale = (lengths[0] / lengths[1]).sqrt()
    scale = torch.where(scale.isfinite() & (scale > 0), scale, torch.ones_like(scale))
    left /= scale
    right *= scale[:, None]
    return left, right


def fit_left(left: Tensor, right: Tensor, rounded: Tensor) -> Tensor:
    """The left factor (k, r) that minimises ||left right - L rounded||_F over L.

    ``rounded`` (r, n) is ``right`` (r, n) rounded to its stored dtype; L corrects the rounding
    where it can. Only the small correction to ``left`` (k, r) is solved for, in its dtype, with a
    ridge as large as its Cholesky factorisation needs; it is never worse than no correction.
    ``left`` is overwritten, and the product (k, n) is never formed. Holds three r x r matrices and
    ``PANEL`` columns of ``right``.
    """
    correction = _ridged(*_products_of_rounded(right, rounded))
    with exact_products(rounded.dtype):  # the correction is as small as the rounding
        for rows in left.split(PANEL):
            rows += rows @ correction
    return left


def _products_of_rounded(right: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor]:
    """V~ V~^T and (V - V~) V~^T, (r, r) both, for V (r, n) and its rounded V~."""
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
    """cross (inner + eps I)^-1 with the smallest eps that works, in place; 0 where none does."""
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
