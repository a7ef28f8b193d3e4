"""From a basis to the tensors that a form stores."""

from __future__ import annotations

import torch
from torch import Tensor

from streamcomp.linalg.low_rank import ROWS_AT_ONCE, fit_left
from streamcomp.linalg.pivot import interpolate

__all__ = ["factor_tensors"]


def factor_tensors(
    form: str, weight: Tensor, basis: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """W' = B B^T W in ``form``, by the names that the tensors have on disk.

    ``weight`` (m, n), ``basis`` B (m, r) with orthonormal columns. The r x n factor is
    rounded to ``dtype`` first and the other one fitted to it. ``uv``: ``weight`` (r, n) and
    ``U`` (m, r). ``pivot``: ``weight`` (r, n), ``coef`` (m - r, r) and ``pivots`` (m,), the
    row of [weight; coef weight] at which each output row lies.
    """
    right = torch.zeros(basis.shape[1], weight.shape[1], dtype=basis.dtype, device=basis.device)
    for start in range(0, len(basis), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        right.addmm_(basis[rows].T, weight[rows].to(basis.dtype))  # (r, n)
    if form == "uv":
        rounded = right.to(dtype)
        return {"weight": rounded, "U": fit_left(basis, right, rounded).to(dtype).contiguous()}
    pivots, rest, coefficients = interpolate(basis)
    right = basis[pivots] @ right  # (r, n), the pivot rows of W'
    rounded = right.to(dtype)
    places = torch.empty(len(basis), dtype=torch.int32, device=basis.device)
    places[torch.cat((pivots, rest))] = torch.arange(
        len(basis), dtype=torch.int32, device=basis.device
    )
    return {
        "weight": rounded,
        "coef": fit_left(coefficients, right, rounded).to(dtype).contiguous(),
        "pivots": places,
    }
