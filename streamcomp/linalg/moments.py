"""Second moments of what flows into or out of a linear.

For rows x_1..x_T in R^n the moment is H = sum_t x_t x_t^T (n x n). It is all that a
whitened decomposition needs to know of the data, and its size does not depend on T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamcomp.linalg.symmetric import exact_products, mirror

__all__ = ["ROWS_PER_UPDATE", "SecondMoment", "moment_flops", "panel_of"]

# Rows cast and multiplied at a time, so that the cast copy stays small next to the moment.
ROWS_PER_UPDATE = 2048


def panel_of(size: int) -> int:
    """Rows of a moment that one product computes: a quarter, 512 at most.

    The square on the diagonal is computed whole: narrow panels multiply less, until they multiply
    slower.
    """
    return min(512, -(-size // 4))


def moment_flops(size: int, rows: int) -> float:
    """Operations of a moment (size, size) over ``rows``: its lower half, in panels."""
    return float(rows) * size * (size + panel_of(size))


class SecondMoment:
    """Running sum of x x^T over rows, of which the lower half is computed, in panels.

    Holds ``size**2`` numbers, and ``ROWS_PER_UPDATE * size`` more during an update whose
    rows come in another dtype. The order of the rows changes nothing but rounding.
    """

    def __init__(self, size: int, *, dtype: torch.dtype, device: torch.device | str) -> None:
        self._lower = torch.zeros(size, size, dtype=dtype, device=device)  # (n, n)

    @property
    def value(self) -> Tensor:
        """The moment (n, n), whole; the same tensor each time."""
        return mirror(self._lower, panel_of(len(self._lower)))

    def update(self, rows: Tensor, shift: Tensor | None = None) -> None:
        """Add ``rows`` of shape (..., n), less ``shift`` (n,) where one is given."""
        size = len(self._lower)
        panel = panel_of(size)
        flat = rows.detach().reshape(-1, size)  # (T, n)
        for first in range(0, flat.shape[0], ROWS_PER_UPDATE):
            part = flat[first : first + ROWS_PER_UPDATE].to(self._lower.dtype)
            if shift is not None:
                part = part - shift.to(part.dtype)
            with exact_products(flat.dtype if shift is None else part.dtype):
                for start in range(0, size, panel):
                    stop = min(start + panel, size)
                    self._lower[start:stop, :stop].addmm_(part[:, start:stop].T, part[:, :stop])
