"""Two factors: W' = U V."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamcomp.forms.base import Form
from streamcomp.forms.runtime import LowRankLinear
from streamcomp.linalg.fitting import balanced, fit_left

__all__ = ["Uv"]


class Uv(Form):
    """``weight`` (r, n) is V, ``U`` (m, r)."""

    name = "uv"
    tensors = ("weight", "U")
    rows_tensor = "U"
    module = LowRankLinear

    def shapes(self, rows: int, columns: int, rank: Any) -> dict[str, tuple[Any, Any]]:
        return {"weight": (rank, columns), "U": (rows, rank)}

    def encode(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        storage = self.storage(dtype)
        left, right = balanced(left, right)
        stored = storage.encode("weight", right)
        rounded = storage.decode("weight", stored)
        fitted = storage.encode("U", fit_left(left, right, rounded))
        return stored | {name: tensor.contiguous() for name, tensor in fitted.items()}
