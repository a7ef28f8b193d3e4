"""What a method is: a weight and a moment in, a decomposition out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from streamcomp.linalg.low_rank import Decomposition

__all__ = ["GradientMoment", "Method", "Moment", "Side"]

Side = Literal["inputs", "outputs"]


@dataclass(frozen=True)
class GradientMoment:
    """What the loss's gradients G = dL/dY do at one linear (m x n), on its smaller side.

    ``value`` is Gamma = G G^T (m, m) for m <= n, else the moment of W^T g (n, n); ``energy`` is
    tr(Gamma) in either case.
    """

    value: Tensor
    energy: float


@dataclass(frozen=True)
class Moment:
    """Second moment of a linear's inputs, H (n, n), or of its outputs, K (m, m).

    ``total`` is the sum of the ``rows`` that it was taken over, where a centred method needs it.
    """

    side: Side
    value: Tensor
    rows: int = 0
    total: Tensor | None = None
    gradient: GradientMoment | None = None

    def leaves_open(self, directions: int) -> bool:
        """Whether it has fewer rows than there are ``directions``, and so says nothing of some."""
        return 0 < self.rows < directions


class Method(Protocol):
    """Decomposes one linear at a time; knows no model and no file."""

    @property
    def name(self) -> str:
        """As ``--method`` spells it."""

    def decompose(self, weight: Tensor, moment: Moment, damping: float) -> Decomposition:
        """Directions and energies of ``weight`` (m, n), for every rank at once.

        ``damping`` is relative to the mean of a moment's diagonal; 0 is the method's own choice.
        """
