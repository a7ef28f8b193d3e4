"""What a method is: a weight and a moment in, a decomposition out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from streamcomp.linalg.low_rank import Decomposition

__all__ = ["Method", "Moment", "Side"]

Side = Literal["inputs", "outputs"]


@dataclass(frozen=True)
class Moment:
    """Second moment of a linear's inputs, H (n, n), or of its outputs, K (m, m)."""

    side: Side
    value: Tensor


class Method(Protocol):
    """Decomposes one linear at a time; knows no model and no file."""

    @property
    def name(self) -> str:
        """As ``--method`` spells it."""

    def decompose(self, weight: Tensor, moment: Moment) -> Decomposition:
        """Directions and energies of ``weight`` (m, n), for every rank at once."""
