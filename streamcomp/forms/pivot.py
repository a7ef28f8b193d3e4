"""Pivot rows and coefficients: W' = P [W_p; C W_p], in r (m + n - r) numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamcomp.forms.base import Form
from streamcomp.forms.runtime import PivotLinear
from streamcomp.linalg.fitting import fit_left
from streamcomp.linalg.pivot import interpolate
from streamcomp.linalg.symmetric import PANEL

__all__ = ["Pivot"]


class Pivot(Form):
    """``weight`` (r, n) is W_p, ``coef`` (m - r, r) is C, and ``pivots`` (m,) int32 is P.

    ``pivots`` holds for each output row its row in [W_p; C W_p] (:mod:`streamcomp.linalg.pivot`).
    """

    name = "pivot"
    source = "PIFA (arXiv 2501.19090)"
    tensors = ("weight", "coef", "pivots")
    rows_tensor = "pivots"
    module = PivotLinear

    def shapes(self, rows: int, columns: int, rank: Any) -> dict[str, tuple[Any, Any]]:
        return {"weight": (rank, columns), "coef": (rows - rank, rank)}

    def extra_bytes(self, rows: int, columns: int) -> int:
        return 4 * rows

    def encode(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        storage = self.storage(dtype)
        pivots, rest, coefficients, square = interpolate(left)
        for columns in right.split(PANEL, dim=1):  # (r, n), the pivot rows of W'
            columns.copy_(square @ columns)
        del square
        stored = storage.encode("weight", right)
        rounded = storage.decode("weight", stored)
        places = torch.empty(len(left), dtype=torch.int32, device=left.device)
        places[torch.cat((pivots, rest))] = torch.arange(
            len(left), dtype=torch.int32, device=left.device
        )
        fitted = storage.encode("coef", fit_left(coefficients, right, rounded))
        others = {name: tensor.contiguous() for name, tensor in fitted.items()}
        return stored | others | {"pivots": places}

    def encoding_flops(self, rows: int, columns: int, rank: int) -> dict[str, float]:
        """A fit of m - r rows and, in addition, LU, coefficients and pivot rows."""
        flops = super().encoding_flops(rows - rank, columns, rank)
        flops["solve_flops"] += 2.0 * rank * columns * rank  # the product has all rows
        flops["solve_flops"] += (2 * rows - rank + 2 * columns) * rank**2 + 5 / 3 * rank**3
        return flops
