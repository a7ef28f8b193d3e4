"""From a basis to the tensors that a form stores."""

from __future__ import annotations

import torch
from torch import Tensor

from streamcomp.linalg.channel_sharing import AXES, SharedChannels
from streamcomp.linalg.low_rank import fit_left
from streamcomp.linalg.pivot import interpolate
from streamcomp.linalg.symmetric import PANEL

__all__ = ["factor_tensors", "shared_tensors"]


def factor_tensors(form: str, left: Tensor, right: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """W' = left right in ``form``, by the names that the tensors have on disk.

    ``left`` (m, r) and ``right`` (r, n) are overwritten. The r x n factor is rounded to ``dtype``
    first and the other one fitted to it. ``uv``: ``weight`` (r, n) and ``U`` (m, r). ``pivot``:
    ``weight`` (r, n), ``coef`` (m - r, r) and ``pivots`` (m,), the row of [weight; coef weight]
    at which each output row lies.
    """
    if form == "uv":
        left, right = _balanced(left, right)
        rounded = right.to(dtype)
        return {"weight": rounded, "U": fit_left(left, right, rounded).to(dtype).contiguous()}
    pivots, rest, coefficients, square = interpolate(left)
    for columns in right.split(PANEL, dim=1):  # (r, n), the pivot rows of W'
        columns.copy_(square @ columns)
    del square
    rounded = right.to(dtype)
    places = torch.empty(len(left), dtype=torch.int32, device=left.device)
    places[torch.cat((pivots, rest))] = torch.arange(
        len(left), dtype=torch.int32, device=left.device
    )
    return {
        "weight": rounded,
        "coef": fit_left(coefficients, right, rounded).to(dtype).contiguous(),
        "pivots": places,
    }


def shared_tensors(shared: SharedChannels, dtype: torch.dtype) -> dict[str, Tensor]:
    """W' of ``shared`` by the names that the tensors of the form ``shared`` have on disk.

    ``weight`` (r, n) and ``U`` (m, r) as in ``uv``, ``codebook`` (k, n) or (m, k), and ``labels``
    (m,) or (n,), int16 where that holds the number of clusters, else int32.
    """
    clusters = shared.codebook.shape[AXES.index(shared.axis)]
    whole = torch.int16 if clusters <= torch.iinfo(torch.int16).max else torch.int32
    return {
        **factor_tensors("uv", shared.left.clone(), shared.right.clone(), dtype),
        "codebook": shared.codebook.to(dtype).contiguous(),
        "labels": shared.labels.to(whole),
    }


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with columns and rows of equal length: neither over- nor underflows."""
    lengths = left.norm(dim=0), right.norm(dim=1)
    scale = (lengths[0] / lengths[1]).sqrt()
    scale = torch.where(scale.isfinite() & (scale > 0), scale, torch.ones_like(scale))
    left /= scale
    right *= scale[:, None]
    return left, right
