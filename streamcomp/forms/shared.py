"""Channels that share the entries of a codebook, plus two factors for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from streamcomp.errors import RecipeError
from streamcomp.forms.base import Allowance, Form, Matrix
from streamcomp.forms.runtime import AXES, SharedLinear
from streamcomp.forms.uv import Uv
from streamcomp.linalg.channel_sharing import SharedChannels

__all__ = ["Shared"]

_FEWEST = 3  # rank 1, and a codebook of two channels


class Shared(Form):
    """``weight`` and ``U`` as in :class:`~streamcomp.forms.uv.Uv`, ``codebook`` and ``labels``.

    With k clusters the codebook is (k, n) or (m, k); labels are (m,) or (n,), int16 where that
    holds k, else int32, and count as one number each. The split of numbers between codebook and
    factors is chosen for each weight; until then all are counted as if they were two factors.
    """

    name = "shared"
    is_product = False
    tensors = ("weight", "U", "codebook", "labels")
    rows_tensor = "U"
    module = SharedLinear

    def shapes(self, rows: int, columns: int, rank: Any) -> dict[str, tuple[Any, Any]]:
        return {"weight": (rank, columns), "U": (rows, rank)}

    def can_hold(self, rows: int, columns: int) -> bool:
        return _FEWEST * (rows + columns) < rows * columns

    def nbytes(self, rows: int, columns: int, allowance: Allowance, dtype: torch.dtype) -> int:
        return self.storage(dtype).nbytes(1, allowance.numbers)

    def share_evenly(self, weights: Sequence[Matrix], ratio: float) -> list[Allowance | None]:
        """The excess of weights that stay dense over their share is taken from the others."""
        able = [m for m in weights if self.can_hold(m.rows, m.columns)]
        whole = sum(m.rows * m.columns for m in able)
        dense = sum(m.rows * m.columns for m in weights) - whole
        share = ((1 - ratio) * (whole + dense) - dense) / max(1, whole)
        return [self._share(m, share, ratio) for m in weights]

    def _share(self, weight: Matrix, share: float, ratio: float) -> Allowance | None:
        rows, columns = weight.rows, weight.columns
        if not self.can_hold(rows, columns):
            return None
        fewest, allowed = _FEWEST * (rows + columns), share * (rows * columns)
        if allowed < fewest:
            raise RecipeError(
                f"ratio {ratio:g} leaves {weight.disk_name} {int(allowed)} numbers, "
                f"shared channels take {fewest}: give a smaller ratio"
            )
        return Allowance(max(1, int(allowed) // (rows + columns)), int(allowed))

    def encode(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Refused: a product of two factors has no codebook."""
        raise RecipeError(f"form {self.name} holds no plain product: use encode_channels")

    def encode_channels(self, shared: SharedChannels, dtype: torch.dtype) -> dict[str, Tensor]:
        """``shared``, of a weight in ``dtype``, as the tensors of this form."""
        clusters = shared.codebook.shape[AXES.index(shared.axis)]
        whole = torch.int16 if clusters <= torch.iinfo(torch.int16).max else torch.int32
        codebook = self.storage(dtype).encode("codebook", shared.codebook)
        return {
            **Uv(self.storage).encode(shared.left.clone(), shared.right.clone(), dtype),
            **{name: tensor.contiguous() for name, tensor in codebook.items()},
            "labels": shared.labels.to(whole),
        }
