"""Two-sided whitening: errors are weighed by the inputs' moment and by the loss's gradients.

Published as OBD-LLM (arXiv 2604.00821) and, with an output side from the most likely tokens alone,
as IO-SVD (arXiv 2605.15626). Both need an m x m and an n x n matrix for each linear; on the smaller
side one of the two cancels (:mod:`streamcomp.linalg.low_rank`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamcomp.methods.base import Moment
from streamcomp.methods.low_rank import LowRank

if TYPE_CHECKING:
    from torch import Tensor

    from streamcomp.linalg.low_rank import Decomposition

__all__ = ["TwoSided"]


class TwoSided(LowRank):
    """Minimises ||Gamma^1/2 (W - W') H^1/2||_F, a loss that compares across linears."""

    name = "two-sided"
    source = "OBD-LLM (arXiv 2604.00821), IO-SVD (arXiv 2605.15626)"
    statistics = ("dense",)
    settings = ("store_every",)
    needs_gradients = True
    losses_compare = True

    @property
    def default_damping(self) -> float:
        from streamcomp.linalg.low_rank import GRADIENT_DAMPING

        return GRADIENT_DAMPING

    def decompose(
        self, weight: Tensor, moment: Moment, damping: float, rank: int | None = None
    ) -> Decomposition:
        from streamcomp.linalg import low_rank

        damping, gradient = damping or self.default_damping, moment.gradient
        assert gradient is not None
        if weight.shape[0] > weight.shape[1]:
            return low_rank.decompose_two_sided_inputs(
                weight,
                moment.value,
                gradient.value,
                gradient.energy,
                damping,
                min_damping=moment.min_damping,
                rank=rank,
            )
        outputs = moment.value
        if moment.side == "inputs":
            outputs = low_rank.output_moment(weight, outputs)
        if moment.leaves_open(weight.shape[0]):
            outputs = low_rank.damped_outputs(outputs, weight, low_rank.FIRST_DAMPING)
        return low_rank.decompose_two_sided_outputs(
            weight, outputs, gradient.value, damping, spend=outputs is not moment.value
        )
