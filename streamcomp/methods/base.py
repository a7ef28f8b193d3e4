"""What a method is: a weight and a moment in, a decomposition out."""

from __future__ import annotations

from dataclasses import dataclass, replace
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

    ``rows`` is the number of rows that it was taken over. ``least`` is the smallest damping with
    which an earlier linear of its group could factor it
    (:attr:`~streamcomp.linalg.low_rank.Decomposition.least`).
    """

    side: Side
    value: Tensor
    rows: int = 0
    gradient: GradientMoment | None = None
    least: float = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether nothing ever ran through the linear: then it says nothing of its weights."""
        return self.rows == 0

    def leaves_open(self, directions: int) -> bool:
        """Whether it has fewer rows than there are ``directions``, and so says nothing of some."""
        return 0 < self.rows < directions

    def knowing(self, found: Decomposition) -> Moment:
        """The same moment, with what the decomposition ``found`` has shown of it."""
        return replace(self, least=max(self.least, found.least))


class Method(Protocol):
    """Decomposes one linear at a time; knows no model and no file."""

    @property
    def name(self) -> str:
        """As ``--method`` spells it."""

    @property
    def source(self) -> str:
        """Where it was published."""

    def decompose(
        self, weight: Tensor, moment: Moment, damping: float, rank: int | None = None
    ) -> Decomposition:
        """Directions and energies of ``weight`` (m, n), for every rank at once, or up to ``rank``.

        ``damping`` is relative to the mean of a moment's diagonal; 0 is the method's own choice.
        """
